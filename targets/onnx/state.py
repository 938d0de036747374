"""Lowerings of the `state` family. Rings come back whole; of entries only the new rows come back."""

from __future__ import annotations

from dsv4c.ir.graph import Op

from .lowering import Context, Entries, V, integer, size


def positions(g: Context, op: Op) -> V:
    """tokens [B,T], pos [B] -> INT64 [B,T]."""
    tokens, pos = g.tensors(op, 2)
    return g.op("Add", column(g, pos), g.iota(g.dim(tokens, 1)))


def entry_positions(g: Context, op: Op) -> V:
    """tokens [B,T], pos [B] -> INT64 [B,E], E = ceil(T / ratio)."""
    (tokens, pos), ratio = g.tensors(op, 2), integer(op, "ratio")
    first = g.op("Div", column(g, pos), ratio)
    return g.op("Mul", g.op("Add", first, g.iota(most_closed(g, g.dim(tokens, 1), ratio))), ratio)


def advance(g: Context, op: Op) -> V:
    """pos [B], n_valid [B] -> INT64 [B]."""
    return g.op("Add", *g.tensors(op, 2))


def ring_write(g: Context, op: Op) -> V:
    """ring [B,W,D], rows [B,T,D], pos [B], n_valid [B] -> [B,W,D].

    Slot w takes the last valid token t with (pos + t) mod W = w, and keeps its row where there is none: a
    gather, so the cost is that of the ring and not of the tokens.
    """
    ring, rows, pos, n_valid = g.tensors(op, 4)
    width = size(op, 0, 1)
    behind = g.op("Sub", g.iota(g.shape(width), 1, -1), g.op("Mod", column(g, pos), width))
    first = g.op("Mod", g.op("Add", behind, width), width)  # no consumer has to divide a negative number
    count = column(g, n_valid)
    rounds = g.op("Div", g.op("Sub", g.op("Sub", count, 1), first), width)
    token = g.op("Add", first, g.op("Mul", rounds, width))
    newest = g.gather_rows(rows, clip(g, token, g.dim(rows, 1)))
    written = g.op("Unsqueeze", g.op("Less", first, count), [-1])
    return g.op("Where", written, newest, ring)


def entries_append(g: Context, op: Op) -> Entries:
    """entries [B,U,D], rows [B,E,D] -> both; the runtime stores the rows that count."""
    return Entries(g.tensor(op, 0), g.tensor(op, 1))


def column(g: Context, x: V, axes: int = 1) -> V:
    """[B] -> [B,1,...] with `axes` ones."""
    return g.op("Unsqueeze", x, list(range(1, axes + 1)))


def clip(g: Context, index: V, count: V) -> V:
    """INT64 index forced into 0 .. count-1 (count INT64 [1], at least 1)."""
    return g.op("Max", g.op("Min", index, g.op("Sub", count, 1)), 0)


def most_closed(g: Context, tokens: V, ratio: int) -> V:
    """INT64 [1]: ceil(tokens / ratio), the most groups that so many tokens close."""
    return g.op("Div", g.op("Add", tokens, ratio - 1), ratio)
