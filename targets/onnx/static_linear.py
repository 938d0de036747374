"""Linear maps in fixed shapes, by what their weights are held in: numbers, FP16, or codes with scales."""

from __future__ import annotations

from math import prod

from onnx import TensorProto

from dsv4c.ir.graph import Op

from . import core, static_int8
from .lowering import Context, V, integer, size
from .static import StaticContext
from .static_rounding import NARROW


def linear(g: Context, op: Op) -> V:
    """x [...,K], w [N,K] -> [...,N]."""
    assert isinstance(g, StaticContext)
    scheme = g.scheme(op, 1)
    if scheme is not None and scheme.name == "int8":
        return static_int8.linear(g, op, _result_rounds(op, "bf16"))
    half = half_of(g, op)
    if half is None and scheme is None:
        return core.linear(g, op)
    x, w = (g.tensor(op, 0), g.tensor(op, 1)) if half is None else (half, g.view(op, 1))
    *lead, width = g.shape_of(x)
    y = g.op("Gemm", g.op("Reshape", x, [prod(lead), width]), w, transB=1)
    return _whole(g, g.op("Reshape", y, [*lead, size(op, 1, 0)]))


def grouped_linear(g: Context, op: Op) -> V:
    """x [B,T,H,D] seen as [B,T,G,K], w [G*r,K] -> [B,T,G*r]; see `core.grouped_linear`."""
    assert isinstance(g, StaticContext)
    half = half_of(g, op)
    if half is None:
        return core.grouped_linear(g, op)
    (b, t), groups = g.shape_of(half)[:2], integer(op, "groups")
    n, k = size(op, 1, 0), size(op, 1, 1)
    by_group = g.op("Transpose", g.op("Reshape", half, [b * t, groups, k]), perm=[1, 0, 2])
    matrices = g.op("Transpose", g.view(op, 1, groups, n // groups, k), perm=[0, 2, 1])
    y = g.op("Transpose", g.op("MatMul", by_group, matrices), perm=[1, 0, 2])
    return _whole(g, g.op("Reshape", y, [b, t, n]))


def half_of(g: StaticContext, op: Op) -> V | None:
    """The input of a product as FLOAT16, where both factors and the result are rounded to that.

    A reshape stands between a product and the casts around it: ONNX Runtime drops casts to FLOAT16 and back
    that touch a single such node, and with them the rounding.
    """
    half = g.halves.get(g.tensor(op, 0))
    if half is None or g.element_of(half) != TensorProto.FLOAT16 or not g.is_half(op, 1):
        return None
    return half if _result_rounds(op, "fp16") else None


def _whole(g: StaticContext, y: V) -> V:
    """A result as FLOAT; what it was is kept where that was narrower."""
    if g.element_of(y) not in NARROW.values():
        return y
    result = g.op("Cast", y, to=TensorProto.FLOAT)
    g.halves[result] = y
    return result


def _result_rounds(op: Op, rule: str) -> bool:
    """Whether every reader of a result rounds it by a rule."""
    users = op.result.users()
    return bool(users) and all(u.name == "round_values" and u.attrs["rule"] == rule for u in users)
