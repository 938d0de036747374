"""Lowerings of the hyper-connection ops."""

from __future__ import annotations

from dsv4c.ir.graph import Op

from .lowering import Context, V, integer, number, size


def hc_mix(g: Context, op: Op) -> tuple[V, V, V]:
    """streams [B,T,n,d], fn [(2+n)n, n*d], base [(2+n)n], scale [3] -> [B,T,n], [B,T,n], [B,T,n,n]."""
    _, _, base, scale = g.tensors(op, 4)
    n, eps = size(op, 0, 2), number(op, "eps")
    owner = [0] * n + [1] * n + [2] * (n * n)
    mixed = g.op("Add", g.op("Mul", _project(g, op), g.op("Gather", scale, owner)), base)
    pre, post, comb = g.multi("Split", 3, mixed, [n, n, n * n], axis=-1)
    pre = g.op("Add", g.op("Sigmoid", pre), eps)
    post = g.op("Mul", g.op("Sigmoid", post), 2.0)
    comb = g.op("Add", g.op("Softmax", g.reshape(comb, 0, 0, n, n), axis=-1), eps)
    comb = _normalise(g, comb, -2, eps)
    for _ in range(integer(op, "iters") - 1):
        comb = _normalise(g, _normalise(g, comb, -1, eps), -2, eps)
    return pre, post, comb


def _normalise(g: Context, comb: V, axis: int, eps: float) -> V:
    return g.op("Div", comb, g.op("Add", g.op("ReduceSum", comb, [axis], keepdims=1), eps))


def _project(g: Context, op: Op) -> V:
    """streams [B,T,n,d], fn [m,n*d] -> [B,T,m]: fn applied to the flat streams, then their norm."""
    streams, fn = g.tensors(op, 2)
    width = size(op, 0, 2) * size(op, 0, 3)
    flat = g.reshape(streams, 0, 0, width)
    mean = g.op("Mul", g.op("ReduceSumSquare", flat, [-1], keepdims=1), 1.0 / width)
    norm = g.op("Sqrt", g.op("Add", mean, number(op, "norm_eps")))
    return g.op("Div", g.matmul_t(flat, fn), norm)


def hc_head_mix(g: Context, op: Op) -> V:
    """streams [B,T,n,d], fn [n,n*d], base [n], scale [1] -> [B,T,n]."""
    _, _, base, scale = g.tensors(op, 4)
    mixed = g.op("Add", g.op("Mul", _project(g, op), scale), base)
    return g.op("Add", g.op("Sigmoid", mixed), number(op, "eps"))


def hc_collapse(g: Context, op: Op) -> V:
    """streams [B,T,n,d], pre [B,T,n] -> [B,T,d]."""
    streams, pre = g.tensors(op, 2)
    return g.op("Squeeze", g.op("MatMul", g.op("Unsqueeze", pre, [2]), streams), [2])


def hc_expand(g: Context, op: Op) -> V:
    """streams [B,T,n,d], y [B,T,d], post [B,T,n], comb [B,T,n,n] -> [B,T,n,d]."""
    streams, y, post, comb = g.tensors(op, 4)
    kept = g.op("MatMul", g.op("Transpose", comb, perm=[0, 1, 3, 2]), streams)
    return g.op("Add", g.op("Mul", g.op("Unsqueeze", post, [-1]), g.op("Unsqueeze", y, [2])), kept)
