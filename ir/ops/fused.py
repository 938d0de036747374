"""Ops that only passes make: several ops of the other families in one, so that a back end may run one kernel.

Each means exactly the chain it stands for, and its `doc` names that chain. Knows no pass and no kernel.
"""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32, i32

from .attention import block_count, block_size
from .state import RATIO, closed_groups

Types = tuple[TensorType, ...]


def _split_columns(sig: Signature) -> Types:
    x, widths = sig.shape(0), sig.attrs["widths"]
    assert isinstance(widths, tuple)
    if min(widths, default=0) < 1 or sum(widths) != static(sig, x[-1], "channel count"):
        sig.fail(f"cannot split {x[-1]} channels into {list(widths)}")
    return tuple(f32(*x[:-1], width) for width in widths)


def _norm_rotary(sig: Signature) -> Types:
    x, cos = sig.shape(0), sig.shape(1, 3)
    if len(x) not in (3, 4) or sig.shape(2) != cos or x[:2] != cos[:2]:
        sig.fail(f"needs x [B,N,(H,)D] and cos, sin [B,N,R/2], got {', '.join(map(str, sig.types[:3]))}")
    if 2 * static(sig, cos[2], "rotary width") > static(sig, x[-1], "head width"):
        sig.fail(f"rotates {cos[2]} pairs in only {x[-1]} channels")
    if len(sig.types) > 3:
        sig.fits(3, x[-1])
    return (f32(*x),)


def _entries_close(sig: Signature) -> Types:
    b, capacity, width = sig.shape(0, 3)
    _, t, c = sig.shape(1, 3)
    ratio, halves = sig.int("ratio"), 2 if sig.attrs["overlap"] else 1
    sig.fits(1, b, t, halves * static(sig, width, "entry width"))
    sig.fits(2, b, t, c)
    for ring in (3, 4):
        sig.fits(ring, b, halves * ratio, c)
    sig.fits(5, width)
    half = sig.shape(6, 3)[2]
    for angle in (6, 7):
        sig.fits(angle, b, closed_groups(t, ratio), half)
    if 2 * static(sig, half, "rotary width") > static(sig, width, "entry width"):
        sig.fail(f"rotates {half} pairs in only {width} channels")
    for index in (8, 9):
        sig.fits(index, b)
    return (f32(b, capacity, width),)


def _index_candidates(sig: Signature) -> Types:
    b, t, h, d = sig.shape(0, 4)
    sig.fits(1, b, t, h)
    sig.equal(sig.shape(2, 3)[2], d, "the width of index queries and keys")
    sig.fits(3, b)
    sig.fits(4, b)
    block_size(sig)
    return i32(b, t, sig.int("k")), i32(b, t, block_count(sig))


def _pre(sig: Signature, first: int) -> Types:
    """Results of `hc_pre` for streams of operand 0 and parameters from operand `first`."""
    b, t, streams, d = sig.shape(0, 4)
    n = static(sig, streams, "stream count")
    rows = n * (2 + n)
    sig.fits(first, rows, n * static(sig, d, "width"))
    sig.fits(first + 1, rows)
    sig.fits(first + 2, 3)
    sig.fits(first + 3, d)
    results = f32(b, t, d), f32(b, t, n), f32(b, t, n, n)
    if len(sig.types) == first + 4:
        return results
    sig.fits(first + 4, b, t, n)
    return (*results, f32(b, t, n))


def _hc_pre(sig: Signature) -> Types:
    return _pre(sig, 1)


def _hc_post_pre(sig: Signature) -> Types:
    b, t, n, d = sig.shape(0, 4)
    sig.fits(1, b, t, d)
    sig.fits(2, b, t, n)
    sig.fits(3, b, t, n, n)
    return (f32(b, t, n, d), *_pre(sig, 4))


def _add_route(sig: Signature) -> Types:
    b, t, k = sig.shape(0, 3)
    sig.fits(1, b, t, k)
    count = static(sig, k, "experts per token") + 1
    return i32(b, t, count), f32(b, t, count)


_EPS = AttrDef("eps", AttrKind.FLOAT)
_HC = (_EPS, AttrDef("norm_eps", AttrKind.FLOAT), AttrDef("iters", AttrKind.INT),
       AttrDef("out_eps", AttrKind.FLOAT))  # fmt: skip
_HC_OPERANDS = ("fn", "base", "scale", "w", "pre?")

FUSED: tuple[OpDef, ...] = (
    OpDef("split_columns", ("x",), _split_columns, (AttrDef("widths", AttrKind.INTS),),
          doc="The last axis cut into consecutive parts."),
    OpDef("norm_rotary", ("x", "cos", "sin", "w?"), _norm_rotary, (_EPS,), source="3.5, 3.6",
          doc="rotary(rms_norm(x, w), cos, sin), or of unit_norm(x) without w."),
    OpDef("entries_close", ("entries", "kv", "gate", "kv_ring", "gate_ring", "w", "cos", "sin", "pos",
                            "n_valid"),
          _entries_close, (RATIO, AttrDef("overlap", AttrKind.BOOL), _EPS), consumes=0, source="4.2",
          doc="entries_append(entries, rotary(rms_norm(compress(kv, gate, rings), w), cos, sin))."),
    OpDef("hc_pre", ("streams", *_HC_OPERANDS), _hc_pre, _HC, source="4 steps 1 to 4",
          doc="rms_norm(hc_collapse(streams, pre), w), post, comb with pre, post, comb = hc_mix(streams);"
              " out_eps is the norm's. Where another `pre` is given it collapses, and that of hc_mix is the"
              " fourth result."),
    OpDef("index_candidates", ("q", "weights", "keys", "pos", "n_valid"), _index_candidates,
          (RATIO, AttrDef("k", AttrKind.INT), AttrDef("size", AttrKind.INT), AttrDef("count", AttrKind.INT)),
          source="V4.1 4.5",
          doc="index_select and candidate_blocks of the same index_scores, without the scores in memory."),
    OpDef("hc_post_pre", ("streams", "y", "post", "comb", *_HC_OPERANDS), _hc_post_pre, _HC,
          source="4 steps 1 to 5",
          doc="x = hc_expand(streams, y, post, comb), and hc_pre(x): the border between two sub-layers."),
    OpDef("add_route", ("ids", "weights"), _add_route, (AttrDef("expert", AttrKind.INT),), source="4.4",
          doc="One more route for every token: to `expert`, with weight 1."),
)  # fmt: skip
