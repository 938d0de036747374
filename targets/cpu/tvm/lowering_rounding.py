"""How the rounding ops and attributes become kernel calls; merged into the table by `lowering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from dsv4c.ir import weights as w
from dsv4c.ir.graph import Op, Value
from dsv4c.ir.types import f32
from dsv4c.ir.weights import WeightExpr

from .context import Context, ints, is_bf16
from .kernels import attend, dispatch, rounded_attention, rounding, unfused
from .kernels.vec import LANES


def rows_of(value: Value) -> tuple[int | None, int]:
    """(heads, d) of [B,T,heads,d], or (None, d) of [B,T,d]."""
    sizes = ints(value)
    return (sizes[0], sizes[1]) if value.type.rank == 4 else (None, sizes[-1])


def hadamard(c: Context, op: Op) -> None:
    c.lower(op, rounding.hadamard, *rows_of(op.result))


def unit_norm_in_steps(c: Context, op: Op) -> None:
    c.lower(op, rounding.norm_in_steps, *rows_of(op.result), op.attrs["eps"])


def attention_in_blocks(c: Context, op: Op, shape: attend.AttentionShape, args: list[Any]) -> None:
    c.lower(op, rounded_attention.attention_in_blocks, shape, args=args)


def index_select_in_order(c: Context, op: Op) -> None:
    """Among blocks every score is kept between kernels of its own."""
    shape, k, ascending = (*ints(op.operands[0]), op.attrs["ratio"]), op.attrs["k"], op.attrs["ascending"]
    if len(op.operands) == 5:
        c.lower(op, rounded_attention.index_select_in_order, *shape, k, ascending)
        return
    q, _, keys, _, _, blocks = op.operands
    scores = c.tensor(f32(*q.type.shape[:2], keys.type.shape[1]))
    args = [c.values[v] for v in op.operands]
    found = c.call(c.kernel(unfused.index_scores, *shape, True), args[:5], scores)
    restrict = c.kernel(unfused.index_restrict, op.attrs["size"], *ints(blocks))
    found = c.call(restrict, [*found, args[5]], scores)
    c.lower(op, unfused.index_topk, k, ascending, args=found)


def rounded_expert_mlp(c: Context, op: Op) -> None:
    """`expert_mlp` with rounding: each product, the hidden values and the sum are kernels of their own."""
    x, ids, weights, n_valid, w13, w2 = op.operands
    experts, d, inner = ints(w2)
    topk = ints(ids)[0]
    b, t = (c.dim(s) for s in x.type.shape[:2])
    routes = b * t * topk

    def rows(width: int) -> Any:
        return relax.TensorType([c.dim(1), routes, c.dim(width)], "float32")

    order, starts = c.call(
        c.kernel(dispatch.expert_order, experts, topk), [c.values[ids], c.values[n_valid]],
        relax.TensorType([routes], "int32"), relax.TensorType([c.dim(experts + 1)], "int32"),
    )  # fmt: skip
    product = c.kernel(rounding.expert_product, experts, d, 2 * inner, topk, is_bf16(w13), True)
    (both,) = c.call(product, [c.values[x], order, starts, c.weight(w13, _panels)], rows(2 * inner))
    gated = c.kernel(rounding.expert_gated, experts, inner, topk, op.attrs["limit"])
    (hidden,) = c.call(gated, [both, c.values[weights], order, starts], rows(inner))
    if op.attrs["rounding"] == "e4m3":
        quantise = c.kernel(rounding.round_blocks, None, inner, "e4m3", op.attrs["block"] or inner, inner)
        (hidden,) = c.call(quantise, [hidden], rows(inner))
    product = c.kernel(rounding.expert_product, experts, inner, d, topk, is_bf16(w2), False)
    (outputs,) = c.call(product, [hidden, order, starts, c.weight(w2, _panels)], rows(d))
    add = c.kernel(rounding.expert_sum, experts, d, topk)
    (c.values[op.result],) = c.call(add, [outputs, order, starts], c.tensor(op.result.type))


def _panels(expr: WeightExpr) -> WeightExpr:
    """[experts, n, k] as [experts, panels, k, 16], streamed one expert at a time."""
    entries = expr.args if expr.op == "stack" else tuple(w.take(expr, e) for e in range(expr.shape[0]))
    return w.stack(tuple(w.panel(e, LANES) for e in entries))


ROUNDING_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "hadamard": hadamard,
}  # fmt: skip
"""Ops of the `rounding` family."""
