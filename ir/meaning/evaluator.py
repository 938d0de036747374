"""Runs a module op by op with the meanings of this package.

`precision` is the NumPy type of every float: float32 computes as the IR says, float64 is the judge
where rounding must not matter. Weights are evaluated when first needed and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsv4c.errors import EvalError
from dsv4c.ir import weights as lazy
from dsv4c.ir.dims import Dim
from dsv4c.ir.dtypes import decode
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.types import TensorType

from . import attention, core, engram, engram_store, fused, hyper, moe, rounding, state, vision
from .core import Arr

_FAMILIES = (core, state, attention, hyper, moe, rounding, engram, engram_store, vision, fused)

_TABLES = {"engram_rows": (1, 2), "engram_fetch": (1, 3)}
"""Ops that look rows up, and which of their operands are tables; row ids come first."""


def meaning_of(name: str) -> Callable[..., Arr | tuple[Arr, ...]] | None:
    """The NumPy function of an op, found by its name."""
    return next((getattr(f, name) for f in _FAMILIES if hasattr(f, name)), None)


@dataclass
class Step:
    """What one call gave: named outputs, the new state, and, when asked for, every op's results."""

    outputs: dict[str, Arr]
    state: dict[str, Arr]
    trace: dict[Op, tuple[Arr, ...]] = field(default_factory=dict)


class Evaluator:
    """Evaluates a module whose weights come from `store`.

    Args:
        precision: np.float32 or np.float64.
        keep_weights: False reads every weight anew in each step and only when a row needs it, which bounds
            memory by one weight.
    """

    def __init__(
        self, module: Module, store: lazy.TensorStore | None = None, precision: npt.DTypeLike = np.float32,
        keep_weights: bool = True,
    ) -> None:  # fmt: skip
        self.module, self.precision, self.keep_weights = module, np.dtype(precision), keep_weights
        found = store or module.store
        if found is None:
            raise EvalError(
                "the module has no weights to evaluate", where=module.name, hint="load it from a checkpoint"
            )
        self.store = found
        self._weights: dict[Op, Arr] = {}

    def fresh_state(self, **dims: int) -> dict[str, Arr]:
        """Zeroed buffers for the given symbols (`B` and `ctx`)."""
        return {
            name: np.zeros(v.type.concrete(dims), self._dtype(v.type))
            for name, v in self.module.states.items()
        }

    def __call__(self, inputs: Mapping[str, Arr], state: Mapping[str, Arr], trace: bool = False) -> Step:
        """One step.

        Raises:
            EvalError: inputs are missing or disagree with the module's types.
        """
        env: dict[str, int] = {}
        values: dict[Value, Arr] = {}  # of everything but weights
        for name, value in self.module.arguments().items():
            given = {**inputs, **state}.get(name)
            if given is None:
                raise EvalError(f"argument {name!r} is missing", where=self.module.name)
            values[value] = np.asarray(given, self._dtype(value.type))
            _bind(value.type, values[value].shape, env, name)
        kept: dict[Op, tuple[Arr, ...]] = {}
        for op, results in self._run(values):
            values.update(zip(op.results, results, strict=True))
            if trace:
                kept[op] = results
        outputs = {name: values[v] for name, v in self.module.outputs.items()}
        new_state = {name: outputs.pop(name) for name in self.module.states}
        return Step(outputs, new_state, kept)

    def _run(self, values: dict[Value, Arr]) -> Iterator[tuple[Op, tuple[Arr, ...]]]:
        for op in self.module.ops:
            if op.weight is not None:
                continue
            function = meaning_of(op.name)
            assert function is not None, op.name
            empty = self._no_rows(op, values)
            result = function(op, *self._operands(op, values)) if empty is None else empty
            results = result if isinstance(result, tuple) else (result,)
            yield op, tuple(self._round(r, v.type) for r, v in zip(results, op.results, strict=True))

    def _no_rows(self, op: Op, values: dict[Value, Arr]) -> Arr | None:
        """A product over no rows (an expert that no token chose) needs no weight."""
        if op.name != "linear" or len(values[op.operands[0]]):
            return None
        n = op.operands[1].type.shape[0]
        assert isinstance(n, int)
        return np.zeros((0, n), self.precision)

    def _operands(self, op: Op, values: dict[Value, Arr]) -> list[Arr]:
        """The operands; of a table that is looked up only the rows asked for, under new numbers."""
        tables = [op.operands[i] for i in _TABLES.get(op.name, ()) if i < len(op.operands)]
        if not tables or not all(v.producer and v.producer.weight for v in tables):
            return [self._value(v, values) for v in op.operands]
        rows = values[op.operands[0]]
        used, index = np.unique(rows, return_inverse=True)
        renamed = np.where(rows < 0, -1, index.reshape(rows.shape))
        rest = [self._rows(v, used) if v in tables else self._value(v, values) for v in op.operands[1:]]
        return [renamed, *rest]

    def _rows(self, table: Value, used: Arr) -> Arr:
        """The numbers of some rows of a weight, which may be larger than memory; row -1 gives any."""
        assert table.producer is not None and table.producer.weight is not None
        stored = lazy.materialise(table.producer.weight, self.store)[np.maximum(used, 0)]
        return decode(stored, table.producer.weight.dtype).astype(self.precision)

    def _value(self, value: Value, values: dict[Value, Arr]) -> Arr:
        if value in values:
            return values[value]
        assert value.producer is not None
        return self._weight(value.producer)

    def _weight(self, op: Op) -> Arr:
        if op in self._weights:
            return self._weights[op]
        assert op.weight is not None
        array = lazy.values(op.weight, self.store)
        array = array.astype(self.precision, copy=False) if op.weight.dtype.is_float else array
        if self.keep_weights:
            self._weights[op] = array
        return array

    def _dtype(self, type_: TensorType) -> np.dtype[np.generic]:
        return self.precision if type_.dtype.is_float else type_.dtype.storage

    def _round(self, array: Arr, type_: TensorType) -> Arr:
        return array.astype(self._dtype(type_), copy=False)


def _bind(type_: TensorType, shape: tuple[int, ...], env: dict[str, int], name: str) -> None:
    """Read symbols off an argument's shape; complain where it cannot fit."""
    if len(shape) != type_.rank:
        raise EvalError(f"argument {name!r} has shape {list(shape)}", allowed=str(type_))
    for dim, size in zip(type_.shape, shape, strict=True):
        fixed = dim if isinstance(dim, int) else env.setdefault(dim.name, size) if dim.op == "sym" else size
        if fixed != size:
            raise EvalError(f"argument {name!r} has shape {list(shape)}", allowed=_spell(type_.shape, env))


def _spell(shape: tuple[Dim | int, ...], env: Mapping[str, int]) -> str:
    return "[" + ", ".join(f"{d}={env[str(d)]}" if str(d) in env else str(d) for d in shape) + "]"
