"""The experts of a layer in fixed shapes: every token through its own experts, or all tokens through all.

Nothing here sorts tokens, and no route is dropped: fixed shapes leave room for the worst case, one expert for
every token. Few routes gather the matrices of their experts. Many routes read every matrix once and mix by a
weight that is zero where nobody chose the expert: up to about peak over bandwidth tokens, some hundred on an
accelerator, such a product takes no longer than the reading.
"""

from __future__ import annotations

from onnx import TensorProto

from dsv4c.ir.graph import Op

from .core import swiglu
from .lowering import Context, V, number, size
from .static import StaticContext

GATHER_COST = 3
"""A gathered matrix is read, written, and read again; one that is used in place is read once."""


def expert_mlp(g: Context, op: Op) -> V:
    """x [B,T,d], ids [B,T,k], weights [B,T,k], n_valid [B], w13 [E,2I,d], w2 stored [E,I,d] -> [B,T,d].

    Padding passes through like any token: its rows are its own.
    """
    assert isinstance(g, StaticContext)
    routes = size(op, 1, 0) * size(op, 1, 1) * size(op, 1, 2)
    body = _gathered if GATHER_COST * routes <= size(op, 4, 0) else _dense
    return g.op("Reshape", body(g, op), list(g.shape_of(g.tensor(op, 0))))


def _gathered(g: StaticContext, op: Op) -> V:
    """[N,d]: per route a product with the matrices of its expert."""
    x, ids, weights = (g.tensor(op, i) for i in (0, 1, 2))
    tokens, width, chosen = size(op, 0, 0) * size(op, 0, 1), size(op, 0, 2), size(op, 1, 2)
    inner, routes = size(op, 5, 2), tokens * chosen
    flat = g.op("Reshape", ids, [routes])
    rows = g.op("Expand", g.op("Reshape", x, [tokens, 1, width, 1]), [tokens, chosen, width, 1])
    rows = g.op("Reshape", rows, [routes, width, 1])
    both = g.op("MatMul", _of_routes(g, op, 4, flat), rows)
    if g.is_packed(op, 4):
        both = g.op("Mul", both, g.op("Gather", g.scales(op, 4), flat, axis=0))
    gate, up = g.multi("Split", 2, g.op("Reshape", both, [routes, 1, 2 * inner]), [inner, inner], axis=-1)
    hidden = g.op("Mul", swiglu(g, gate, up, number(op, "limit")), g.op("Reshape", weights, [routes, 1, 1]))
    y = g.op("MatMul", hidden, _of_routes(g, op, 5, flat))
    if g.is_packed(op, 5):
        scales = g.scales(op, 5, size(op, 4, 0), 1, width)
        y = g.op("Mul", y, g.op("Gather", scales, flat, axis=0))
    return g.op("ReduceSum", g.op("Reshape", y, [tokens, chosen, width]), [1], keepdims=0)


def _of_routes(g: StaticContext, op: Op, index: int, experts: V) -> V:
    """The matrices of some experts [routes,...] as FLOAT, codes without their scales."""
    chosen = g.op("Gather", g.view(op, index), experts, axis=0)
    return g.op("Cast", chosen, to=TensorProto.FLOAT) if g.is_packed(op, index) else chosen


def _dense(g: StaticContext, op: Op) -> V:
    """[N,d]: two products with the matrices of many experts side by side.

    Numbers are multiplied where they lie, all at once; codes are decoded for as many experts at a time as the
    dialect lets temporaries hold.
    """
    experts, inner, width = size(op, 4, 0), size(op, 5, 2), size(op, 0, 2)
    tokens = size(op, 0, 0) * size(op, 0, 1)
    rows, share = g.op("Reshape", g.tensor(op, 0), [tokens, width]), _shares(g, op)
    packed = g.is_packed(op, 4) or g.is_packed(op, 5)
    step = max(1, min(experts, g.dialect.held // (2 * inner * width))) if packed else experts
    total: V | None = None
    for first in range(0, experts, step):
        last = min(first + step, experts)
        count = last - first
        both = g.matmul_t(rows, _some(g, op, 4, first, last))
        by_expert = g.op("Reshape", both, [tokens, count, 2 * inner])
        gate, up = g.multi("Split", 2, by_expert, [inner, inner], axis=-1)
        own = g.op("Reshape", g.op("Slice", share, [first], [last], [1]), [tokens, count, 1])
        hidden = g.op("Mul", swiglu(g, gate, up, number(op, "limit")), own)
        y = g.op("MatMul", g.op("Reshape", hidden, [tokens, count * inner]), _some(g, op, 5, first, last))
        total = y if total is None else g.op("Add", total, y)
    assert total is not None
    return total


def _some(g: StaticContext, op: Op, index: int, first: int, last: int) -> V:
    """The matrices of experts first .. last-1 one below the other: [n*2I,d] of operand 4, [n*I,d] of 5."""
    experts, inner, width = size(op, 4, 0), size(op, 5, 2), size(op, 0, 2)
    height = 2 * inner if index == 4 else inner
    if not g.is_packed(op, index):
        whole = g.view(op, index, experts * height, width)
        return g.op("Slice", whole, [first * height], [last * height], [0])
    scales = (experts, height, 1) if index == 4 else (experts, 1, width)
    codes, by = (
        g.op("Slice", x, [first], [last], [0]) for x in (g.view(op, index), g.scales(op, index, *scales))
    )
    return g.op("Reshape", g.decoded(codes, by), [(last - first) * height, width])


def _shares(g: StaticContext, op: Op) -> V:
    """[N,E]: the routing weight of each expert for each token, 0 where it was not chosen."""
    tokens, chosen = size(op, 0, 0) * size(op, 0, 1), size(op, 1, 2)
    ids = g.op("Reshape", g.tensor(op, 1), [tokens, chosen, 1])
    weights = g.op("Reshape", g.tensor(op, 2), [tokens, chosen, 1])
    experts = list(range(size(op, 4, 0)))
    is_expert = g.op("Equal", ids, g.op("Reshape", experts, [1, 1, -1]))
    return g.op("ReduceSum", g.op("Where", is_expert, weights, 0.0), [1], keepdims=0)
