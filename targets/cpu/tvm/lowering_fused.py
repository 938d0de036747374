"""How fused ops, and ops that are usually fused away, become kernel calls; part of `lowering.LOWERINGS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax

from dsv4c.ir import weights as w
from dsv4c.ir.graph import Op

from .context import Context, ints, is_bf16
from .kernels import border, fused, unfused


def split_columns(c: Context, op: Op) -> None:
    """A copy per part: a view with an offset is refused by kernels, and a row has few kilobytes."""
    (total,) = ints(op.operands[0])
    first = 0
    for part in op.results:
        (width,) = ints(part)
        kernel = c.kernel(fused.columns, total, first, width)
        (c.values[part],) = c.call(kernel, [c.values[op.operands[0]]], c.tensor(part.type))
        first += width


def norm_rotary(c: Context, op: Op) -> None:
    x, cos, sin, *weight = op.operands
    sizes = ints(x)
    heads, d = (sizes[0], sizes[1]) if x.type.rank == 4 else (None, sizes[-1])
    scale = c.weight(weight[0]) if weight else c.ones(d)
    args = [c.values[x], c.values[cos], c.values[sin], scale]
    c.lower(op, fused.norm_rotary, heads, d, ints(cos)[-1], op.attrs["eps"], bool(weight), args=args)


def entries_close(c: Context, op: Op) -> None:
    entries, kv, gate, kv_ring, gate_ring, weight, cos, sin, pos, n_valid = op.operands
    kernel = c.kernel(
        fused.entries_close, op.attrs["ratio"], ints(entries)[-1], op.attrs["overlap"], ints(cos)[-1],
        op.attrs["eps"],
    )  # fmt: skip
    args = [c.values[v] for v in (entries, kv, gate, kv_ring, gate_ring)]
    args += [c.weight(weight), *(c.values[v] for v in (cos, sin, pos, n_valid))]
    c.values[op.result] = c.update(kernel, args, 0, c.tensor(op.result.type))


def hc_pre(c: Context, op: Op) -> None:
    _border(c, op, border.hc_pre, 1)


def hc_post_pre(c: Context, op: Op) -> None:
    _border(c, op, border.hc_post_pre, 4)


def _border(c: Context, op: Op, factory: Callable[..., object], first: int) -> None:
    """The parameters stand from operand `first`; behind them perhaps the weights that collapse."""
    fn, base, scale, weight, *given = op.operands[first:]
    n, d = ints(op.operands[0])
    a = border.BorderShape(n, d, is_bf16(fn), given=bool(given), **op.attrs)  # type: ignore[arg-type]
    args = [c.values[v] for v in op.operands[:first]]
    args += [c.weight(fn, lambda e: w.panel(e, a.width)), *(c.weight(v) for v in (base, scale, weight))]
    args.append(c.values[given[0]] if given else relax.const(np.zeros((1, 1, n), np.float32)))
    b, t = (c.dim(s) for s in op.operands[0].type.shape[:2])
    types = [c.tensor(v.type) for v in op.results]
    own = [] if given else [relax.TensorType([b, t, c.dim(n)], "float32")]  # made, and read by nobody
    made = c.call(c.kernel(factory, a), args, *types, *own)
    c.values.update(zip(op.results, made, strict=False))


def add_route(c: Context, op: Op) -> None:
    c.lower(op, fused.add_route, ints(op.operands[0])[0], op.attrs["expert"])


def clamp(c: Context, op: Op) -> None:
    c.lower(op, unfused.clamp, ints(op.operands[0])[-1], op.attrs["low"], op.attrs["high"])


def swiglu(c: Context, op: Op) -> None:
    c.lower(op, unfused.swiglu, ints(op.operands[0])[-1])


def index_scores(c: Context, op: Op) -> None:
    rounded = op.attrs["rounding"] != "none"
    c.lower(op, unfused.index_scores, *ints(op.operands[0]), op.attrs["ratio"], rounded)


def index_topk(c: Context, op: Op) -> None:
    c.lower(op, unfused.index_topk, op.attrs["k"], op.attrs["ascending"])


FUSED_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "split_columns": split_columns, "norm_rotary": norm_rotary, "entries_close": entries_close,
    "hc_pre": hc_pre, "hc_post_pre": hc_post_pre, "add_route": add_route, "clamp": clamp, "swiglu": swiglu,
    "index_scores": index_scores, "index_topk": index_topk,
}  # fmt: skip
"""What this file adds to the emitter."""
