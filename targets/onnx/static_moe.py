"""The experts of a layer in fixed shapes: every token through its own experts, or all tokens through all.

Nothing here sorts tokens, and no route is dropped: fixed shapes leave room for the worst case, one expert for
every token. Few routes gather the matrices of their experts. Many routes read every matrix once and mix by a
weight that is zero where nobody chose the expert: up to about peak over bandwidth tokens, some hundred on an
accelerator, such a product takes no longer than the reading.
"""

from __future__ import annotations

from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Op

from . import static_bf16, static_codes
from .core import limited_swiglu
from .lowering import Context, V, number, size
from .moe import shares
from .static import StaticContext
from .static_rounding import e4m3

GATHER_COST = 3
"""A gathered matrix is read, written, and read again; one that is used in place is read once."""


def expert_mlp(g: Context, op: Op) -> V:
    """x [B,T,d], ids [B,T,k], weights [B,T,k], n_valid [B], w13 [E,2I,d], w2 [E,d,I] -> [B,T,d].

    Numbers and INT8 codes of w2 are stored [E,I,d], codes in blocks as they were. Padding passes through like
    any token: its rows are its own. With rounding = "fp16" products are of FLOAT16, one for each expert, with
    a reshape between them and casts; see `static_linear.half_of`. With rounding = "bf16" they are those of
    `static_bf16`.

    Raises:
        TargetError: rounding = "fp16" or "bf16" over weights or rows that are not such numbers.
    """
    assert isinstance(g, StaticContext)
    halves = g.is_half(op, 4) and g.is_half(op, 5) and g.tensor(op, 0) in g.halves
    if op.attrs["rounding"] == "fp16" and not halves:
        raise TargetError(
            'expert_mlp with rounding = "fp16" over other numbers', where=op.loc,
            allowed="weights in FP16, rows rounded to FP16",
            hint='requantise, quantise_activations, narrow_weights with experts, rule and storage of fp16',
        )  # fmt: skip
    few, many = _gathered, _dense
    if op.attrs["rounding"] == "bf16":
        static_bf16.check(g, op)
        few, many = static_bf16.few, static_bf16.many
    routes = size(op, 1, 0) * size(op, 1, 1) * size(op, 1, 2)
    body = few if GATHER_COST * routes <= size(op, 4, 0) else many
    return g.op("Reshape", body(g, op), list(g.shape_of(g.tensor(op, 0))))


def _rows(g: StaticContext, op: Op) -> V:
    """x as products take it: FLOAT16 under that rounding."""
    x = g.tensor(op, 0)
    return g.halves[x] if op.attrs["rounding"] == "fp16" else x


def _whole(g: StaticContext, op: Op, y: V, *shape: int) -> V:
    """A product under another shape, as FLOAT."""
    y = g.op("Reshape", y, list(shape))
    return y if op.attrs["rounding"] != "fp16" else g.op("Cast", y, to=TensorProto.FLOAT)


def _hidden(g: StaticContext, op: Op, both: V, share: V, *shape: int) -> V:
    """What enters w2 from products [...,2I] and routing weights [...,1], as the op rounds it, in a shape."""
    inner = size(op, 5, 2)
    gate, up = g.multi("Split", 2, both, [inner, inner], axis=-1)
    hidden = g.op("Mul", limited_swiglu(g, gate, up, number(op, "limit")), share)
    if op.attrs["rounding"] == "mxfp8":
        hidden = e4m3(g, hidden, 32)
    elif op.attrs["rounding"] == "fp16":
        hidden = g.op("Cast", hidden, to=TensorProto.FLOAT16)
    return g.op("Reshape", hidden, list(shape))


def _by_row(g: StaticContext, op: Op, index: int) -> bool:
    """Whether codes have a scale per row, by which a product of them can be multiplied."""
    scheme = g.scheme(op, index)
    return scheme is not None and scheme.name == "int8"


def _in_blocks(g: StaticContext, op: Op, index: int) -> bool:
    """Whether codes have scales in blocks and lie as the op says, so that they are decoded before."""
    return g.scheme(op, index) is not None and not _by_row(g, op, index)


# ---------------------------------------------------------------------------------------- few routes


