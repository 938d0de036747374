"""Lowerings around the indexer: which entries a token sees, their scores, and what is selected by them.

Scores are computed in columns, those of the rows kept followed by those of this call. Where blocks of entries
matter they are brought into the order of the ids first; else a column is turned into its id at the end.
"""

from __future__ import annotations

from math import inf

from onnx import TensorProto

from dsv4c.ir.graph import Op

from .lowering import Context, Entries, V, integer, size
from .state import clip, column

FAR = float(1 << 24)
"""Beyond every id and block; integers up to here are exact in FLOAT."""


def select(g: Context, op: Op) -> V:
    """q [B,T,H,D], weights [B,T,H], keys Entries, pos, n_valid [B], blocks? [B,T,C] -> ids [B,T,min(k,U+E)].

    Missing ids are -1; columns that could hold nothing else are left off.
    """
    if len(op.operands) > 5 and not _keeps_all(g, op):
        return _restricted(g, op)
    keys, first = g.entries(op, 2), g.op("Div", g.tensor(op, 3), integer(op, "ratio"))
    used = g.dim(keys.old, 1)
    best = g.op("Min", g.op("Add", used, g.dim(keys.new, 1)), integer(op, "k"))
    shift = g.op("Sub", column(g, first, 2), used)  # from a new row's column to its id

    def block(start: V, count: V) -> V:
        top, place = g.top_k(_by_column(g, op, start, count), best)
        # Among the visible, ids ascend with the column, so that TopK's lower column is the lower id.
        ids = g.op("Where", g.op("Less", place, used), place, g.op("Add", place, shift))
        return _ordered(g, op, g.op("Where", g.op("Greater", top, -inf), ids, -1), best)

    return g.token_blocks(g.dim(g.tensor(op, 0), 1), _floats(g, op, 2), 1 << 30, block, integers=True)


def candidates(g: Context, op: Op) -> tuple[V, V]:
    """As `select`, and the blocks [B,T,min(count,blocks)] of `size` entries with the best scores, ascending.

    The block of a token's newest entry is always one of them; missing ones are -1 and stand at the end.
    """
    ratio, width, pos = integer(op, "ratio"), integer(op, "size"), g.tensor(op, 3)
    blocks = block_count(g, op)
    entries = g.op("Min", g.op("Mul", blocks, width), integer(op, "k"))
    kept = g.op("Min", blocks, integer(op, "count"))

    def body(start: V, count: V) -> V:
        scores = _by_id(g, op, _by_column(g, op, start, count))
        newest = g.op("Sub", seen(g, pos, start, count, ratio), 1)  # [B,n,1]
        own = g.op("Equal", g.iota(blocks, 1, 1, -1), g.op("Div", g.op("Max", newest, 0), width))
        best = g.op("ReduceMax", scores, [3], keepdims=0)
        best = g.op("Where", g.op("And", own, g.op("GreaterOrEqual", newest, 0)), inf, best)
        top, place = g.top_k(best, kept)
        chosen = ascending(g, g.op("Where", g.op("Greater", top, -inf), place, -1), kept)
        return g.op("Concat", _best_ids(g, scores, entries), chosen, axis=-1)

    both = g.token_blocks(g.dim(g.tensor(op, 0), 1), _floats(g, op, 4), 1 << 30, body, integers=True)
    ids, chosen = g.multi("Split", 2, both, g.shape(entries, kept), axis=-1)
    return ids, chosen


def _restricted(g: Context, op: Op) -> V:
    """Ids of entries within the blocks, a set of which every token brings."""
    chosen, width = g.tensor(op, 5), integer(op, "size")
    blocks = block_count(g, op)
    entries = g.op("Min", g.op("Mul", blocks, width), integer(op, "k"))
    batch = g.dim(chosen, 0)

    def body(start: V, count: V) -> V:
        scores = _by_id(g, op, _by_column(g, op, start, count))
        own = tokens_of(g, chosen, start, count)
        missing = g.op("Less", own, 0)
        at = g.op("Where", missing, blocks, g.op("Min", own, blocks))  # one place more, for those
        marks = g.op("Expand", 0, g.shape(batch, count, g.op("Add", blocks, 1)))
        marks = g.op("ScatterElements", marks, at, g.op("Expand", 1, g.op("Shape", at)), axis=2)
        marked = g.op("Greater", g.op("Slice", marks, [0], blocks, [2]), 0)
        scores = g.op("Where", g.op("Unsqueeze", marked, [3]), scores, -inf)
        return _ordered(g, op, _best_ids(g, scores, entries), entries)

    return g.token_blocks(g.dim(g.tensor(op, 0), 1), _floats(g, op, 4), 1 << 30, body, integers=True)


def _keeps_all(g: Context, op: Op) -> bool:
    """Whether the blocks are known to be all that a token sees: no fewer were kept than the sequence has."""
    source, count = op.operands[5].producer, g.known(block_count(g, op))
    if source is None or count is None or source.name != "index_candidates":
        return False
    same = source.operands[2:] == op.operands[2:5] and source.attrs["size"] == op.attrs["size"]
    same = same and source.attrs["ratio"] == op.attrs["ratio"]
    return same and int(count.item()) <= integer(source, "count")


