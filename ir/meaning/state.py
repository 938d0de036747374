"""Meanings of the `state` family: positions, rings, and append-only entries."""

from __future__ import annotations

import numpy as np

from dsv4c.ir.graph import Op

from .core import Arr, integer


def positions(op: Op, tokens: Arr, pos: Arr) -> Arr:
    return (pos[:, None] + np.arange(tokens.shape[1])).astype(np.int32)


def entry_positions(op: Op, tokens: Arr, pos: Arr) -> Arr:
    ratio = integer(op, "ratio")
    count = -(-tokens.shape[1] // ratio)
    return ((pos[:, None] // ratio + np.arange(count)) * ratio).astype(np.int32)


def advance(op: Op, pos: Arr, n_valid: Arr) -> Arr:
    return (pos + n_valid).astype(np.int32)


def ring_write(op: Op, ring: Arr, rows: Arr, pos: Arr, n_valid: Arr) -> Arr:
    out = ring.copy()
    for b, (start, count) in enumerate(zip(pos, n_valid, strict=True)):
        for t in range(max(0, count - ring.shape[1]), count):
            out[b, (start + t) % ring.shape[1]] = rows[b, t]
    return out


def entries_append(op: Op, entries: Arr, rows: Arr, pos: Arr, n_valid: Arr) -> Arr:
    ratio, out = integer(op, "ratio"), entries.copy()
    for b, (start, count) in enumerate(zip(pos, n_valid, strict=True)):
        first, last = start // ratio, (start + count) // ratio
        out[b, first:last] = rows[b, : last - first]
    return out
