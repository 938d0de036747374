"""Which results of a model hang on a choice that rounding decides: the evaluator beside shadows of itself.

Expert routes and index selections are discrete. Where numbers are rounded, the same sums in another order
fall on the other side of a step, scores move, and what was chosen by a small margin changes: both answers are
right and far apart. So the golden prompt is evaluated beside shadows, more rows of its batch, that compute
with the freedom an artifact has. Rows that move in a shadow which has chosen otherwise are undecided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.ir.dims import Dim, sym
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.meaning.evaluator import meaning_of

Arr = npt.NDArray[Any]

SHADOWS = 7
"""They are rows of one batch, so every weight is read and decoded once for all of them."""
NOISE = 2.0**-22
"""Two units in the last place of float32: what sums in another order differ by, relative to their terms."""
REACH = 3.0
"""Shadows choose by scores this many times as far off as theirs are; it reaches what their draw misses."""
STEADY = 0.5
"""A row is decided where shadows move it by no more than this part of the tolerance."""

_CHOICES = frozenset({"route_topk", "index_topk", "candidate_blocks", "index_select", "index_candidates"})
_DIVIDES = frozenset({"int8", "e2m1_e4m3"})
"""Rules whose scale is no power of two: x / (a / 127) and x * (127 / a) part at exact ties."""
_MOVES = frozenset({
    "clamp", "dispatch", "embed", "engram_fetch", "engram_rows", "entries_append", "gather_rows",
    "index_restrict", "merge_heads", "merge_images", "repeat_streams", "ring_write", "round_values",
    "split_columns", "split_heads",
})  # fmt: skip
"""Ops that compute nothing whose last place could differ."""


def rounds(module: Module) -> bool:
    """Whether any op rounds below float32; where none does, choices are float32's and all are decided."""
    return any(op.name == "round_values" or op.attrs.get("rounding", "none") != "none" for op in module.ops)