def block_count(g: Context, op: Op) -> V:
    """INT64 [1]: blocks of `size` that the rows kept and those of this call fill at most."""
    keys, width = g.entries(op, 2), integer(op, "size")
    rows = g.op("Add", g.dim(keys.old, 1), g.dim(keys.new, 1))
    return g.op("Div", g.op("Add", rows, width - 1), width)


def _best_ids(g: Context, scores: V, count: V) -> V:
    """scores [B,n,blocks,size] -> ids [B,n,count] of the best, -1 where there are no more."""
    flat = g.op("Reshape", scores, g.shape(g.dim(scores, 0), g.dim(scores, 1), -1))
    top, place = g.top_k(flat, count)
    return g.op("Where", g.op("Greater", top, -inf), place, -1)


def _ordered(g: Context, op: Op, ids: V, count: V) -> V:
    return ascending(g, ids, count) if op.attrs["ascending"] else ids


def ascending(g: Context, ids: V, count: V) -> V:
    """ids [...,count] in ascending order, -1 at the end."""
    whole = g.op("Cast", ids, to=TensorProto.FLOAT)
    key = g.op("Where", g.op("Less", ids, 0), -FAR, g.op("Neg", whole))
    sorted_, _ = g.top_k(key, count)
    found = g.cast_index(g.op("Neg", sorted_))
    return g.op("Where", g.op("Greater", sorted_, -FAR), found, -1)


# -------------------------------------------------------------------------------------- scores


def _by_column(g: Context, op: Op, start: V, count: V) -> V:
    """[B,n,U+E]: scores of the rows kept, then of this call's; -inf for what a token does not see."""
    q, weights, keys, pos = g.tensor(op, 0), g.tensor(op, 1), g.entries(op, 2), g.tensor(op, 3)
    ratio = integer(op, "ratio")
    first = g.op("Div", pos, ratio)
    here = tokens_of(g, q, start, count)
    by_head = g.op("Unsqueeze", tokens_of(g, weights, start, count), [2])
    visible = {
        keys.old: is_old(g, keys, first),
        keys.new: is_seen(g, keys, first, seen(g, pos, start, count, ratio)),
    }
    scores = []
    for rows, mask in visible.items():
        dots_ = g.op("Relu", dots(g, op, here, rows, 1.0))
        scores.append(g.op("Where", mask, g.op("Squeeze", g.op("MatMul", by_head, dots_), [2]), -inf))
    return g.op("Concat", *scores, axis=-1)


def _by_id(g: Context, op: Op, scores: V) -> V:
    """[B,n,U+E] -> [B,n,blocks,size] in the order of the ids; -inf where there is no entry."""
    keys, width = g.entries(op, 2), integer(op, "size")
    first = column(g, g.op("Div", g.tensor(op, 3), integer(op, "ratio")))
    used, rows = g.dim(keys.old, 1), g.dim(scores, 2)
    ids = g.op("Unsqueeze", g.iota(g.op("Mul", block_count(g, op), width)), [0])
    moved = g.op("Add", g.op("Sub", ids, first), used)
    place = g.op("Where", g.op("Less", ids, first), ids, moved)  # [B,N]
    found = g.gather_rows(g.op("Transpose", scores, perm=[0, 2, 1]), clip(g, place, rows))
    real = g.op("Unsqueeze", g.op("Less", place, rows), [1])
    ordered = g.op("Where", real, g.op("Transpose", found, perm=[0, 2, 1]), -inf)
    return g.op("Reshape", ordered, g.shape(g.dim(scores, 0), g.dim(scores, 1), -1, width))


def _floats(g: Context, op: Op, each: int) -> V:
    """INT64 [1]: floats that scoring holds per token, `each` times the heads and entries."""
    keys = g.entries(op, 2)
    entries = g.op("Add", g.dim(keys.old, 1), g.dim(keys.new, 1))
    return g.op("Mul", g.op("Mul", entries, each * size(op, 0, 2)), g.dim(g.tensor(op, 3), 0))


# ------------------------------------------------------------------------------- what tokens see


def seen(g: Context, pos: V, start: V, count: V, ratio: int) -> V:
    """INT64 [B,n,1]: how many entries each token of the block may see."""
    here = g.op("Add", column(g, pos), g.op("Add", g.iota(count), start))
    return g.op("Unsqueeze", g.op("Div", g.op("Add", here, 1), ratio), [2])


def is_old(g: Context, entries: Entries, first: V) -> V:
    """BOOL [B,1,U]: the old rows that are entries of this sequence."""
    return g.op("Less", g.iota(g.dim(entries.old, 1), 1, 1, -1), column(g, first, 2))


def is_seen(g: Context, entries: Entries, first: V, seen_: V) -> V:
    """BOOL [B,n,E]: the new rows each token may see."""
    new = g.iota(g.dim(entries.new, 1), 1, 1, -1)
    return g.op("Less", g.op("Add", column(g, first, 2), new), seen_)


def tokens_of(g: Context, x: V, start: V, count: V) -> V:
    """[B,T,...] -> [B,n,...]."""
    return g.op("Slice", x, start, g.op("Add", start, count), [1])


def dots(g: Context, op: Op, q: V, keys: V, factor: float) -> V:
    """q [B,n,H,D], keys [B,S,D] -> [B,n,H,S]."""
    heads, width = size(op, 0, 2), size(op, 0, 3)
    flat = g.matmul_t(g.reshape(q, 0, -1, width), keys, factor)
    return g.reshape(flat, 0, -1, heads, g.dim(keys, 1))
