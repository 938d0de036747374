"""Measures one dsv4c artifact; obeys lines on standard input (see `protocol`).

    worker_dsv4c.py ARTIFACT THREADS [CONTEXT]
"""

from __future__ import annotations

import sys

from own_memory import PeakMemory, resident
from protocol import Result, packed_logits, serve, token_ids

import dsv4c

ROWS = 8
"""Sequences side by side in the command `batch`."""
BEFORE = 512
"""Tokens that each of them has seen before any is measured."""
CONTEXT = 2048


class Measured:
    """A session, and another of `ROWS` rows that is opened by the first `batch`."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._open = {"path": path, "threads": threads, "context": context}
        self._session = dsv4c.Session(**self._open)
        self._vocab = int(self._session.model["vocab_size"])
        self._batch: dsv4c.Session | None = None

    def prefill(self, tokens: int) -> None:
        self._session.reset()
        self._session.prefill([token_ids(tokens, self._vocab)], chunk=min(tokens, BEFORE))

    def decode(self, tokens: int) -> None:
        for token in token_ids(tokens, self._vocab):
            self._session.prefill([[token]])

    def fill(self, tokens: int) -> None:
        """Open the session of many rows and bring each row to `tokens` tokens."""
        self._batch = dsv4c.Session(**self._open, batch=ROWS)
        self._batch.prefill([token_ids(tokens, self._vocab, row) for row in range(ROWS)])

    def batch(self, tokens: int) -> Result:
        """`tokens` new tokens in every row of a session that `fill` opened."""
        assert self._batch is not None
        for column in zip(*(token_ids(tokens, self._vocab, row) for row in range(ROWS)), strict=True):
            self._batch.prefill([[token] for token in column])
        return {"rows": ROWS}

    def logits(self, tokens: int) -> Result:
        self._session.reset()
        return packed_logits(self._session.prefill([token_ids(tokens, self._vocab)])[0])

    def memory(self, tokens: int) -> Result:
        """Own memory at its peak over a prompt and some tokens, and what of it is state."""
        with PeakMemory() as peak:
            self._session.reset()
            self._session.prefill([token_ids(tokens, self._vocab)])
            self.decode(8)
        tensors = self._session.artifact.tensors.values()
        return {
            "own_bytes": peak.own_bytes, "state_bytes": self._session.state_bytes,
            "mapped_bytes": resident("RssFile"),
            "weight_bytes": sum(t.nbytes for t in tensors if not t.name.startswith("golden.")),
        }  # fmt: skip


def main() -> None:
    path, threads, *context = sys.argv[1:]
    m = Measured(path, int(threads), int(context[0]) if context else CONTEXT)
    serve({
        "prefill": m.prefill, "decode": m.decode, "fill": m.fill, "batch": m.batch, "logits": m.logits,
        "memory": m.memory,
    })  # fmt: skip


if __name__ == "__main__":
    main()
