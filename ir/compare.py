"""Comparing what two graphs compute, value by value: the first op whose results differ, and by how much."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .graph import Op

Array = npt.NDArray[Any]

_SETS = frozenset({"index_topk", "index_select"})
"""Ops whose last axis is a set: its order is not part of the result."""


@dataclass(frozen=True)
class Traced:
    """The results of one op in one step, kept apart from a graph that a pass is about to change."""

    name: str
    loc: str
    results: tuple[Array, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return self.loc, tuple((a.shape, a.dtype.kind) for a in self.results)


def difference(want: Array, got: Array) -> float:
    """The largest |got - want| over the largest |want|; inf where shapes, integers or NaNs disagree."""
    if want.shape != got.shape:
        return float("inf")
    if want.dtype.kind != "f":
        return 0.0 if np.array_equal(want, got) else float("inf")
    known = ~np.isnan(want)
    if not np.array_equal(known, ~np.isnan(got)):
        return float("inf")
    want, got = want[known].astype(np.float64), got[known].astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(want[~finite], got[~finite]):
        return float("inf")
    want, got = want[finite], got[finite]
    if not want.size:
        return 0.0
    return float(np.abs(got - want).max()) / max(float(np.abs(want).max()), np.finfo(np.float64).tiny)


def real_rows(array: Array, n_valid: Array | None, length: int) -> Array:
    """[B,T,...] with the rows of padding, which are unspecified, set to 0; anything else as it is."""
    if n_valid is None or array.ndim < 2 or array.shape[:2] != (len(n_valid), length):
        return array
    padding = np.arange(length) >= n_valid[:, None]
    return np.where(padding.reshape(*padding.shape, *[1] * (array.ndim - 2)), array.dtype.type(0), array)


def first_difference(
    before: list[Traced], after: list[tuple[Op, Traced]], tolerance: float
) -> tuple[Op, float] | None:
    """The first op of `after` that has one clear counterpart in `before` and differs from it.

    Counterparts have the same location and result shapes; where several share these, the same op name and
    the same place among those decide. None when no op that has a counterpart differs.
    """
    known: dict[tuple[object, ...], list[Traced]] = defaultdict(list)
    for t in before:
        known[t.key].append(t)
    seen: dict[tuple[object, ...], int] = defaultdict(int)
    for op, t in after:
        candidates = known.get(t.key, [])
        if len(candidates) > 1:
            candidates = [c for c in candidates if c.name == t.name]
        place = seen[t.name, *t.key]
        seen[t.name, *t.key] += 1
        if place >= len(candidates):
            continue
        twin = candidates[place]
        pairs = zip(_comparable(twin), _comparable(t), strict=True)
        size = max((difference(a, b) for a, b in pairs), default=0.0)
        if size > tolerance:
            return op, size
    return None


def _comparable(t: Traced) -> list[Array]:
    return [np.sort(a, axis=-1) for a in t.results] if t.name in _SETS else list(t.results)
