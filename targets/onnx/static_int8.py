"""INT8 in fixed shapes: inputs rounded per token, and products of codes.

Where the dialect has no product of INT8 codes, the codes are decoded and the product is one of FLOAT: the
same numbers but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Op

from . import core
from .lowering import Context, V, integer
from .static import StaticContext

LARGEST = 127.0
BFLOAT16 = 27
"""How CANN names the type in attributes."""


@dataclass(frozen=True)
class Quantised:
    """Numbers as INT8 codes [N,K], a FLOAT scale per row [N], and the shape [...,K] that they stand for."""

    codes: V
    scales: V
    shape: tuple[int, ...]


def round_values(g: Context, op: Op) -> V:
    """x [...,K] -> x rounded: to BF16, or to 127 steps of the largest magnitude of each token, ties to even.

    Raises:
        TargetError: another rounding.
    """
    assert isinstance(g, StaticContext)
    rule = op.attrs["rule"], op.attrs["block"], integer(op, "channels")
    if rule == ("bf16", 0, 0):
        return _to_bf16(g, g.tensor(op, 0))
    if rule != ("int8", 0, 0):
        what = f"round_values by {op.attrs['rule']}, block {op.attrs['block']}"
        raise TargetError(f"{g.dialect.name} has no {what}", where=op.loc, allowed="int8 over rows, bf16")
    held = quantised(g, g.tensor(op, 0))
    whole = g.op("Reshape", held.codes, list(held.shape))
    result = g.decoded(whole, g.op("Reshape", held.scales, [*held.shape[:-1], 1]))
    g.quantised[result] = held
    return result


def _to_bf16(g: StaticContext, x: V) -> V:
    """x as FLOAT after a stay in BF16; one that has just come from there is left alone."""
    if x in g.halves:
        return x
    half = g.op("Cast", x, to=TensorProto.BFLOAT16)
    result = g.op("Cast", half, to=TensorProto.FLOAT)
    g.halves[result] = half
    return result


def quantised(g: StaticContext, x: V) -> Quantised:
    """The codes of x [...,K]; nodes that end up unread are dropped with the model."""
    sizes = g.shape_of(x)
    rows, width = prod(sizes[:-1]), sizes[-1]
    if "dynamic_quant" in g.dialect.vendor and x in g.halves:
        flat = g.op("Reshape", g.halves[x], [rows, width])
        types = [(TensorProto.INT8, (rows, width)), (TensorProto.FLOAT, (rows,))]
        codes, scales = g.vendor("dynamic_quant", [flat], types)
        return Quantised(codes, scales, sizes)
    flat = g.op("Reshape", x, [rows, width])
    top = g.op("ReduceMax", g.op("Abs", flat), [-1], keepdims=1)
    scale = g.op("Div", top, LARGEST)
    safe = g.op("Where", g.op("Greater", scale, 0.0), scale, 1.0)
    codes = g.op("Cast", g.op("Round", g.op("Div", flat, safe)), to=TensorProto.INT8)
    return Quantised(codes, g.op("Reshape", scale, [rows]), sizes)


def linear(g: Context, op: Op) -> V:
    """x [...,K], w [N,K] -> [...,N]; codes by codes where both are INT8 and the dialect multiplies them.

    Its product is in BF16, so it serves where the graph rounds the result to that.
    """
    assert isinstance(g, StaticContext)
    held = g.quantised.get(g.tensor(op, 0))
    if not g.is_packed(op, 1):
        return core.linear(g, op)
    codes = g.view(op, 1)
    n = g.shape_of(codes)[0]
    rounds = all(user.name == "round_values" and user.attrs["rule"] == "bf16" for user in op.result.users())
    if held is None or "int8_matmul" not in g.dialect.vendor or not rounds:
        x = g.tensor(op, 0)
        flat = g.op("Reshape", x, [prod(g.shape_of(x)[:-1]), g.shape_of(x)[-1]])
        y = g.op("Gemm", flat, g.op("Cast", codes, to=TensorProto.FLOAT), transB=1)
        y = g.op("Mul", y, g.scales(op, 1, n))
        return g.op("Reshape", y, [*g.shape_of(x)[:-1], n])
    rows = g.shape_of(held.codes)[0]
    inputs = [held.codes, codes, g.scales(op, 1, n), None, None, held.scales]
    types = [(TensorProto.BFLOAT16, (rows, n))]
    y = g.vendor("int8_matmul", inputs, types, dtype=BFLOAT16, transpose_x1=0, transpose_x2=1)[0]
    half = g.op("Reshape", y, [*held.shape[:-1], n])
    result = g.op("Cast", half, to=TensorProto.FLOAT)
    g.halves[result] = half
    return result
