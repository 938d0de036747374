"""Hyper-connections and the gate of Engram layers in fixed shapes: one node where the dialect has it."""

from __future__ import annotations

from onnx import TensorProto

from dsv4c.ir.graph import Op

from . import engram, hyper
from .lowering import Context, V, number, size
from .static import StaticContext

SIGNED_FLOOR = 1e-6
"""The least magnitude below the root of an Engram gate that the node knows."""


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


def engram_gate(g: Context, op: Op) -> V:
    """See `engram.engram_gate`. Role "engram_gate": the value behind its gate, for the floor and the sign at
    zero that the node knows; ids and the residual stay nodes of the graph."""
    assert isinstance(g, StaticContext)
    fits = number(op, "floor") == SIGNED_FLOOR and not op.attrs["copysign"]
    if "engram_gate" not in g.dialect.vendor or not fits:
        return engram.engram_gate(g, op)
    x, kv, q_weight, k_weight = g.tensors(op, 4)
    n, d = size(op, 0, 2), size(op, 0, 3)
    keys, value = g.multi("Split", 2, kv, [n * d, d], axis=-1)
    inputs = [g.reshape(keys, 0, 0, n, d), x, value, k_weight, q_weight]
    return engram.placed(g, op, _node(g, "engram_gate", inputs, g.shape_of(x), epsilon=number(op, "eps")))


def _node(g: StaticContext, role: str, inputs: list[V], shape: tuple[int, ...], **attrs: object) -> V:
    """A node of a role with one FLOAT output."""
    return g.vendor(role, inputs, [(TensorProto.FLOAT, shape)], **attrs)[0]
