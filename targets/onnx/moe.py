"""Lowerings of the router and the experts. Only experts that some valid token chose are computed."""

from __future__ import annotations

from dsv4c.ir.graph import Op

from .core import limited_swiglu
from .lowering import Context, V, integer, number, size
from .state import column


def sqrt_softplus(g: Context, op: Op) -> V:
    """Any shape."""
    return g.op("Sqrt", g.op("Softplus", g.tensor(op, 0)))


def route_topk(g: Context, op: Op) -> V:
    """scores [B,T,E], bias [E], tokens? [B,T], image_bias? [E] -> INT64 [B,T,k].

    TopK gives ties to the lower index.
    """
    scores, bias = g.tensors(op, 2)
    if len(op.operands) > 2:
        is_image = g.op("Equal", g.tensor(op, 2), integer(op, "image_token"))
        bias = g.op("Where", g.op("Unsqueeze", is_image, [2]), g.tensor(op, 3), bias)
    return g.top_k(g.op("Add", scores, bias), integer(op, "k"))[1]


def route_hash(g: Context, op: Op) -> V:
    """tokens [B,T], table i32 [V,k] -> INT64 [B,T,k]."""
    tokens, table = g.tensors(op, 2)
    return g.cast_index(g.op("Gather", table, tokens, axis=0))


def route_weights(g: Context, op: Op) -> V:
    """scores [B,T,E], ids [B,T,k] -> [B,T,k]."""
    chosen = g.op("GatherElements", *g.tensors(op, 2), axis=-1)
    total = g.op("Add", g.op("ReduceSum", chosen, [-1], keepdims=1), number(op, "eps"))
    return g.op("Mul", g.op("Div", chosen, total), number(op, "factor"))


def expert_mlp(g: Context, op: Op) -> V:
    """x [B,T,d], ids [B,T,k], weights [B,T,k], n_valid [B], w13 [E,2I,d], w2 [E,d,I] -> [B,T,d].

    A loop over the active experts, ascending: take the expert's matrices and its rows, add what they give to
    the rows of their tokens. Routes of padding carry the id E, which no expert has.
    """
    x, ids, weights, n_valid, w13, w2 = g.tensors(op, 6)
    experts, inner, chosen = size(op, 4, 0), size(op, 5, 2), size(op, 1, 2)
    route_expert = g.reshape(_valid_ids(g, ids, n_valid, experts), -1)
    route_weight = g.reshape(weights, -1, 1)
    rows = g.reshape(x, -1, size(op, 0, 2))
    active = _active(g, route_expert, experts)

    def one(i: V, total: V | None) -> tuple[V, None]:
        expert = g.op("Gather", active, i, axis=0)
        routes = g.op("Squeeze", g.op("NonZero", g.op("Equal", route_expert, expert)), [0])
        tokens = g.op("Div", routes, chosen)
        both = g.matmul_t(g.op("Gather", rows, tokens, axis=0), g.op("Gather", w13, expert, axis=0))
        gate, up = g.multi("Split", 2, both, [inner, inner], axis=-1)
        hidden = limited_swiglu(g, gate, up, number(op, "limit"))
        hidden = g.op("Mul", hidden, g.op("Gather", route_weight, routes, axis=0))
        y = g.matmul_t(hidden, g.op("Gather", w2, expert, axis=0))
        return g.op("ScatterND", total, g.op("Unsqueeze", tokens, [1]), y, reduction="add"), None

    zeros = g.op("Expand", 0.0, g.op("Shape", rows))
    return g.op("Reshape", g.loop(g.dim(active, 0), zeros, one), g.op("Shape", x))


def _valid_ids(g: Context, ids: V, n_valid: V, experts: int) -> V:
    """[B,T,k]: the ids, and `experts` at padding."""
    token = g.iota(g.dim(ids, 1), 1, -1, 1)
    return g.op("Where", g.op("Less", token, column(g, n_valid, 2)), ids, experts)


def _active(g: Context, route_expert: V, experts: int) -> V:
    """INT64 [A]: the experts some route names, ascending."""
    none = g.op("Expand", 0, [experts + 1])
    one = g.op("Expand", 1, g.op("Shape", route_expert))
    named = g.op("ScatterElements", none, route_expert, one, axis=0)
    return g.op("Squeeze", g.op("NonZero", g.op("Slice", named, [0], [experts], [0])), [0])


def shares(g: Context, op: Op) -> V:
    """[N,E]: the routing weight of each expert for each token, 0 where it was not chosen."""
    tokens, chosen = size(op, 0, 0) * size(op, 0, 1), size(op, 1, 2)
    ids = g.op("Reshape", g.tensor(op, 1), [tokens, chosen, 1])
    weights = g.op("Reshape", g.tensor(op, 2), [tokens, chosen, 1])
    experts = list(range(size(op, 4, 0)))
    is_expert = g.op("Equal", ids, g.op("Reshape", experts, [1, 1, -1]))
    return g.op("ReduceSum", g.op("Where", is_expert, weights, 0.0), [1], keepdims=0)
