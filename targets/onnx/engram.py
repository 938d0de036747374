"""Lowering of the gate of Engram layers; what is looked up comes in as an input, see `host`."""

from __future__ import annotations

from dsv4c.ir.graph import Op

from .lowering import Context, V, number, size


def engram_gate(g: Context, op: Op) -> V:
    """streams [B,T,n,d], kv [B,T,(n+1)d], q_weight, k_weight [n,d], ids? [B,T] -> [B,T,n,d]."""
    x, kv, q_weight, k_weight = g.tensors(op, 4)
    n, d = size(op, 0, 2), size(op, 0, 3)
    keys, value = g.multi("Split", 2, kv, [n * d, d], axis=-1)
    key, value = g.reshape(keys, 0, 0, n, d), g.op("Unsqueeze", value, [2])
    both = g.op("Mul", g.op("Mul", x, g.op("Mul", q_weight, k_weight)), key)
    dot = g.op("ReduceSum", both, [3], keepdims=1)
    spread = g.op("Mul", _root_mean_square(g, op, x), _root_mean_square(g, op, key))
    delta = g.op("Div", g.op("Mul", dot, d**-0.5), spread)
    root = g.op("Sqrt", g.op("Max", g.op("Abs", delta), number(op, "floor")))
    signed = g.op("Where", g.op("Less", delta, 0.0), g.op("Neg", root), root)
    if not op.attrs["copysign"]:
        signed = g.op("Where", g.op("Equal", delta, 0.0), 0.0, signed)
    out = g.op("Mul", g.op("Sigmoid", signed), value)
    if len(op.operands) > 4:
        dead = g.op("Less", g.tensor(op, 4), 0)
        out = g.op("Where", g.op("Unsqueeze", dead, [2, 3]), 0.0, out)
    return g.op("Add", x, out) if op.attrs["residual"] else out


def _root_mean_square(g: Context, op: Op, x: V) -> V:
    """sqrt(mean x^2 + eps) over the last axis, kept as one."""
    mean = g.op("Mul", g.op("ReduceSumSquare", x, [-1], keepdims=1), 1.0 / size(op, 0, 3))
    return g.op("Sqrt", g.op("Add", mean, number(op, "eps")))
