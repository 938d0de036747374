"""Lowerings of the `attention` family: rotary, compressor, sparse attention with sink.

Old and new entries are never joined: each is scored, masked and mixed by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from onnx import TensorProto

from dsv4c.ir.graph import Op

from . import indexer
from .lowering import Context, V, integer, number, size
from .state import clip, column, most_closed


def rope_angles(g: Context, op: Op) -> tuple[V, V]:
    """positions [B,N], frequencies [R/2] -> cos, sin [B,N,R/2]."""
    positions, frequencies = g.tensors(op, 2)
    angle = g.op("Mul", g.op("Unsqueeze", g.op("Cast", positions, to=TensorProto.FLOAT), [2]), frequencies)
    return g.op("Cos", angle), g.op("Sin", angle)


def rotary(g: Context, op: Op) -> V:
    """x [B,N,(H,)D], cos, sin [B,N,R/2] -> x with its last R channels rotated."""
    x, cos, sin = g.tensors(op, 3)
    width, rope = size(op, 0, -1), 2 * size(op, 1, 2)
    heads = size(op, 0, 2) if op.operands[0].type.rank == 4 else None
    sin = g.op("Neg", sin) if op.attrs["inverse"] else sin
    kept, turned = g.multi("Split", 2, x, [width - rope, rope], axis=-1) if rope < width else (None, x)
    turned = g.rotate(turned, cos, sin, rope, heads, bool(op.attrs["halves"]))
    return g.op("Concat", kept, turned, axis=-1) if kept else turned


def position_bias(g: Context, op: Op) -> V:
    """x [B,T,C], bias [ratio,C], pos [B] -> [B,T,C]."""
    x, bias, pos = g.tensors(op, 3)
    here = g.op("Add", column(g, pos), g.iota(g.dim(x, 1)))
    return g.op("Add", x, g.op("Gather", bias, g.op("Mod", here, size(op, 1, 0)), axis=0))


# ---------------------------------------------------------------------------------- compressor


def compress(g: Context, op: Op) -> V:
    """kv, gate [B,T,C], their rings [B,R,C], pos, n_valid [B] -> [B,E,C'], C' = C or, with overlap, C/2.

    A call that closes no group computes nothing.
    """
    tokens = g.dim(g.tensor(op, 0), 1)
    pos, n_valid = g.tensor(op, 4), g.tensor(op, 5)
    ratio = integer(op, "ratio")
    width = size(op, 0, 2) // (2 if op.attrs["overlap"] else 1)
    first = g.op("Div", pos, ratio)
    closed = g.op("Sub", g.op("Div", g.op("Add", pos, n_valid), ratio), first)
    count = most_closed(g, tokens, ratio)

    def none() -> V:
        return g.op("Expand", 0.0, g.shape(g.dim(pos, 0), count, width))

    def some() -> V:
        pooled = _pool(g, op, first, count)
        real = g.op("Less", g.iota(count, 1, -1, 1), column(g, closed, 2))
        return g.op("Where", real, pooled, 0.0)

    return g.branch(g.op("Greater", g.op("ReduceMax", closed, keepdims=0), 0), some, none)


def _pool(g: Context, op: Op, first: V, count: V) -> V:
    """[B,E,C']: the softmax-weighted sum over the tokens of groups first .. first + count - 1."""
    before = 1 if op.attrs["overlap"] else 0
    index = _group_index(g, op, g.op("Sub", first, before), g.op("Add", count, before))
    gates, values = (_grouped(g, op, index, which) for which in (1, 0))
    if before:
        width = size(op, 0, 2) // 2
        earlier = g.op("Greater", g.op("Add", column(g, first, 3), g.iota(count, 1, -1, 1, 1)), 0)
        gates, values = _with_previous(g, gates, width), _with_previous(g, values, width)
        own = g.op("Greater", g.iota(g.dim(gates, 2), 1, 1, -1, 1), integer(op, "ratio") - 1)
        gates = g.op("Where", g.op("Or", earlier, own), gates, -inf)
    weight = g.op("Exp", g.op("Sub", gates, g.op("ReduceMax", gates, [2], keepdims=1)))
    total = g.op("ReduceSum", g.op("Mul", weight, values), [2], keepdims=0)
    return g.op("Div", total, g.op("ReduceSum", weight, [2], keepdims=0))


def _group_index(g: Context, op: Op, first: V, count: V) -> V:
    """INT64 [B,count*ratio]: where Concat(ring, new) holds the tokens of the groups from `first` [B] on."""
    kv, pos, ratio, ring = g.tensor(op, 0), column(g, g.tensor(op, 4)), integer(op, "ratio"), size(op, 2, 1)
    spot = g.op("Add", column(g, g.op("Mul", first, ratio)), g.iota(g.op("Mul", count, ratio)))
    new = g.op("Add", clip(g, g.op("Sub", spot, pos), g.dim(kv, 1)), ring)
    # A group before the first has spots below 0. Whoever reads it masks it, but consumers differ in what the
    # remainder of a negative number is.
    old = g.op("Mod", g.op("Max", spot, 0), ring)
    return g.op("Where", g.op("Less", spot, pos), old, new)


def _grouped(g: Context, op: Op, index: V, which: int) -> V:
    """kv (0) or gate (1) at `index`, as [B,groups,ratio,C]."""
    rows = g.op("Concat", g.tensor(op, 2 + which), g.tensor(op, which), axis=1)
    return g.reshape(g.gather_rows(rows, index), 0, -1, integer(op, "ratio"), size(op, 0, 2))


def _with_previous(g: Context, x: V, width: int) -> V:
    """[B,E+1,ratio,2C'] -> [B,E,2 ratio,C']: the first channels of the group before, then the group's own."""
    previous = g.op("Slice", x, [0, 0], [-1, width], [1, 3])
    return g.op("Concat", previous, g.op("Slice", x, [1, width], [2**62, 2 * width], [1, 3]), axis=2)


# ------------------------------------------------------------------------------------- indexer


def index_select(g: Context, op: Op) -> V:
    """q [B,T,H,D], weights [B,T,H], keys, pos, n_valid, blocks? -> INT64 ids; see `indexer.select`."""
    return indexer.select(g, op)


def index_candidates(g: Context, op: Op) -> tuple[V, V]:
    """q [B,T,H,D], weights [B,T,H], keys, pos, n_valid -> INT64 ids and blocks; see `indexer.candidates`."""
    return indexer.candidates(g, op)


# ----------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Part:
    """Some of the keys of a block of tokens: masked logits [B,n,H,S], keys [B,S,D] or, `own`, [B,n,S,D]."""

    logits: V
    keys: V
    own: bool = False


_Source = Callable[[V, V, V], _Part]
"""(queries of the block [B,n,H,D], first token, token count) -> its keys of one kind."""


def attention(g: Context, op: Op) -> V:
    """q [B,T,H,D], kv [B,T,D], ring [B,R,D], sinks [H], pos, n_valid [B], entries?, selected? -> [B,T,H,D].

    The sink is one more logit of the softmax, whose probability nothing is multiplied by.
    """
    q, sinks, heads = g.tensor(op, 0), g.tensor(op, 3), size(op, 0, 2)
    sources = [_window(g, op)]
    floats = g.shape(2 * size(op, 2, 1) * 3 * heads)
    if len(op.operands) == 7:
        sources += [_every_old(g, op), _every_new(g, op)]
        held = g.op("Add", g.dim(g.entries(op, 6).old, 1), g.dim(g.entries(op, 6).new, 1))
        floats = g.op("Add", floats, g.op("Mul", held, 3 * heads))
    if len(op.operands) == 8:
        sources.append(_selected(g, op))
        floats = g.op("Add", floats, g.op("Mul", g.dim(g.tensor(op, 7), 2), 3 * (heads + size(op, 0, 3))))

    def block(start: V, count: V) -> V:
        here = indexer.tokens_of(g, q, start, count)
        parts = [source(here, start, count) for source in sources]
        rows = g.shape(g.dim(q, 0), count, 1, 1)
        sink = g.op("Expand", g.reshape(sinks, 1, 1, heads, 1), rows)
        p = g.op("Softmax", g.op("Concat", *(part.logits for part in parts), sink, axis=-1), axis=-1)
        sizes = g.shape(*(g.dim(part.logits, 3) for part in parts), 1)
        weights = g.multi("Split", len(parts) + 1, p, sizes, axis=-1)[:-1]
        mixed = [_mix(g, op, w, part, here) for w, part in zip(weights, parts, strict=True)]
        return g.reshape(g.op("Sum", *mixed), 0, 0, heads * size(op, 0, 3))

    cap = max(size(op, 2, 1), 16)  # within a block every token is scored against every other
    per_token = g.op("Mul", floats, g.dim(q, 0))
    return g.reshape(g.token_blocks(g.dim(q, 1), per_token, cap, block), 0, 0, heads, size(op, 0, 3))


def _mix(g: Context, op: Op, weights: V, part: _Part, like: V) -> V:
    """weights [B,n,H,S] of the keys of `part` -> [B,n,H,D]."""
    if part.own:
        return g.op("MatMul", weights, part.keys)
    flat = g.reshape(weights, 0, -1, g.dim(part.keys, 1))
    return g.op("Reshape", g.op("MatMul", flat, part.keys), g.op("Shape", like))


def _window(g: Context, op: Op) -> _Source:
    """The last tokens: the ring, oldest first, followed by this call's; token t's own row is R + t."""
    ring, pos, window, scale = size(op, 2, 1), g.tensor(op, 4), integer(op, "window"), number(op, "scale")
    slot = g.op("Mod", g.op("Add", column(g, pos), g.iota(g.shape(ring))), ring)
    rows = g.op("Concat", g.gather_rows(g.tensor(op, 2), slot), g.tensor(op, 1), axis=1)
    empty = column(g, g.op("Sub", ring, pos), 3)  # rows before position 0

    def part(q: V, start: V, count: V) -> _Part:
        span = g.op("Add", count, ring)
        keys = indexer.tokens_of(g, rows, start, span)
        row = g.iota(span, 1, 1, 1, -1)
        age = g.op("Sub", g.op("Add", g.iota(count, 1, -1, 1, 1), ring), row)
        near = g.op("And", g.op("GreaterOrEqual", age, 0), g.op("Less", age, window))
        mask = g.op("And", near, g.op("GreaterOrEqual", g.op("Add", row, start), empty))
        return _Part(g.op("Where", mask, indexer.dots(g, op, q, keys, scale), -inf), keys)

    return part


def _every_old(g: Context, op: Op) -> _Source:
    """Every entry of earlier calls."""
    entries, first, scale = g.entries(op, 6), _first(g, op), number(op, "scale")
    mask = g.op("Unsqueeze", indexer.is_old(g, entries, first), [2])
    return lambda q, start, count: _Part(
        g.op("Where", mask, indexer.dots(g, op, q, entries.old, scale), -inf), entries.old
    )


def _every_new(g: Context, op: Op) -> _Source:
    """The entries of this call, each from the token on that closes it."""
    entries, first, scale, pos = g.entries(op, 6), _first(g, op), number(op, "scale"), g.tensor(op, 4)

    def part(q: V, start: V, count: V) -> _Part:
        seen = indexer.seen(g, pos, start, count, integer(op, "ratio"))
        mask = g.op("Unsqueeze", indexer.is_seen(g, entries, first, seen), [2])
        return _Part(g.op("Where", mask, indexer.dots(g, op, q, entries.new, scale), -inf), entries.new)

    return part


def _selected(g: Context, op: Op) -> _Source:
    """The entries the indexer chose, gathered per token."""
    entries, ids, scale = g.entries(op, 6), g.tensor(op, 7), number(op, "scale")
    first = column(g, _first(g, op), 2)

    def part(q: V, start: V, count: V) -> _Part:
        chosen = indexer.tokens_of(g, ids, start, count)
        old = g.gather_rows(entries.old, clip(g, chosen, g.dim(entries.old, 1)))
        new = g.gather_rows(entries.new, clip(g, g.op("Sub", chosen, first), g.dim(entries.new, 1)))
        keys = g.op("Where", g.op("Unsqueeze", g.op("Less", chosen, first), [-1]), old, new)
        mask = g.op("Unsqueeze", g.op("GreaterOrEqual", chosen, 0), [2])
        return _Part(g.op("Where", mask, g.matmul_t(q, keys, scale), -inf), keys, own=True)

    return part


def _first(g: Context, op: Op) -> V:
    """INT64 [B]: the id of new entry 0."""
    return g.op("Div", g.tensor(op, 4), integer(op, "ratio"))
