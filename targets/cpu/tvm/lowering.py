"""How each TARGET op becomes kernel calls: one small function per op, one literal table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from dsv4c.ir import weights as w
from dsv4c.ir.graph import Op
from dsv4c.ir.weights import WeightExpr

from . import matrix
from .context import Context, ints
from .kernels import attend, compress, dense, hyper, route, rowwise, select, state
from .lowering_engram import ENGRAM_LOWERINGS
from .lowering_engram_store import ENGRAM_STORE_LOWERINGS
from .lowering_fused import FUSED_LOWERINGS
from .lowering_products import PRODUCT_LOWERINGS
from .lowering_rounding import (
    ROUNDING_LOWERINGS,
    attention_in_blocks,
    index_select_in_order,
    unit_norm_in_steps,
)
from .lowering_v41 import V41_LOWERINGS, index_select_in_blocks, route_topk_of_images

Lowering = Callable[[Context, Op], None]


def _args(c: Context, op: Op) -> list[Any]:
    return [c.values[v] for v in op.operands]


def _panels(expr: WeightExpr, width: int) -> WeightExpr:
    return w.panel(expr, width)


def weight(c: Context, op: Op) -> None:
    """Nothing: a weight becomes a parameter when a kernel asks for it in its layout."""


def embed(c: Context, op: Op) -> None:
    tokens, table = op.operands
    m = matrix.in_rows(c, table)
    c.lower(op, dense.embed, *ints(table), m.packing, args=[c.values[tokens], *m.args])


def repeat_streams(c: Context, op: Op) -> None:
    c.lower(op, rowwise.repeat_streams, op.attrs["n"], ints(op.operands[0])[-1])


def rms_norm(c: Context, op: Op) -> None:
    x, weight_ = op.operands
    heads, d = _rows_of(op)
    c.lower(op, rowwise.norm, heads, d, op.attrs["eps"], True, args=[c.values[x], c.weight(weight_)])


def unit_norm(c: Context, op: Op) -> None:
    if op.attrs["rounding"] != "none":
        return unit_norm_in_steps(c, op)
    heads, d = _rows_of(op)
    c.lower(op, rowwise.norm, heads, d, op.attrs["eps"], False, args=[c.values[op.operands[0]], c.ones(d)])


def _rows_of(op: Op) -> tuple[int | None, int]:
    """(heads, d) of [B,T,heads,d], or (None, d) of [B,T,d]."""
    sizes = ints(op.operands[0])
    return (sizes[0], sizes[1]) if op.operands[0].type.rank == 4 else (None, sizes[-1])


def split_heads(c: Context, op: Op) -> None:
    shape = relax.ShapeExpr([c.dim(d) for d in op.result.type.shape])
    c.values[op.result] = c.builder.emit(relax.op.memory.view(c.values[op.operands[0]], shape))


def scale(c: Context, op: Op) -> None:
    c.lower(op, rowwise.unary, ints(op.operands[0])[-1], "scale", op.attrs["factor"])


def sqrt_softplus(c: Context, op: Op) -> None:
    c.lower(op, rowwise.unary, ints(op.operands[0])[-1], "sqrt_softplus")


def add(c: Context, op: Op) -> None:
    if op.result.type.rank == 4:
        c.lower(op, rowwise.add_streams, *ints(op.operands[0]))
        return
    c.lower(op, rowwise.binary, ints(op.operands[0])[-1], "add")


def clamped_swiglu(c: Context, op: Op) -> None:
    c.lower(op, rowwise.binary, ints(op.operands[0])[-1], "clamped_swiglu", op.attrs["limit"])


def gather_rows(c: Context, op: Op) -> None:
    c.lower(op, rowwise.gather_rows, ints(op.operands[0])[-1])


def positions(c: Context, op: Op) -> None:
    c.lower(op, state.positions)


def entry_positions(c: Context, op: Op) -> None:
    c.lower(op, state.entry_positions, op.attrs["ratio"])


def advance(c: Context, op: Op) -> None:
    c.values[op.result] = c.update(c.kernel(state.advance), _args(c, op), 0, c.tensor(op.result.type))


def ring_write(c: Context, op: Op) -> None:
    kernel = c.kernel(state.ring_write, *ints(op.operands[0]))
    c.values[op.result] = c.update(kernel, _args(c, op), 0, c.tensor(op.result.type))


def entries_append(c: Context, op: Op) -> None:
    kernel = c.kernel(state.entries_append, op.attrs["ratio"], ints(op.operands[0])[-1])
    c.values[op.result] = c.update(kernel, _args(c, op), 0, c.tensor(op.result.type))


def rope_angles(c: Context, op: Op) -> None:
    args = [c.values[op.operands[0]], c.weight(op.operands[1])]
    c.lower(op, rowwise.rope_angles, ints(op.operands[1])[0], args=args)


def rotary(c: Context, op: Op) -> None:
    heads, d = _rows_of(op)
    attrs = op.attrs["inverse"], op.attrs["halves"]
    c.lower(op, rowwise.rotary, heads, d, ints(op.operands[1])[-1], *attrs)


def position_bias(c: Context, op: Op) -> None:
    x, bias, pos = op.operands
    c.lower(op, compress.position_bias, *ints(bias), args=[c.values[x], c.weight(bias), c.values[pos]])


def compress_(c: Context, op: Op) -> None:
    c.lower(op, compress.compress, op.attrs["ratio"], ints(op.result)[-1], op.attrs["overlap"])


def index_select(c: Context, op: Op) -> None:
    if op.attrs["rounding"] != "none":
        return index_select_in_order(c, op)
    if len(op.operands) > 5:
        return index_select_in_blocks(c, op)
    heads, d = ints(op.operands[0])
    c.lower(op, select.index_select, heads, d, op.attrs["ratio"], op.attrs["k"])


def attention(c: Context, op: Op) -> None:
    q, kv, ring, sinks, pos, n_valid, *more = op.operands
    heads, d = ints(q)
    window, scale_, ratio = (op.attrs[n] for n in ("window", "scale", "ratio"))
    assert isinstance(window, int) and isinstance(scale_, float) and isinstance(ratio, int)
    selected = ints(more[1])[0] if len(more) > 1 else 0
    shape = attend.AttentionShape(heads, d, window, scale_, ratio if more else 0, selected, len(more) > 2)
    args = [c.values[q], c.values[kv], c.values[ring], c.weight(sinks), c.values[pos], c.values[n_valid]]
    args.append(c.values[more[0]] if more else c.values[ring])  # never read without a ratio
    args.append(c.values[more[1]] if len(more) > 1 else _no_selection(c, q))
    if op.attrs["rounding"] != "none":
        return attention_in_blocks(c, op, shape, args)
    args.append(c.values[more[2] if len(more) > 2 else pos])  # never read without a start
    c.lower(op, attend.attention, shape, args=args)


def _no_selection(c: Context, q: Any) -> Any:
    """One dummy selection per module; never read."""
    if "no_selection" not in c.shared:
        b, t = (c.dim(d) for d in q.type.shape[:2])
        kernel = c.kernel(state.no_selection)
        result = relax.TensorType([b, t, c.dim(1)], "int32")
        (c.shared["no_selection"],) = c.call(kernel, [c.shared["tokens"]], result)
    return c.shared["no_selection"]


def hc_mix(c: Context, op: Op) -> None:
    n, d = ints(op.operands[0])
    a = op.attrs
    c.lower(op, hyper.hc_mix, n, d, a["eps"], a["norm_eps"], a["iters"], args=_hc_args(c, op))


def hc_head_mix(c: Context, op: Op) -> None:
    n, d = ints(op.operands[0])
    c.lower(op, hyper.hc_head_mix, n, d, op.attrs["eps"], op.attrs["norm_eps"], args=_hc_args(c, op))


def _hc_args(c: Context, op: Op) -> list[Any]:
    streams, fn, base, scale_ = op.operands
    width = hyper.projection_width(ints(fn)[0])
    return [c.values[streams], c.weight(fn, lambda e: _panels(e, width)), c.weight(base), c.weight(scale_)]


def hc_collapse(c: Context, op: Op) -> None:
    c.lower(op, hyper.hc_collapse, *ints(op.operands[0]))


def hc_expand(c: Context, op: Op) -> None:
    c.lower(op, hyper.hc_expand, *ints(op.operands[0]))


def route_topk(c: Context, op: Op) -> None:
    if len(op.operands) > 2:
        return route_topk_of_images(c, op)
    scores, bias = op.operands
    c.lower(op, route.route_topk, ints(scores)[0], op.attrs["k"], args=[c.values[scores], c.weight(bias)])


def route_hash(c: Context, op: Op) -> None:
    tokens, table = op.operands
    c.lower(op, route.route_hash, *ints(table), args=[c.values[tokens], c.weight(table)])


def route_weights(c: Context, op: Op) -> None:
    scores, ids = op.operands
    c.lower(op, route.route_weights, ints(scores)[0], ints(ids)[0], op.attrs["factor"], op.attrs["eps"])


LOWERINGS: dict[str, Lowering] = {
    "weight": weight, "embed": embed, "repeat_streams": repeat_streams,
    "rms_norm": rms_norm, "unit_norm": unit_norm,
    "split_heads": split_heads, "add": add, "scale": scale, "sqrt_softplus": sqrt_softplus,
    "clamped_swiglu": clamped_swiglu, "gather_rows": gather_rows, "positions": positions,
    "entry_positions": entry_positions, "advance": advance, "ring_write": ring_write,
    "entries_append": entries_append, "rope_angles": rope_angles, "rotary": rotary,
    "position_bias": position_bias, "compress": compress_, "index_select": index_select,
    "attention": attention, "hc_mix": hc_mix, "hc_collapse": hc_collapse, "hc_expand": hc_expand,
    "hc_head_mix": hc_head_mix, "route_topk": route_topk, "route_hash": route_hash,
    "route_weights": route_weights,
    **PRODUCT_LOWERINGS, **FUSED_LOWERINGS, **ENGRAM_LOWERINGS, **ENGRAM_STORE_LOWERINGS,
    **ROUNDING_LOWERINGS, **V41_LOWERINGS,
}  # fmt: skip
"""Every op this emitter takes."""
