"""Hyper-connections in fixed shapes: one node where the dialect has it."""

from __future__ import annotations

from onnx import TensorProto

from dsv4c.ir.graph import Op

from . import hyper
from .lowering import Context, V
from .static import StaticContext


def hc_collapse(g: Context, op: Op) -> V:
    """streams [B,T,n,d], pre [B,T,n] -> [B,T,d]. Role "collapse_streams": the same operands."""
    assert isinstance(g, StaticContext)
    if "collapse_streams" not in g.dialect.vendor:
        return hyper.hc_collapse(g, op)
    streams, pre = g.tensors(op, 2)
    b, t, _, d = g.shape_of(streams)
    return _node(g, "collapse_streams", [streams, pre], (b, t, d))


def hc_expand(g: Context, op: Op) -> V:
    """streams [B,T,n,d], y [B,T,d], post [B,T,n], comb [B,T,n,n] -> [B,T,n,d]. Role "expand_streams"."""
    assert isinstance(g, StaticContext)
    if "expand_streams" not in g.dialect.vendor:
        return hyper.hc_expand(g, op)
    return _node(g, "expand_streams", g.tensors(op, 4), g.shape_of(g.tensor(op, 0)))


def _node(g: StaticContext, role: str, inputs: list[V], shape: tuple[int, ...]) -> V:
    """A node of a role with one FLOAT output."""
    return g.vendor(role, inputs, [(TensorProto.FLOAT, shape)])[0]
