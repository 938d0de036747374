"""Linear maps in fixed shapes, by what their weights are held in: numbers, FP16, or codes with scales."""

from __future__ import annotations

from math import prod

from onnx import TensorProto

from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op

from . import core, static_bf16, static_codes, static_int8
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
    if half is None and (rows := _bf16_of(g, op)) is not None:
        return _fp8_product(g, op, rows)
    if half is None and _in_bf16(g, op):
        return static_bf16.linear(g, op)
    x, w = (g.tensor(op, 0), g.tensor(op, 1)) if half is None else (half, g.view(op, 1))
    *lead, width = g.shape_of(x)
    y = g.op("Gemm", g.op("Reshape", x, [prod(lead), width]), w, transB=1)
    return _whole(g, g.op("Reshape", y, [*lead, size(op, 1, 0)]))


def grouped_linear(g: Context, op: Op) -> V:
    """x [B,T,H,D] seen as [B,T,G,K], w [G*r,K] -> [B,T,G*r]; see `core.grouped_linear`."""
    assert isinstance(g, StaticContext)
    half = half_of(g, op)
    if half is None and _in_bf16(g, op):
        return static_bf16.grouped(g, op, integer(op, "groups"))
    if half is None:
        return core.grouped_linear(g, op)
    (b, t), groups = g.shape_of(half)[:2], integer(op, "groups")
    n, k = size(op, 1, 0), size(op, 1, 1)
    by_group = g.op("Transpose", g.op("Reshape", half, [b * t, groups, k]), perm=[1, 0, 2])
    matrices = g.op("Transpose", g.view(op, 1, groups, n // groups, k), perm=[0, 2, 1])
    y = g.op("Transpose", g.op("MatMul", by_group, matrices), perm=[1, 0, 2])
    return _whole(g, g.op("Reshape", y, [b, t, n]))


def _bf16_of(g: StaticContext, op: Op) -> V | None:
    """The input of a product by E4M3 codes as BFLOAT16, where the dialect has that product and it fits.

    It fits where scales are powers of two, so that a matrix decoded to BFLOAT16 is exact, blocks fill the
    rows, and input and result are rounded to BFLOAT16.
    """
    scheme, half = g.scheme(op, 1), g.halves.get(g.tensor(op, 0))
    if scheme is None or half is None or "fp8_matmul" not in g.dialect.vendor:
        return None
    n, k = size(op, 1, 0), size(op, 1, 1)
    fits = scheme.code is DType.F8E4M3 and scheme.scale is DType.F8E8M0 and k % scheme.tile(n, k)[1] == 0
    narrow = g.element_of(half) == TensorProto.BFLOAT16 and _result_rounds(op, "bf16")
    return half if fits and narrow and g.element_of(g.view(op, 1)) == TensorProto.FLOAT8E4M3FN else None


def _in_bf16(g: StaticContext, op: Op) -> bool:
    """Whether the dialect multiplies BFLOAT16, and input and result of a product by codes are such."""
    exact = "bf16_matmul" in g.dialect.vendor and static_bf16.is_exact(g, op, 1)
    return exact and static_bf16.is_bf16(g, g.tensor(op, 0)) and _result_rounds(op, "bf16")


def _fp8_product(g: StaticContext, op: Op, rows: V) -> V:
    """rows BFLOAT16 [...,K], E4M3 codes [N,K] -> [...,N], kept as BFLOAT16 too."""
    scheme, n, k = g.scheme(op, 1), size(op, 1, 0), size(op, 1, 1)
    assert scheme is not None
    *lead, _ = g.shape_of(rows)
    flat = g.op("Reshape", rows, [prod(lead), k])
    scales = static_codes.by_row(g, g.scales(op, 1), scheme, n, k)
    types = [(TensorProto.BFLOAT16, (prod(lead), n))]
    y = g.vendor("fp8_matmul", [flat, g.view(op, 1), scales], types, block_size=scheme.tile(n, k)[1])[0]
    return _whole(g, g.op("Reshape", y, [*lead, n]))


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
