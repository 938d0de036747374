"""Engram: token compression, n-gram row ids, table rows, the gate, and the short convolution.

Knows the three published variants (DEMO, TK, PROD of the Engram specification) only as attributes. A
*compressed id* is the class of a token; `DEAD` (any negative id) marks a token that has none, such as a
position of an image.
"""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.dtypes import DType
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32, i32

Types = tuple[TensorType, ...]


def _compress_tokens(sig: Signature) -> Types:
    sig.shape(1, 1)
    return (i32(*sig.shape(0, 2)),)


def _history(sig: Signature, ids: int, history: int) -> Types:
    """Checks of ids [B,T], history [B,H], pos [B], n_valid [B]; gives the type of the ids."""
    b, t = sig.shape(ids, 2)
    sig.equal(b, sig.shape(history, 2)[0], "the sequences of ids and history")
    sig.fits(2, b)
    sig.fits(3, b)
    return (i32(b, t),)


def _numbers(sig: Signature, name: str) -> tuple[int, ...]:
    value = sig.attrs[name]
    assert isinstance(value, tuple)
    return value


def _ngram_rows(sig: Signature) -> Types:
    _history(sig, 0, 1)
    heads, orders = sig.int("heads"), len(_numbers(sig, "multipliers")) - 1
    primes, offsets = _numbers(sig, "primes"), _numbers(sig, "offsets")
    if heads < 1 or orders < 1 or not len(primes) == len(offsets) == heads * orders:
        sig.fail(f"needs {heads} primes and offsets for each of {orders} orders, got {len(primes)}")
    last = max(o + p for o, p in zip(offsets, primes, strict=True))
    if min(primes) < 1 or min(offsets) < 0 or last > 2**31:
        sig.fail("needs rows that int32 holds")
    if static(sig, sig.shape(1, 2)[1], "history length") < orders:
        sig.fail(f"needs a history of at least {orders}, got {sig.type(1)}")
    return (i32(*sig.shape(0, 2), len(primes)),)


def _ngram_history(sig: Signature) -> Types:
    _history(sig, 1, 0)
    return (sig.type(0),)


def _engram_rows(sig: Signature) -> Types:
    b, t, columns = sig.shape(0, 3)
    entries, width = (static(sig, s, "table shape") for s in sig.shape(1, 2))
    if (sig.type(1).dtype is DType.F8E4M3) != (len(sig.types) > 2):
        sig.fail(f"needs f8e4m3 codes with scales or plain numbers without, got {sig.type(1)}")
    if len(sig.types) > 2:
        if sig.type(2).dtype is not DType.F8E8M0:
            sig.fail(f"needs scales of f8e8m0, got {sig.type(2)}")
        sig.equal(entries, sig.shape(2, 2)[0], "the rows of codes and scales")
        groups = static(sig, sig.shape(2, 2)[1], "scale count")
        if not groups or width % groups:
            sig.fail(f"cannot split {width} codes into {groups} groups of one scale")
    return (f32(b, t, static(sig, columns, "column count") * width),)


def _engram_gate(sig: Signature) -> Types:
    b, t, n, d = sig.shape(0, 4)
    streams, width = static(sig, n, "stream count"), static(sig, d, "width")
    sig.fits(1, b, t, (streams + 1) * width)
    sig.fits(2, n, d)
    sig.fits(3, n, d)
    if len(sig.types) > 4:
        sig.fits(4, b, t)
    return (f32(b, t, n, d),)


def _stream_norm(sig: Signature) -> Types:
    b, t, n, d = sig.shape(0, 4)
    sig.fits(1, n, d)
    return (f32(b, t, static(sig, n, "stream count") * static(sig, d, "width")),)


def _short_conv(sig: Signature) -> Types:
    b, t, channels = sig.shape(0, 3)
    rows, ring = sig.shape(1, 3)[1], sig.shape(1, 3)
    sig.equal(ring[0], b, "the sequences of ring and rows")
    sig.equal(ring[2], channels, "the channels of ring and rows")
    taps = static(sig, sig.shape(2, 2)[1], "tap count")
    sig.fits(2, channels, taps)
    sig.fits(3, b)
    sig.fits(4, b)
    reach = (taps - 1) * sig.int("dilation")
    if sig.int("dilation") < 1 or static(sig, rows, "ring length") < reach:
        sig.fail(f"reads {reach} earlier rows, got {sig.type(1)}")
    return (f32(b, t, channels),)


ENGRAM: tuple[OpDef, ...] = (
    OpDef(
        "compress_tokens",
        ("tokens", "map"),
        _compress_tokens,
        (AttrDef("dead", AttrKind.BOOL), AttrDef("dead_token", AttrKind.INT, -1)),
        source="Engram 2",
        doc="map[token]; tokens without an entry and `dead_token` are -1, negative ones too when `dead`, "
        "else they pass unchanged.",
    ),
    OpDef(
        "ngram_rows",
        ("ids", "history", "pos", "n_valid"),
        _ngram_rows,
        (
            AttrDef("pad", AttrKind.INT),
            AttrDef("multipliers", AttrKind.INTS),
            AttrDef("primes", AttrKind.INTS),
            AttrDef("offsets", AttrKind.INTS),
            AttrDef("heads", AttrKind.INT),
            AttrDef("dead", AttrKind.BOOL),
        ),
        source="Engram 4",
        doc="Table rows of the n-grams that end at each token, -1 for padding; `pad` stands before the "
        "start, and with `dead` in place of a negative id and of all before it.",
    ),
    OpDef(
        "ngram_history",
        ("history", "ids", "pos", "n_valid"),
        _ngram_history,
        consumes=0,
        source="Engram 4",
        doc="Compressed ids of the valid tokens into slots (pos + t) mod H, DEAD marks included.",
    ),
    OpDef(
        "engram_rows",
        ("rows", "codes", "scales?"),
        _engram_rows,
        source="Engram 5",
        doc="The table rows side by side, each group of codes times its scale; zeros for row -1.",
    ),
    OpDef(
        "engram_gate",
        ("streams", "kv", "q_weight", "k_weight", "ids?"),
        _engram_gate,
        (
            AttrDef("eps", AttrKind.FLOAT),
            AttrDef("copysign", AttrKind.BOOL),
            AttrDef("residual", AttrKind.BOOL),
            AttrDef("floor", AttrKind.FLOAT, 1e-6),
        ),
        source="Engram 6",
        doc="gamma_j value, plus X_j with `residual`; kv holds key_0..key_{n-1} and the value; gamma is 0 "
        "where the id is negative.",
    ),
    OpDef(
        "stream_norm",
        ("x", "w"),
        _stream_norm,
        (AttrDef("eps", AttrKind.FLOAT),),
        source="Engram 6, ShortConv",
        doc="rms_norm of every stream with its own weight, [B,T,n,d] as [B,T,n*d].",
    ),
    OpDef(
        "short_conv",
        ("rows", "ring", "w", "pos", "n_valid"),
        _short_conv,
        (AttrDef("dilation", AttrKind.INT),),
        source="Engram 6, ShortConv",
        doc="silu(sum_i w[:, i] z[t - dilation (taps - 1 - i)]), zeros before the start, earlier rows from "
        "the ring.",
    ),
)
