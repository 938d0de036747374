"""Taking back a step that failed in its middle: what it may overwrite is copied before it runs.

Only steps that read files can fail once they have begun. A step writes few rows of a long state; the artifact
says which, so the copy is as small as the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

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

    @contextmanager
    def guard(self, state: State, counts: Counts | None) -> Iterator[None]:
        """Whatever is raised inside, `state` ends as it was.

        Args:
            counts: [B] tokens that the rows will be fed inside, in one step or in many; None is any number.
        """
        parts = self._parts(state, counts)
        saved = [part.copy() for part in parts]
        try:
            yield
        except BaseException:
            for part, before in zip(parts, saved, strict=True):
                part[...] = before
            raise

    def _parts(self, state: State, counts: Counts | None) -> list[npt.NDArray[Any]]:
        """Views of what a step may write. Made anew for every token, so by slices alone, which cost least."""
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