class ShadowedEvaluator(Evaluator):
    """Evaluates a batch of 1 + `shadows` equal rows: row 0 as the IR says in float32, the others with noise.

    In shadows every computed float is multiplied by 1 + u, |u| <= `NOISE`, and so is what a rule with a scale
    that is no power of two rounds. Choices are made from operands `REACH` times as far off as they are, by
    every second shadow in the opposite direction: where row 0 lies at the edge of a rounding step, all draws
    may move a score the same way.

    Args:
        watched: values that are kept in `seen`, step after step; all others are freed when last read.

    Attributes:
        chose_otherwise: bool [1 + shadows], whether a row ever chose another set than row 0.
    """

    def __init__(self, module: Module, shadows: int, watched: Collection[Value] = (), seed: int = 0) -> None:
        super().__init__(module, keep_weights=False)
        self.batch = 1 + shadows
        self.chose_otherwise = np.zeros(self.batch, np.bool_)
        self.seen: dict[Value, list[Arr]] = {v: [] for v in watched}
        self._random = np.random.default_rng(seed)
        self._owned: dict[Dim | int, Arr] = {}
        last = {v: op for op in module.ops for v in op.operands if v not in module.outputs.values()}
        self._dying: dict[Op, list[Value]] = {}
        for value, op in last.items():
            self._dying.setdefault(op, []).append(value)

    def _run(self, values: dict[Value, Arr]) -> Iterator[tuple[Op, tuple[Arr, ...]]]:
        self._owned = {sym("B"): np.arange(self.batch)}
        for op, exact in super()._run(values):
            results = exact if self.batch == 1 else self._shadowed(op, exact, values)
            for value, array in zip(op.results, results, strict=True):
                if value in self.seen:
                    self.seen[value].append(array)
            yield op, results
            for value in self._dying.get(op, ()):
                values.pop(value, None)

    def _shadowed(self, op: Op, exact: tuple[Arr, ...], values: dict[Value, Arr]) -> tuple[Arr, ...]:
        if op.name in _CHOICES:
            return self._choose(op, values)
        if op.name == "dispatch":
            self._follow(op, values)
        elif op.name == "round_values" and op.attrs["rule"] in _DIVIDES:
            (x,) = op.operands
            return self._again(op, [self._noisy(values[x], x)])
        if op.name in _MOVES:
            return exact
        return tuple(self._noisy(array, value) for array, value in zip(exact, op.results, strict=True))

    def _choose(self, op: Op, values: dict[Value, Arr]) -> tuple[Arr, ...]:
        operands = [
            _apart(array) if v.type.dtype.is_float and self._owners(v) is not None else array
            for v, array in zip(op.operands, self._operands(op, values), strict=True)
        ]
        results = self._again(op, operands)
        for ids in results:
            sets = np.sort(ids, axis=-1)
            self.chose_otherwise |= (sets != sets[:1]).any(axis=(1, 2))
        return results

    def _again(self, op: Op, operands: list[Arr]) -> tuple[Arr, ...]:
        function = meaning_of(op.name)
        assert function is not None, op.name
        found = function(op, *operands)
        results = found if isinstance(found, tuple) else (found,)
        return tuple(self._round(r, v.type) for r, v in zip(results, op.results, strict=True))

    def _follow(self, op: Op, values: dict[Value, Arr]) -> None:
        """Of which row of the batch the rows of every expert are; they come in the order of the batch."""
        ids = values[op.operands[1]]
        for expert, routed in enumerate(op.results[::2]):
            counts = (ids == expert).sum(axis=(1, 2))
            self._owned[routed.type.shape[0]] = np.repeat(np.arange(self.batch), counts)

    def _owners(self, value: Value) -> Arr | None:
        """[n] the row of the batch that each first index belongs to; None where it belongs to all."""
        return self._owned.get(value.type.shape[0]) if value.type.shape else None

    def _noisy(self, array: Arr, value: Value) -> Arr:
        owners = self._owners(value)
        if owners is None or not value.type.dtype.is_float:
            return array
        out, shadows = array.copy(), owners > 0
        draw = self._random.random((int(shadows.sum()), *array.shape[1:]), np.float32)
        out[shadows] *= (1 + NOISE * (2 * draw - 1)).astype(array.dtype)
        return out


def _apart(x: Arr) -> Arr:
    """x [B,...] with rows `REACH` times as far from row 0 as they are, every second on the other side of it;
    what is infinite stays."""
    finite = np.isfinite(x) & np.isfinite(x[:1])
    moved = np.subtract(x, x[:1], out=np.zeros_like(x), where=finite)
    times = np.where(np.arange(len(x)) % 2, REACH, -REACH).reshape(-1, *[1] * (x.ndim - 1))
    out: Arr = np.where(finite, x[:1] + times.astype(x.dtype) * moved, x)
    return out


@dataclass(frozen=True)
class Undecided:
    """What is not judged row by row of one tensor.

    Attributes:
        rows: tokens, slots or entries that a shadow which chose otherwise moves by more than `STEADY` of the
            tolerance.
        off: how many of them are beyond the tolerance in the shadow where most are.
    """

    rows: list[int]
    off: int


def undecided_rows(found: Arr, chose_otherwise: Arr, tolerance: float) -> Undecided:
    """Of found [1 + shadows, rows, ...]; differences are over the range of found[0]."""
    if found.ndim < 2 or not found.size or not chose_otherwise.any():
        return Undecided([], 0)
    exact = found[0].astype(np.float64)
    moved = np.abs(found[chose_otherwise] - exact).max(axis=tuple(range(2, found.ndim)))
    moved /= float(np.ptp(exact)) or 1.0
    open_ = (moved > STEADY * tolerance).any(axis=0)
    return Undecided(np.flatnonzero(open_).tolist(), int((moved > tolerance).sum(axis=1).max()))
