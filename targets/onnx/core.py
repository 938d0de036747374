"""Lowerings of the `core` family: embedding, linear maps, norms, element-wise."""

from __future__ import annotations

from dsv4c.ir.graph import Op

from .lowering import Context, V, integer, number, size


def embed(g: Context, op: Op) -> V:
    """tokens [B,T], table [V,d] -> [B,T,d]."""
    tokens, table = g.tensors(op, 2)
    return g.op("Gather", table, tokens, axis=0)


def repeat_streams(g: Context, op: Op) -> V:
    """[B,T,d] -> [B,T,n,d]."""
    x = g.op("Unsqueeze", g.tensor(op, 0), [2])
    return g.op("Expand", x, [1, 1, integer(op, "n"), 1])


def linear(g: Context, op: Op) -> V:
    """x [...,K], w [N,K] -> [...,N]."""
    return g.matmul_t(g.tensor(op, 0), g.tensor(op, 1))


def grouped_linear(g: Context, op: Op) -> V:
    """x [B,T,H,D] seen as [B,T,G,K], w [G*r,K] -> [B,T,G*r]; one matrix product per group over all tokens."""
    x, w = g.tensors(op, 2)
    groups, (n, k) = integer(op, "groups"), (size(op, 1, 0), size(op, 1, 1))
    by_group = g.op("Transpose", g.reshape(x, -1, groups, k), perm=[1, 0, 2])
    y = g.matmul_t(by_group, g.reshape(w, groups, n // groups, k))
    return g.reshape(g.op("Transpose", y, perm=[1, 0, 2]), g.dim(x, 0), g.dim(x, 1), n)


def rms_norm(g: Context, op: Op) -> V:
    """x [...,D], w [D] -> [...,D]."""
    x, w = g.tensors(op, 2)
    return g.rms_norm(x, w, number(op, "eps"), size(op, 0, -1))


def unit_norm(g: Context, op: Op) -> V:
    """x [...,D] -> [...,D]."""
    return g.rms_norm(g.tensor(op, 0), None, number(op, "eps"), size(op, 0, -1))


def split_heads(g: Context, op: Op) -> V:
    """[B,T,H*D] -> [B,T,H,D]."""
    heads = integer(op, "heads")
    return g.reshape(g.tensor(op, 0), 0, 0, heads, size(op, 0, 2) // heads)


def merge_heads(g: Context, op: Op) -> V:
    """[B,T,H,D] -> [B,T,H*D]."""
    return g.reshape(g.tensor(op, 0), 0, 0, size(op, 0, 2) * size(op, 0, 3))


def add_bias(g: Context, op: Op) -> V:
    """x [...,N], bias [N] -> [...,N]."""
    return g.op("Add", *g.tensors(op, 2))


def add(g: Context, op: Op) -> V:
    """Two tensors of one shape."""
    return g.op("Add", *g.tensors(op, 2))


def scale(g: Context, op: Op) -> V:
    """Any shape."""
    return g.op("Mul", g.tensor(op, 0), number(op, "factor"))


def gather_rows(g: Context, op: Op) -> V:
    """x [B,T,d], rows [B,L] -> [B,L,d]."""
    return g.gather_rows(*g.tensors(op, 2))


def swiglu(g: Context, op: Op) -> V:
    """gate, up of one shape -> the same."""
    gate, up = g.tensors(op, 2)
    return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)


def clamped_swiglu(g: Context, op: Op) -> V:
    """gate, up of one shape -> the same."""
    return limited_swiglu(g, g.tensor(op, 0), g.tensor(op, 1), number(op, "limit"))


def limited_swiglu(g: Context, gate: V, up: V, limit: float) -> V:
    """silu(min(gate, limit)) clamp(up, -limit, limit)."""
    gate, up = g.op("Min", gate, limit), g.op("Clip", up, -limit, limit)
    return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