def _gathered(g: StaticContext, op: Op) -> V:
    """[N,d]: per route a product with the matrices of its expert."""
    ids, weights = (g.tensor(op, i) for i in (1, 2))
    tokens, width, chosen = size(op, 0, 0) * size(op, 0, 1), size(op, 0, 2), size(op, 1, 2)
    inner, routes = size(op, 5, 2), tokens * chosen
    flat = g.op("Reshape", ids, [routes])
    rows = g.op("Reshape", _rows(g, op), [tokens, 1, width, 1])
    rows = g.op("Reshape", g.op("Expand", rows, [tokens, chosen, width, 1]), [routes, width, 1])
    both = g.op("MatMul", _of_routes(g, op, 4, flat), rows)
    if _by_row(g, op, 4):
        both = g.op("Mul", both, g.op("Gather", g.scales(op, 4), flat, axis=0))
    both, share = _whole(g, op, both, routes, 2 * inner), g.op("Reshape", weights, [routes, 1])
    down = _of_routes(g, op, 5, flat)
    if _in_blocks(g, op, 5):
        y = g.op("MatMul", down, _hidden(g, op, both, share, routes, inner, 1))
    else:
        y = g.op("MatMul", _hidden(g, op, both, share, routes, 1, inner), down)
    if _by_row(g, op, 5):
        scales = g.scales(op, 5, size(op, 4, 0), 1, width)
        y = g.op("Mul", y, g.op("Gather", scales, flat, axis=0))
    return g.op("ReduceSum", _whole(g, op, y, tokens, chosen, width), [1], keepdims=0)


def _of_routes(g: StaticContext, op: Op, index: int, experts: V) -> V:
    """The matrices of some experts [routes,...]: numbers, or codes with a scale per row without it."""
    chosen = g.op("Gather", g.view(op, index), experts, axis=0)
    if _by_row(g, op, index):
        return g.op("Cast", chosen, to=TensorProto.FLOAT)
    if scheme := g.scheme(op, index):
        return static_codes.decoded(g, chosen, g.op("Gather", g.scales(op, index), experts, axis=0), scheme)
    return chosen if op.attrs["rounding"] == "fp16" else _float(g, op, index, chosen)


def _float(g: StaticContext, op: Op, index: int, numbers: V) -> V:
    return g.op("Cast", numbers, to=TensorProto.FLOAT) if g.is_half(op, index) else numbers


# --------------------------------------------------------------------------------------- many routes


def _dense(g: StaticContext, op: Op) -> V:
    """[N,d]: two products with the matrices of many experts side by side.

    Numbers are multiplied where they lie, all at once; codes are decoded, and products of single experts
    made, for as many experts at a time as the dialect lets temporaries hold.
    """
    experts, inner, width = size(op, 4, 0), size(op, 5, 2), size(op, 0, 2)
    tokens, half = size(op, 0, 0) * size(op, 0, 1), op.attrs["rounding"] == "fp16"
    rows, share = g.op("Reshape", _rows(g, op), [tokens, width]), shares(g, op)
    each = tokens * (2 * inner + width) if half else 2 * inner * width
    packed = half or any(g.scheme(op, i) is not None for i in (4, 5))
    step = max(1, min(experts, g.dialect.held // each)) if packed else experts
    total: V | None = None
    for first in range(0, experts, step):
        last = min(first + step, experts)
        count = last - first
        both = g.matmul_t(rows, _some(g, op, 4, first, last))
        both = _whole(g, op, both, tokens, count, 2 * inner)
        own = g.op("Reshape", g.op("Slice", share, [first], [last], [1]), [tokens, count, 1])
        down = _some(g, op, 5, first, last)
        if half:
            both, own = (g.op("Transpose", x, perm=[1, 0, 2]) for x in (both, own))
            both, own = (g.op("Reshape", x, [count * tokens, -1]) for x in (both, own))
            hidden = _hidden(g, op, both, own, count, tokens, inner)
            apart = g.op("MatMul", hidden, g.op("Reshape", down, [count, inner, width]))
            y = g.op("ReduceSum", _whole(g, op, apart, count, tokens * width), [0], keepdims=0)
        else:
            y = g.op("MatMul", _hidden(g, op, both, own, tokens, count * inner), down)
        total = y if total is None else g.op("Add", total, y)
    assert total is not None
    return total


def _some(g: StaticContext, op: Op, index: int, first: int, last: int) -> V:
    """The matrices of experts first .. last-1 one below the other: [n*2I,d] of operand 4, [n*I,d] of 5."""
    experts, inner, width = size(op, 4, 0), size(op, 5, 2), size(op, 0, 2)
    height, scheme = 2 * inner if index == 4 else inner, g.scheme(op, index)
    if scheme is None:
        whole = g.op(
            "Slice", g.view(op, index, experts * height, width), [first * height], [last * height], [0]
        )
        return whole if op.attrs["rounding"] == "fp16" else _float(g, op, index, whole)
    down = index == 5 and _by_row(g, op, index)
    scales = g.scales(op, index, experts, 1, width) if down else g.scales(op, index)
    codes, by = (g.op("Slice", x, [first], [last], [0]) for x in (g.view(op, index), scales))
    if down:  # a scale per row of what is a column here
        numbers = g.op("Mul", g.op("Cast", codes, to=TensorProto.FLOAT), by)
    else:
        numbers = static_codes.decoded(g, codes, by, scheme)
    if index == 5 and not down:
        numbers = g.op("Transpose", numbers, perm=[0, 2, 1])
    return g.op("Reshape", numbers, [(last - first) * height, width])
