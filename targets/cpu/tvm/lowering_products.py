"""How matrix products become kernel calls: linear maps, experts, and what counts their inputs.

Where rows are BF16 numbers and the machine multiplies pairs of them, a product takes their bits: the rounding
in front of it then writes bits and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op, Value
from dsv4c.ir.weights import WeightExpr

from . import matrix
from .context import Context, ints
from .kernels import dense, dispatch, rounding, statistics
from .kernels.packing import Packing, Simd
from .kernels.product import panel_width
from .kernels.rows import BLOCK, CodedRow, Rows
from .kernels.tiles import by_tiles, row_length
from .lowering_rounding import rounded_expert_mlp, rows_of


def linear(c: Context, op: Op) -> None:
    n, k = ints(op.operands[1])
    _linear(c, op, None, 1, k, n, lambda e: (e,))


def grouped_linear(c: Context, op: Op) -> None:
    groups = op.attrs["groups"]
    assert isinstance(groups, int)
    rows, k = ints(op.operands[1])
    n = rows // groups

    def parts(e: WeightExpr) -> tuple[WeightExpr, ...]:
        return tuple(w.rows(e, g * n, (g + 1) * n) for g in range(groups))

    _linear(c, op, ints(op.operands[0]), groups, k, n, parts)


def _linear(
    c: Context, op: Op, heads: tuple[int, ...] | None, groups: int, k: int, n: int, parts: matrix.Parts
) -> None:
    (m,) = _taking(form_for(c, op), matrix.in_panels(c, op.operands[1], panel_width(n), parts))
    x = _rows(c, op.operands[0], m.packing, groups)
    c.lower(op, dense.grouped_linear, heads, groups, k, n, m.packing, args=[x, *m.args])


@dataclass(frozen=True)
class _Form:
    """How a product takes the rows of its operand 0; by default as float32. See `Packing`."""

    pieces: int = 0
    coded: bool = False


def form_for(c: Context, op: Op) -> _Form:
    """The form that an op, and the machine, ask for."""
    if c.simd not in (Simd.AVX512_BF16, Simd.AMX) or op.name not in _PRODUCTS:
        return _Form()
    if op.name in ("linear", "grouped_linear"):
        said, widths, matrices = op.attrs["inputs"], ints(op.operands[1])[1:], op.operands[1:2]
    else:
        *_, w13, w2 = op.operands
        said = {"bf16_rows": "bf16", "int8_rows": "int8"}.get(str(op.attrs.get("rounding")), "any")
        widths, matrices = ints(w2)[1:], [w13, w2]
    if said == "int8":
        return _Form(coded=_in_blocks(op) and all(map(matrix.has_integers, matrices)))
    if any(n % 2 for n in widths) or not all(map(_narrow, matrices)):
        return _Form()
    return _Form(1 if said == "bf16" else 3 if c.simd is Simd.AMX else 0)


def _in_blocks(op: Op) -> bool:
    """Whether the rounding in front of a product has a scale for every block of the product's columns."""
    x, rounding = op.operands[0], op.operands[0].producer
    if rounding is None or rounding.name != "round_values":
        return False
    attrs = rounding.attrs
    by_rule = (attrs["rule"], attrs["block"], attrs["channels"]) == ("int8", BLOCK, 0)
    if x.type.rank == 3:
        return by_rule
    return by_rule and ints(x)[-1] % BLOCK == 0 and ints(op.operands[1])[1] % BLOCK == 0


_PRODUCTS = frozenset({"linear", "grouped_linear", "expert_mlp", "expert_statistics"})


def _narrow(value: Value) -> bool:
    """Whether a weight is stored as BF16 numbers or as codes."""
    return value.type.dtype is DType.BF16 or matrix.is_packed(value)


def round_values(c: Context, op: Op) -> None:
    heads, d = rows_of(op.result)
    rule, channels = op.attrs["rule"], op.attrs["channels"] or d
    if rule == "int8" and _only_read_as(c, op, _Form(coded=True)):
        return  # products make their rows of what stands before it
    if rule != "bf16":
        c.lower(op, rounding.round_blocks, heads, d, rule, op.attrs["block"] or channels, channels)
    elif not _only_read_as(c, op, _Form(1)):
        c.lower(op, rounding.round_bf16, heads, d, channels)


def _only_read_as(c: Context, op: Op, form: _Form) -> bool:
    """Whether all that reads a rounding are products that take its rows in this form."""
    return bool(op.result.uses) and all(i == 0 and form_for(c, user) == form for user, i in op.result.uses)


