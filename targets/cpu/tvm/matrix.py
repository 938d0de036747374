"""How a weight matrix becomes arguments of a kernel: its packing, and its codes and scales in panels.

Codes and scales stay as they are stored wherever the weight has a packed form; only then does a kernel
decode. Knows layouts, not ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv4c.ir import layouts
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Value
from dsv4c.ir.packed import Packed, packed_form
from dsv4c.ir.weights import WeightExpr

from .context import Context
from .kernels.packing import Packing

_INTEGERS = (DType.I8, DType.I4X2, DType.F4E2M1X2)

Parts = Callable[[WeightExpr], tuple[WeightExpr, ...]]
"""[rows, any] or [experts, rows, any] -> the matrices whose panels follow one another."""


@dataclass(frozen=True)
class Matrix:
    """A weight as kernels take it: `args` are codes, block scales and row scales."""

    packing: Packing
    args: list[Any]


def in_panels(c: Context, value: Value, width: int, parts: Parts = lambda e: (e,)) -> Matrix:
    """A weight as panels of `width` rows of its parts, for rows of float32."""

    def panels(e: WeightExpr) -> WeightExpr:
        return w.concat(tuple(w.panel(m, width) for m in parts(e)))

    def words(e: WeightExpr) -> WeightExpr:
        return w.concat(tuple(layouts.lane_words(m, width) for m in parts(e)))

    return _matrix(c, value, panels, words)


def is_packed(value: Value) -> bool:
    """Whether a weight is stored as codes and scales."""
    expr = value.producer.weight if value.producer is not None else None
    return expr is not None and expr.dtype is DType.F32 and packed_form(expr) is not None


def has_integers(value: Value) -> bool:
    """Whether a weight's codes are integers, or halves of them."""
    expr = value.producer.weight if value.producer is not None else None
    held = packed_form(expr) if expr is not None and is_packed(value) else None
    return held is not None and held.scheme.code in _INTEGERS


def in_rows(c: Context, value: Value) -> Matrix:
    """A table row by row."""
    return _matrix(c, value, lambda e: e, lambda e: e)


def entries(x: WeightExpr) -> tuple[WeightExpr, ...]:
    """Along the leading axis; emission streams them one at a time."""
    return x.args if x.op == "stack" else tuple(w.take(x, i) for i in range(x.shape[0]))


def _matrix(
    c: Context, value: Value, panels: Callable[[WeightExpr], WeightExpr],
    words: Callable[[WeightExpr], WeightExpr],
) -> Matrix:  # fmt: skip
    op, unused = value.producer, c.ones(1)
    assert op is not None and op.weight is not None, "a kernel's weight operand must be a weight op"
    held = packed_form(op.weight) if op.weight.dtype is DType.F32 else None
    if held is None:
        plain = panels if op.weight.dtype is DType.F32 else words
        packing = Packing(op.weight.dtype, simd=c.simd, tuning=c.tuning)
        return Matrix(packing, [c.weight(value, plain), unused, unused])
    scheme, per_row = held.scheme, held.scheme.block[1] == 0
    block_scale, per_row_too = None if per_row else scheme.scale, per_row or scheme.tensor_scale
    packing = Packing(scheme.code, block_scale, scheme.block[1], per_row_too, c.simd, tuning=c.tuning)
    scales = _by_row(held, held.scales, scheme.block[0])
    codes = c.weight(value, lambda _: words(held.codes))
    if per_row:
        return Matrix(packing, [codes, unused, c.parameter(f"{op.loc}.scale", panels(scales))])
    rows = unused
    if held.tensor_scale is not None:
        tensor = held.tensor_scale
        columns = _each(tensor, 1, lambda t: w.reshape(t, (t.shape[0], 1)))
        high = held.codes.shape[-2] // tensor.shape[-1]
        rows = c.parameter(f"{op.loc}.tensor_scale", panels(_by_row(held, columns, high)))
    return Matrix(packing, [codes, c.parameter(f"{op.loc}.scale", panels(scales)), rows])


def _by_row(held: Packed, scales: WeightExpr, high: int) -> WeightExpr:
    """Scales of bands of `high` rows (0: of all) as a line for every row."""
    rows = held.codes.shape[-2]
    return _each(scales, 2, lambda s: layouts.row_scales(s, rows, high or rows))


def _each(x: WeightExpr, rank: int, f: Callable[[WeightExpr], WeightExpr]) -> WeightExpr:
    """`f` of x, or of every entry of a stack of them."""
    return f(x) if len(x.shape) == rank else w.stack(tuple(f(e) for e in entries(x)))
