"""Measures one dsv4c artifact; obeys lines on standard input (see `protocol`)."""

from __future__ import annotations

import sys

import numpy as np
from protocol import serve

import dsv4c


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    session = dsv4c.Session(path, context=2048, threads=threads)
    vocab = session.model["vocab_size"]

    def prefill(tokens: int) -> None:
        session.reset()
        session.prefill([ids(tokens, vocab)], chunk=tokens)

    def decode(tokens: int) -> None:
        for token in ids(tokens, vocab):
            session.prefill([[token]])

    serve(prefill, decode)


def ids(count: int, vocab: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(7).integers(2, vocab, count)]


if __name__ == "__main__":
    main()