def _rows(c: Context, x: Value, packing: Packing, groups: int = 1) -> Any:
    """Rows as a product takes them: the value, its pieces or codes; of a rounding, what stands before it."""
    if packing.coded:
        return _coded_rows(c, x, packing, groups)
    if not packing.pieces:
        return c.values[x]
    heads, d = rows_of(x)
    pieces, length = packing.pieces, row_length(packing, (heads or 1) * d)
    key = ("pieces", x, pieces, length)
    if key not in c.memo:
        kernel = c.kernel(rounding.bf16_rows, heads, d, pieces, length)
        shape = relax.TensorType([c.dim(n) for n in (pieces, *x.type.shape[:2], length)], "uint16")
        source = _before_rounding(x) if pieces == 1 else x
        (c.memo[key],) = c.call(kernel, [c.values[source]], shape)
    return c.memo[key]


def _coded_rows(c: Context, x: Value, packing: Packing, groups: int) -> Any:
    heads, d = rows_of(x)
    row = CodedRow.of(packing, (heads or 1) * d // groups)
    key = ("codes", x, row)
    if key not in c.memo:
        assert x.producer is not None
        kernel = c.kernel(rounding.coded_rows, heads, d, groups, row)
        shape = relax.TensorType([c.dim(n) for n in (1, *x.type.shape[:2], groups * row.words)], "uint32")
        (c.memo[key],) = c.call(kernel, [c.values[x.producer.operands[0]]], shape)
    return c.memo[key]


def _before_rounding(x: Value) -> Value:
    """What is rounded to BF16 to become x, where all of x is."""
    op = x.producer
    if op is None or op.name != "round_values" or op.attrs["rule"] != "bf16" or op.attrs["channels"]:
        return x
    return op.operands[0]


def _taking(form: _Form, *matrices: matrix.Matrix) -> tuple[matrix.Matrix, ...]:
    """The matrices for rows in this form; for rows of float32, where one of them has no such product."""
    found = tuple(
        replace(m, packing=replace(m.packing, pieces=form.pieces, coded=form.coded)) for m in matrices
    )
    return matrices if form.pieces > 1 and not all(by_tiles(m.packing) for m in found) else found


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
    rounded = {"bf16_rows": "bf16", "int8_rows": "int8"}.get(str(op.attrs.get("rounding")), "")
    key = ("routes", *operands, op.attrs["limit"], rounded)
    known: _Routes | None = c.memo.get(key)
    if known is not None:
        return known
    experts, k, inner = ints(w2)
    topk = ints(ids)[0]
    b, t = (c.dim(d) for d in x.type.shape[:2])
    routes = b * t * topk
    order, starts = c.call(
        c.kernel(dispatch.expert_order, experts, topk), [c.values[ids], c.values[n_valid]],
        relax.TensorType([routes], "int32"), relax.TensorType([experts + 1], "int32"),
    )  # fmt: skip
    first, second = _taking(
        form_for(c, op),
        matrix.in_panels(
            c, w13, 2 * dense.PAIR, lambda e: tuple(w.pair_rows(m, dense.PAIR) for m in matrix.entries(e))
        ),
        matrix.in_panels(c, w2, panel_width(k), matrix.entries),
    )
    rows, x_rows, h_rows = _rows(c, x, first.packing), Rows(first.packing, k), Rows(second.packing, inner)
    if by_tiles(first.packing):
        in_order = relax.TensorType([c.dim(x_rows.planes), routes, c.dim(x_rows.length)], x_rows.dtype)
        kernel = c.kernel(dispatch.expert_rows, k, topk, first.packing)
        (rows,) = c.call(kernel, [rows, order, starts], in_order)
    planes = [c.dim(h_rows.planes)] if h_rows.stored else []
    (hidden,) = c.call(
        c.kernel(
            dense.expert_hidden, experts, k, inner, topk, op.attrs["limit"], first.packing, second.packing,
            rounded,
        ),
        [rows, c.values[weights], order, starts, *first.args],
        relax.TensorType([*planes, routes, c.dim(h_rows.length)], h_rows.dtype),
    )
    c.memo[key] = found = _Routes(order, starts, hidden, second, (experts, k, inner, topk), routes)
    return found


def expert_mlp(c: Context, op: Op) -> None:
    if op.attrs["rounding"] not in ("none", "bf16_rows", "int8_rows"):
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
