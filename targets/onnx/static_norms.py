"""Norms and rotary in fixed shapes: one node where the dialect has it, else standard ones.

A dialect says so by a role of `Dialect.vendor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from .graph import V

if TYPE_CHECKING:
    from .static import StaticContext


def rms_norm(g: StaticContext, x: V, weight: V | None, eps: float, width: int) -> V:
    """x [...,D], weight [D] or none -> [...,D]. Role "rms_norm": weight and epsilon, result first."""
    if node := g.dialect.vendor.get("rms_norm"):
        gamma = weight or g.op("Expand", 1.0, [width])
        types = [(TensorProto.FLOAT, g.shape_of(x)), *[None] * (len(node.outputs) - 1)]
        return g.vendor("rms_norm", [x, gamma], types, epsilon=eps)[0]
    mean = g.op("ReduceMean", g.op("Mul", x, x), [-1], keepdims=1)
    y = g.op("Mul", x, g.op("Div", 1.0, g.op("Sqrt", g.op("Add", mean, eps))))
    return g.op("Mul", y, weight) if weight else y


def rotate(g: StaticContext, x: V, cos: V, sin: V, width: int, heads: int) -> V:
    """x [B,N,(H,)R], cos and sin [B,N,R/2] -> x with its neighbouring channels turned.

    Roles: "rotary" takes every angle twice [B,N,1,R], "rotary_embedding" once, and heads side by side.
    """
    sizes, vendor = g.shape_of(x), g.dialect.vendor
    b, n = sizes[:2]
    shape = (b, n, heads, width) if "rotary" in vendor else (b, n, heads * width)
    types = [(TensorProto.FLOAT, shape)]
    if "rotary" in vendor:
        twice = [_repeated(g, angle, b, n, width) for angle in (cos, sin)]
        turned = g.vendor("rotary", [g.op("Reshape", x, list(shape)), *twice], types, mode=1)[0]
    elif "rotary_embedding" in vendor:
        flat = g.op("Reshape", x, list(shape))
        turned = g.vendor("rotary_embedding", [flat, cos, sin], types, interleaved=1, num_heads=heads)[0]
    else:
        turned = _turned(g, g.op("Reshape", x, [b, n, heads, width // 2, 2]), cos, sin)
    return g.op("Reshape", turned, list(sizes))


def _repeated(g: StaticContext, angle: V, b: int, n: int, r: int) -> V:
    """[B,N,R/2] -> [B,N,1,R], every angle twice."""
    pairs = g.op("Expand", g.op("Reshape", angle, [b, n, 1, r // 2, 1]), [b, n, 1, r // 2, 2])
    return g.op("Reshape", pairs, [b, n, 1, r])


def _turned(g: StaticContext, pairs: V, cos: V, sin: V) -> V:
    """pairs [B,N,H,R/2,2] by angles [B,N,R/2]."""
    b, n, _, half, _ = g.shape_of(pairs)
    cos, sin = (g.op("Reshape", angle, [b, n, 1, half, 1]) for angle in (cos, sin))
    even, odd = g.multi("Split", 2, pairs, [1, 1], axis=-1)
    left = g.op("Sub", g.op("Mul", even, cos), g.op("Mul", odd, sin))
    right = g.op("Add", g.op("Mul", even, sin), g.op("Mul", odd, cos))
    return g.op("Concat", left, right, axis=-1)
