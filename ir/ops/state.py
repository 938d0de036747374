"""Ops over positions and the persistent state of a sequence (specification, section 5).

A *ring* of W rows keeps the last W positions, position p in row p mod W. *Entries* are append-only:
entry j is the j-th closed group of `ratio` tokens. `pos` [B] counts the tokens already seen and
`n_valid` [B] the tokens of this call that are real; the rest of a row is padding.
"""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.dims import Dim
from dsv4c.ir.opdef import AttrDef, OpDef, Signature
from dsv4c.ir.types import TensorType, i32

Types = tuple[TensorType, ...]
RATIO = AttrDef("ratio", AttrKind.INT)


def closed_groups(tokens: Dim | int, ratio: int) -> Dim | int:
    """The most groups of `ratio` that `tokens` more tokens can close: ceil(tokens / ratio)."""
    return (tokens + (ratio - 1)) // ratio


def _positions(sig: Signature) -> Types:
    b, t = sig.shape(0, 2)
    sig.fits(1, b)
    return (i32(b, t),)


def _entry_positions(sig: Signature) -> Types:
    b, t = sig.shape(0, 2)
    sig.fits(1, b)
    return (i32(b, closed_groups(t, sig.int("ratio"))),)


def _advance(sig: Signature) -> Types:
    (b,) = sig.shape(0, 1)
    sig.fits(1, b)
    return (i32(b),)


def _write(sig: Signature) -> Types:
    ring, rows = sig.shape(0, 3), sig.shape(1, 3)
    sig.equal(ring[2], rows[2], "the row width of state and rows")
    sig.equal(ring[0], rows[0], "the sequences of state and rows")
    sig.fits(2, ring[0])
    sig.fits(3, ring[0])
    return (sig.type(0),)


STATE: tuple[OpDef, ...] = (
    OpDef("positions", ("tokens", "pos"), _positions, doc="pos[b] + t."),
    OpDef("entry_positions", ("tokens", "pos"), _entry_positions, (RATIO,), source="4.2",
          doc="Rotary position of the i-th entry this call may close: (pos // ratio + i) ratio."),
    OpDef("advance", ("pos", "n_valid"), _advance, consumes=0, doc="pos + n_valid."),
    OpDef("ring_write", ("ring", "rows", "pos", "n_valid"), _write, consumes=0, source="5",
          doc="Rows of the valid tokens into slots (pos + t) mod W; later tokens win."),
    OpDef("entries_append", ("entries", "rows", "pos", "n_valid"), _write, (RATIO,), consumes=0, source="5",
          doc="Rows i < (pos + n_valid) // ratio - pos // ratio into slots pos // ratio + i."),
)  # fmt: skip
