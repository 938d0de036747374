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
        saved = [(name, at, state[name][at].copy()) for name, at in self._parts(state, counts)]
        try:
            yield
        except BaseException:
            for name, at, before in saved:
                state[name][at] = before
            raise

    def _parts(self, state: State, counts: Counts | None) -> Iterator[tuple[str, Any]]:
        if counts is None or "pos" not in state:
            yield from ((name, ...) for name in state)
            return
        steps = list(zip(state["pos"].tolist(), counts.tolist(), strict=True))
        for name, array in state.items():
            kind, *numbers = self._writes.get(name, ["whole"])
            if kind == "whole":
                yield name, ...
                continue
            for row, (start, count) in enumerate(steps):
                if kind == "ring":
                    slots = np.arange(start, start + min(count, array.shape[1])) % array.shape[1]
                    yield name, (row, slots)
                else:
                    ratio = int(numbers[0])
                    yield name, (row, slice(start // ratio, (start + count) // ratio))
