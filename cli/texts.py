"""Options for the texts that a command measures with: files of text or of token ids."""

from __future__ import annotations

import argparse
import re

import numpy as np
import numpy.typing as npt

from dsv4c.errors import UsageError

from .base import integer, read_text, threads_option

Document = str | npt.NDArray[np.int64]


def text_options(parser: argparse.ArgumentParser) -> None:
    """`--text`, `--ids`, `--context`, `--max-tokens` and `--threads`."""
    parser.add_argument(
        "--text", action="append", default=[], metavar="FILE",
        help="UTF-8 text, - is standard input; several allowed, each a document of its own",
    )  # fmt: skip
    parser.add_argument(
        "--ids", action="append", default=[], metavar="FILE",
        help="token ids, apart by white space or commas, instead of text; several allowed",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=integer(1), metavar="N",
        help="positions of a window; each starts afresh (default: the model's maximum, at most 4096)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=integer(1), metavar="N", help="take no more of the text")
    threads_option(parser)


def read_documents(args: argparse.Namespace) -> list[Document]:
    """What the options name, in order, text first.

    Raises:
        UsageError: there is none; a file cannot be read, is empty, or holds no ids.
    """
    if not args.text and not args.ids:
        raise UsageError("no text", where=f"dsv4c {args.command}", allowed="--text FILE or --ids FILE")
    texts: list[Document] = []
    for path in args.text:
        text = read_text(path)
        if not text:
            raise UsageError("is empty", where=path, allowed="text")
        texts.append(text)
    return texts + [_ids(path) for path in args.ids]


def _ids(path: str) -> npt.NDArray[np.int64]:
    words = read_text(path).replace(",", " ")
    if odd := re.search(r"[^\s0-9]", words, re.ASCII):
        raise UsageError(f"{odd.group()!r} is not part of a token id", where=path, allowed="ids like 1 2 3")
    try:
        ids = np.array(words.split(), np.int64)
    except (OverflowError, ValueError):
        raise UsageError("a number is too large for a token id", where=path, allowed="64 bits") from None
    if not len(ids):
        raise UsageError("is empty", where=path, allowed="ids like 1 2 3")
    return ids
