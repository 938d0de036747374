"""Which parts of what is written to a file are whole pages of zeros, and so can be left out as holes.

A hole reads as zeros and takes no room; where a file system knows none, skipping over it writes the zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

PAGE = 4096
"""Bytes; holes begin and end at multiples of it."""


def spans(data: bytes | memoryview, offset: int) -> Iterator[tuple[bool, memoryview]]:
    """Consecutive parts of `data`, which is to lie at `offset` of a file, and whether each is a hole.

    Holes are runs of whole pages of the file that are zero. What is left of a page at either end of `data` is
    never one: its neighbours are not known here.
    """
    view, lead = memoryview(data).cast("B"), -offset % PAGE
    count = (len(view) - lead) // PAGE
    if count <= 0:
        yield False, view
        return
    zero = _zero_pages(np.frombuffer(view, np.uint8, count * PAGE, lead).reshape(count, PAGE))
    if not zero.any():
        yield False, view
        return
    turns = np.flatnonzero(zero[1:] != zero[:-1]) + 1
    edges = [0, *(lead + PAGE * int(page) for page in turns), len(view)]
    hole = bool(zero[0])
    if hole and lead:
        edges.insert(1, lead)
        hole = False
    rest = lead + PAGE * count
    if zero[-1] and rest < len(view):
        edges.insert(-1, rest)
    for start, end in pairwise(edges):
        yield hole, view[start:end]
        hole = not hole


def _zero_pages(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """[n] whether each page is all zeros; two bytes tell that nearly every page of real data is not."""
    zero = (pages[:, 0] | pages[:, PAGE // 2]) == 0
    if zero.any():
        words = pages if zero.all() else pages[zero]
        zero[zero] = np.bitwise_or.reduce(words.view(np.uint64), axis=1) == 0
    return np.asarray(zero)


__all__ = ["PAGE", "spans"]
