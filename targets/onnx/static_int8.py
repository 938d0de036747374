"""INT8 in fixed shapes: the codes of a value, and products of codes.

Where the dialect has no product of INT8 codes, the codes are decoded and the product is one of FLOAT: the
same numbers but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from onnx import TensorProto

from dsv4c.ir.graph import Op

from .lowering import V
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


def quantised(g: StaticContext, x: V) -> Quantised:
    """The codes of x [...,K]; nodes that end up unread are dropped with the model."""
    sizes = g.shape_of(x)
    rows, width = prod(sizes[:-1]), sizes[-1]
    half = g.halves.get(x)
    if "dynamic_quant" in g.dialect.vendor and half and g.element_of(half) == TensorProto.BFLOAT16:
        flat = g.op("Reshape", half, [rows, width])
        types = [(TensorProto.INT8, (rows, width)), (TensorProto.FLOAT, (rows,))]
        codes, scales = g.vendor("dynamic_quant", [flat], types)
        return Quantised(codes, scales, sizes)
    flat = g.op("Reshape", x, [rows, width])
    top = g.op("ReduceMax", g.op("Abs", flat), [-1], keepdims=1)
    scale = g.op("Div", top, LARGEST)
    safe = g.op("Where", g.op("Greater", scale, 0.0), scale, 1.0)
    codes = g.op("Cast", g.op("Round", g.op("Div", flat, safe)), to=TensorProto.INT8)
    return Quantised(codes, g.op("Reshape", scale, [rows]), sizes)


def linear(g: StaticContext, op: Op, rounds: bool) -> V:
    """x [...,K], w [N,K] in INT8 -> [...,N]; codes by codes where x has some and the dialect multiplies them.

    Args:
        rounds: whether the graph rounds the result to BF16, which is what that product gives.
    """
    held = g.quantised.get(g.tensor(op, 0))
    codes = g.view(op, 1)
    n = g.shape_of(codes)[0]
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
