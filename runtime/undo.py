"""Taking back a step that failed in its middle: what it may overwrite is copied before it runs.

Only steps that read files can fail once they have begun. A step writes few rows of a long state; the artifact
says which, so the copy is as small as the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from .buffers import ALIGNMENT

State = dict[str, npt.NDArray[Any]]
Counts = npt.NDArray[np.integer]
_WHOLE = ["whole"]


class Undo:
    """Knows which rows of each state a step writes.

    Args:
        writes: state -> ["ring"] for slots (pos + t) mod W, ["entries", ratio] for slots pos // ratio + i;
            any other state is copied whole.
    """

    def __init__(self, writes: Mapping[str, list[Any]]) -> None:
        self._writes = dict(writes)
        self._one: _OneToken | None = None

    @contextmanager
    def guard(self, state: State, counts: Counts | None) -> Iterator[None]:
        """Whatever is raised inside, `state` ends as it was.

        Args:
            counts: [B] tokens that the rows will be fed inside, in one step or in many; None is any number.
        """
        if counts is not None and (counts == 1).all() and "pos" in state:
            if self._one is None or self._one.state is not state:
                self._one = _OneToken(state, self._writes)
            if self._one.fits:
                with self._one.guard():
                    yield
                return
        parts = self._parts(state, counts)
        saved = [part.copy() for part in parts]
        try:
            yield
        except BaseException:
            for part, before in zip(parts, saved, strict=True):
                part[...] = before
            raise

    def _parts(self, state: State, counts: Counts | None) -> list[npt.NDArray[Any]]:
        """Views of what a step may write."""
        if counts is None or "pos" not in state:
            return list(state.values())
        parts: list[npt.NDArray[Any]] = []
        steps = list(zip(state["pos"].tolist(), counts.tolist(), strict=True))
        for name, array in state.items():
            kind, *numbers = self._writes.get(name, _WHOLE)
            if kind == "whole":
                parts.append(array)
            elif kind == "ring":
                size = array.shape[1]
                for row, (start, count) in enumerate(steps):
                    first, end = start % size, start % size + min(count, size)
                    parts.append(array[row, first:end])
                    if end > size:
                        parts.append(array[row, : end - size])
            else:
                (ratio,) = numbers
                for row, (start, count) in enumerate(steps):
                    first, end = start // ratio, (start + count) // ratio
                    if end > first:
                        parts.append(array[row, first:end])
        return parts


class _OneToken:
    """Where a step of one token per row writes, as lines of memory: one gather copies what all states lose.

    Attributes:
        state: the arrays it was made for.
        fits: whether every slot of a ring or of entries is made of whole lines.
    """

    def __init__(self, state: State, writes: Mapping[str, list[Any]]) -> None:
        self.state = state
        self._small = [array for name, array in state.items() if name not in writes]
        found = [(writes[name], array) for name, array in state.items() if name in writes and array.size]
        self.fits = bool(found) and all(
            a.flags.c_contiguous and a.ctypes.data % ALIGNMENT == 0 and a[0, 0].nbytes % ALIGNMENT == 0
            for _, a in found
        )
        if not self.fits:
            return
        low = min(a.ctypes.data for _, a in found)
        lines = (max(a.ctypes.data + a.nbytes for _, a in found) - low) // ALIGNMENT
        memory = (ctypes.c_char * (lines * ALIGNMENT)).from_address(low)
        self._lines = np.frombuffer(memoryview(memory), f"V{ALIGNMENT}")  # between arrays is what is others'
        facts = []  # per state and row: its first line, lines per slot, how many slots, tokens per slot, row
        for (_, *numbers), array in found:
            ratio = int(numbers[0]) if numbers else 1
            for row, part in enumerate(array):
                size = part[0].nbytes // ALIGNMENT
                facts.append(((part.ctypes.data - low) // ALIGNMENT, size, array.shape[1], ratio, row))
        first, self._sizes, self._counts, self._ratios, self._rows = np.array(facts, np.int64).T
        self._of = np.repeat(np.arange(len(facts)), self._sizes)
        within = np.arange(len(self._of)) - np.repeat(np.cumsum(self._sizes) - self._sizes, self._sizes)
        self._first = first[self._of] + within

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Whatever is raised inside, the state ends as it was; also an entry that is not full yet counts."""
        slots = self.state["pos"][self._rows] // self._ratios % self._counts * self._sizes
        at = self._first + slots[self._of]
        kept, small = self._lines[at], [array.copy() for array in self._small]
        try:
            yield
        except BaseException:
            self._lines[at] = kept
            for array, before in zip(self._small, small, strict=True):
                array[...] = before
            raise
