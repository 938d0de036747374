"""Text to measure with: documents as token ids, cut into windows that each start afresh.

Knows no model beyond its vocabulary and its beginning-of-sequence token, and nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dsv4c.errors import UsageError

Ids = npt.NDArray[np.int32]
Text = str | npt.ArrayLike
"""A document: text, or its token ids [N]."""

PIECE = 1 << 18
"""Characters encoded at a time: what a tokenizer keeps per token is many times the token."""


def encode(tokenizer: Tokenizer, text: str) -> Ids:
    """The ids of a text, without special tokens. A text longer than `PIECE` is cut behind line ends."""
    parts, at = [], 0
    while at < len(text):
        end = min(at + PIECE, len(text))
        if end < len(text):
            end = text.rfind("\n", at, end) + 1 or end
        parts.append(np.array(tokenizer.encode(text[at:end], add_special_tokens=False).ids, np.int32))
        at = end
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def documents(
    texts: Sequence[Text], tokenizer: Callable[[], Tokenizer], vocab: int, bos: int | None, limit: int | None
) -> list[Ids]:
    """Every document as ids; a `bos` at its start is dropped, since every window gets one.

    Args:
        tokenizer: called when a document is text.
        vocab: ids must be below.
        limit: tokens to keep, over all documents; None keeps all.

    Raises:
        UsageError: a document is empty, or not ids of this vocabulary (a tokenizer may know more than the
            model).
    """
    if not texts:
        raise UsageError("no text", where="text", allowed="at least one document")
    if limit is not None and limit < 1:
        raise UsageError(f"max_tokens = {limit}", where="text", allowed="1 or more")
    out, left = list[Ids](), limit
    for index, text in enumerate(texts):
        if left == 0:
            break
        where = f"text {index + 1}" if len(texts) > 1 else "text"
        ids = _checked(encode(tokenizer(), text) if isinstance(text, str) else text, vocab, where)
        ids = ids[1:] if len(ids) and ids[0] == bos else ids
        if not len(ids):
            raise UsageError("is empty", where=where, allowed="at least one token")
        out.append(ids if left is None else ids[:left])
        left = None if left is None else left - len(out[-1])
    return out


def _checked(given: npt.ArrayLike, vocab: int, where: str) -> Ids:
    ids = np.asarray(given)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UsageError(f"is {ids.dtype}{list(ids.shape)}", where=where, allowed="text, or integers [N]")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        bad = ids[(ids < 0) | (ids >= vocab)][0]
        raise UsageError(f"token id {bad} is outside the vocabulary", where=where, allowed=f"0..{vocab - 1}")
    return ids.astype(np.int32)


def windows(texts: Sequence[Ids], length: int, bos: int | None) -> Iterator[Ids]:
    """Windows of at most `length` positions, each after a `bos` where there is one.

    Every token of the text is in one window; no window spans two documents.
    """
    room = length if bos is None else max(length - 1, 1)
    for ids in texts:
        for at in range(0, len(ids), room):
            part = ids[at : at + room]
            yield part if bos is None or length == 1 else np.concatenate([[bos], part]).astype(np.int32)


def scored(texts: Sequence[Ids], length: int, bos: int | None) -> Iterator[tuple[Ids, Ids]]:
    """(inputs, targets) of windows of at most `length` positions: target i is the token after input i.

    With a `bos`, which starts every window, each token of the text is a target once; without, each but the
    first of a document.
    """
    for ids in texts:
        line = ids if bos is None else np.concatenate([[bos], ids]).astype(np.int32)
        for at in range(0, len(line) - 1, length):
            targets = line[at + 1 : at + 1 + length]
            inputs = line[at : at + len(targets)].copy()
            if bos is not None:
                inputs[0] = bos
            yield inputs, targets


def count_scored(texts: Sequence[Ids], bos: int | None) -> int:
    """How many targets `scored` gives."""
    return sum(len(ids) - (bos is None) for ids in texts)
