"""How matrix products become kernel calls: linear maps, experts, and what counts their inputs.

Where rows are BF16 numbers and the machine multiplies pairs of them, a product takes their bits: the rounding
in front of it then writes bits and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import relax

from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op, Value
from dsv4c.ir.weights import WeightExpr

from . import matrix
from .context import Context, ints
from .kernels import dense, rounding, statistics
from .kernels.packing import Simd
from .kernels.product import panel_width
from .lowering_rounding import rounded_expert_mlp, rows_of


def linear(c: Context, op: Op) -> None:
    n, k = ints(op.operands[1])
    _linear(c, op, None, 1, k, n, lambda e: (e,))


def grouped_linear(c: Context, op: Op) -> None:
    groups = op.attrs["groups"]
    assert isinstance(groups, int)
    rows, k = ints(op.operands[1])
    n = rows // groups

    def pieces(e: WeightExpr) -> tuple[WeightExpr, ...]:
        return tuple(w.rows(e, g * n, (g + 1) * n) for g in range(groups))

    _linear(c, op, ints(op.operands[0]), groups, k, n, pieces)


def _linear(
    c: Context, op: Op, heads: tuple[int, ...] | None, groups: int, k: int, n: int, pieces: matrix.Pieces
) -> None:
    dot = takes_bits(c, op)
    m = matrix.in_panels(c, op.operands[1], panel_width(n), pieces, dot)
    x = _bits(c, op.operands[0]) if dot else c.values[op.operands[0]]
    c.lower(op, dense.grouped_linear, heads, groups, k, n, m.packing, args=[x, *m.args])


def takes_bits(c: Context, op: Op) -> bool:
    """Whether an op multiplies the rows of its operand 0 as pairs of BF16 numbers."""
    if c.simd is not Simd.AVX512_BF16:
        return False
    if op.name == "expert_mlp":
        (_, k, inner), matrices = ints(op.operands[5]), op.operands[4:6]
        return op.attrs["rounding"] == "bf16_rows" and k % 2 == inner % 2 == 0 and all(map(_narrow, matrices))
    if op.name not in ("linear", "grouped_linear") or op.attrs["inputs"] != "bf16":
        return False
    return ints(op.operands[1])[1] % 2 == 0 and _narrow(op.operands[1])


def _narrow(value: Value) -> bool:
    """Whether a weight is stored as BF16 numbers or as codes."""
    return value.type.dtype is DType.BF16 or matrix.is_packed(value)


def round_values(c: Context, op: Op) -> None:
    heads, d = rows_of(op.result)
    rule, channels = op.attrs["rule"], op.attrs["channels"] or d
    if rule != "bf16":
        c.lower(op, rounding.round_blocks, heads, d, rule, op.attrs["block"] or channels, channels)
    elif not op.result.uses or not all(takes_bits(c, user) and i == 0 for user, i in op.result.uses):
        c.lower(op, rounding.round_bf16, heads, d, channels)


def _bits(c: Context, x: Value) -> Any:
    """The bits of rows that hold BF16 numbers; from in front of the rounding, where there is one."""
    key = ("bits", x)
    if key not in c.memo:
        source = x.producer
        by_rounding = source is not None and source.name == "round_values" and source.attrs["rule"] == "bf16"
        before = (
            source.operands[0] if source is not None and by_rounding and not source.attrs["channels"] else x
        )
        kernel = c.kernel(rounding.bf16_rows, *rows_of(x))
        shape = relax.TensorType([c.dim(d) for d in x.type.shape], "uint16")
        (c.memo[key],) = c.call(kernel, [c.values[before]], shape)
    return c.memo[key]


@dataclass(frozen=True)
class _Routes:
    """The hidden values of every route, sorted by expert, and what leads from them to the outputs."""

    order: Any
    starts: Any
    hidden: Any
    second: matrix.Matrix
    shape: tuple[int, int, int, int]
    """Experts, width, inner width, experts per token."""
    count: Any

    def output(self, c: Context, order: Any, topk: int, result: Any) -> Any:
        """The second half: every route's row added to the row that `order` // topk says."""
        experts, k, inner, _ = self.shape
        kernel = c.kernel(dense.expert_output, experts, k, inner, topk, self.second.packing)
        return c.call(kernel, [self.hidden, order, self.starts, *self.second.args], result)[0]


def _routes(c: Context, op: Op, operands: list[Value]) -> _Routes:
    """First half of the expert MLP; computed once where two ops read the same operands."""
    x, ids, weights, n_valid, w13, w2 = operands
    dot = takes_bits(c, op)
    rounded = op.attrs.get("rounding") == "bf16_rows"
    key = ("routes", *operands, op.attrs["limit"], rounded)
    known: _Routes | None = c.memo.get(key)
    if known is not None:
        return known
    experts, k, inner = ints(w2)
    topk = ints(ids)[0]
    b, t = (c.dim(d) for d in x.type.shape[:2])
    routes = b * t * topk
    order, starts = c.call(
        c.kernel(dense.expert_order, experts, topk), [c.values[ids], c.values[n_valid]],
        relax.TensorType([routes], "int32"), relax.TensorType([experts + 1], "int32"),
    )  # fmt: skip
    first = matrix.in_panels(
        c, w13, 2 * dense.PAIR, lambda e: tuple(w.pair_rows(m, dense.PAIR) for m in matrix.entries(e)), dot
    )
    second = matrix.in_panels(c, w2, panel_width(k), matrix.entries, dot)
    (hidden,) = c.call(
        c.kernel(dense.expert_hidden, experts, k, inner, topk, op.attrs["limit"], first.packing, rounded),
        [_bits(c, x) if dot else c.values[x], c.values[weights], order, starts, *first.args],
        relax.TensorType([routes, inner], "uint16" if dot else "float32"),
    )
    c.memo[key] = found = _Routes(order, starts, hidden, second, (experts, k, inner, topk), routes)
    return found


def expert_mlp(c: Context, op: Op) -> None:
    if op.attrs["rounding"] not in ("none", "bf16_rows"):
        return rounded_expert_mlp(c, op)
    r = _routes(c, op, op.operands)
    c.values[op.result] = r.output(c, r.order, r.shape[-1], c.tensor(op.result.type))


def expert_statistics(c: Context, op: Op) -> None:
    """The second half of the expert MLP with every route as a row of its own, so that none are added up."""
    counts, *operands = op.operands
    r = _routes(c, op, operands)
    experts, k, _, topk = r.shape
    ids, weights = operands[1:3]
    rows = relax.TensorType([r.count], "int32")
    (own,) = c.call(c.kernel(statistics.route_rows, topk), [c.values[ids]], rows)
    outputs = r.output(c, own, 1, relax.TensorType([c.dim(1), r.count, c.dim(k)], "float32"))
    c.values[op.result] = c.update(
        c.kernel(statistics.expert_usage, experts, k, topk),
        [c.values[counts], outputs, c.values[weights], r.order, r.starts], 0, c.tensor(op.result.type),
    )  # fmt: skip


def input_statistics(c: Context, op: Op) -> None:
    kernel = c.kernel(statistics.column_squares, *ints(op.result))
    args = [c.values[v] for v in op.operands]
    c.values[op.result] = c.update(kernel, args, 0, c.tensor(op.result.type))


PRODUCT_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "round_values": round_values, "linear": linear, "grouped_linear": grouped_linear,
    "expert_mlp": expert_mlp, "expert_statistics": expert_statistics, "input_statistics": input_statistics,
}  # fmt: skip
"""Ops that read matrices, or count what others are fed."""
