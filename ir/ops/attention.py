"""Attention ops: rotary, compressor, indexer, sparse attention with sink (sections 3.6, 4.1 to 4.3)."""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32, i32

from .state import RATIO, closed_groups

Types = tuple[TensorType, ...]


def _rope_angles(sig: Signature) -> Types:
    b, n = sig.shape(0, 2)
    (half,) = sig.shape(1, 1)
    return f32(b, n, half), f32(b, n, half)


def _rotary(sig: Signature) -> Types:
    x, cos = sig.shape(0), sig.shape(1, 3)
    if len(x) not in (3, 4) or sig.shape(2) != cos or x[:2] != cos[:2]:
        sig.fail(
            f"needs x [B,N,(H,)D] and cos, sin [B,N,R/2], got {sig.type(0)}, {sig.type(1)}, {sig.type(2)}"
        )
    if 2 * static(sig, cos[2], "rotary width") > static(sig, x[-1], "head width"):
        sig.fail(f"rotates {cos[2]} pairs in only {x[-1]} channels")
    return (f32(*x),)


def _position_bias(sig: Signature) -> Types:
    b, t, c = sig.shape(0, 3)
    sig.equal(c, sig.shape(1, 2)[1], "the channels of x and bias")
    sig.fits(2, b)
    return (f32(b, t, c),)


def _compress(sig: Signature) -> Types:
    b, t, c = sig.shape(0, 3)
    ratio, overlap = sig.int("ratio"), bool(sig.attrs["overlap"])
    for index in (1, 2, 3):
        sig.equal(sig.shape(index, 3)[2], c, "the channels of kv, gate and their rings")
    sig.fits(1, b, t, c)
    sig.fits(4, b)
    sig.fits(5, b)
    sig.equal(sig.shape(2)[1], ratio * (2 if overlap else 1), "the ring's rows and the group")
    return (f32(b, closed_groups(t, ratio), static(sig, c, "channel count") // (2 if overlap else 1)),)


def _index_scores(sig: Signature) -> Types:
    sig.choice("rounding", "none", "reference")
    b, t, h, d = sig.shape(0, 4)
    sig.fits(1, b, t, h)
    sig.fits(3, b)
    sig.fits(4, b)
    _, capacity, width = sig.shape(2, 3)
    sig.equal(width, d, "the width of index queries and keys")
    return (f32(b, t, capacity),)


def _index_topk(sig: Signature) -> Types:
    return (i32(*sig.shape(0, 3)[:2], sig.int("k")),)


def _candidate_blocks(sig: Signature) -> Types:
    b, t, _ = sig.shape(0, 3)
    sig.fits(1, b)
    sig.fits(2, b)
    block_size(sig)
    return (i32(b, t, block_count(sig)),)


def block_size(sig: Signature) -> None:
    if sig.int("size") < 1:
        sig.fail(f"needs blocks of at least one entry, got size = {sig.int('size')}")


def block_count(sig: Signature) -> int:
    if sig.int("count") < 1:
        sig.fail(f"needs at least the newest block, got count = {sig.int('count')}")
    return sig.int("count")


def _index_restrict(sig: Signature) -> Types:
    b, t, capacity = sig.shape(0, 3)
    sig.fits(1, b, t, sig.shape(1, 3)[2])
    block_size(sig)
    return (f32(b, t, capacity),)


def _index_select(sig: Signature) -> Types:
    b, t, _ = _index_scores(sig)[0].shape
    if len(sig.types) > 5:
        sig.fits(5, b, t, sig.shape(5, 3)[2])
        block_size(sig)
    return (i32(b, t, sig.int("k")),)


def _attention(sig: Signature) -> Types:
    sig.choice("rounding", "none", "reference")
    b, t, h, d = sig.shape(0, 4)
    sig.fits(1, b, t, d)
    sig.equal(sig.shape(2, 3)[2], d, "the width of q and ring")
    sig.fits(3, h)
    sig.fits(4, b)
    sig.fits(5, b)
    if len(sig.types) > 6:
        sig.equal(sig.shape(6, 3)[2], d, "the width of q and entries")
    if len(sig.types) > 7:
        sig.equal(sig.shape(7, 3)[1], t, "the tokens of q and selected")
    if len(sig.types) > 8:
        sig.fits(8, b)
    return (f32(b, t, h, d),)


_K = AttrDef("k", AttrKind.INT)
_SIZE = AttrDef("size", AttrKind.INT)
_ROUNDING = AttrDef("rounding", AttrKind.STR, "none")
_ASCENDING = AttrDef("ascending", AttrKind.BOOL, False)

ATTENTION: tuple[OpDef, ...] = (
    OpDef("rope_angles", ("positions", "frequencies"), _rope_angles, source="3.6",
          doc="cos and sin of position x frequency; the product rounds to FP32."),
    OpDef("rotary", ("x", "cos", "sin"), _rotary,
          (AttrDef("inverse", AttrKind.BOOL, False), AttrDef("halves", AttrKind.BOOL, False)),
          source="3.6; V4.1 9.2",
          doc="Rotate adjacent pairs of the last R channels; `inverse` by the negative angle. With `halves`"
              " channel i of the last R pairs with channel i + R/2."),
    OpDef("position_bias", ("x", "bias", "pos"), _position_bias, source="4.2",
          doc="x + bias[(pos + t) mod ratio]."),
    OpDef("compress", ("kv", "gate", "kv_ring", "gate_ring", "pos", "n_valid"), _compress,
          (RATIO, AttrDef("overlap", AttrKind.BOOL)), source="4.2",
          doc="Entries of the groups this call closes: per channel a softmax over the group's gates weighs"
              " its kv; with overlap the previous group joins by its first half of channels. Rows beyond the"
              " closed are 0."),
    OpDef("index_scores", ("q", "weights", "keys", "pos", "n_valid"), _index_scores, (RATIO, _ROUNDING),
          source="4.3",
          doc="sum_h relu(q_h k_j) w_h; -inf for entries not yet visible to the token. With rounding ="
              ' "reference" the dot product, its product with w_h and the sum over h are rounded to BF16.'),
    OpDef("index_topk", ("scores",), _index_topk, (_K, _ASCENDING), source="4.3; V4.1 4.5",
          doc="Entry ids of the k highest finite scores, ties to the lower id; best first, or by id with"
              " `ascending`. Missing ones are -1 and stand at the end."),
    OpDef("candidate_blocks", ("scores", "pos", "n_valid"), _candidate_blocks,
          (RATIO, _SIZE, AttrDef("count", AttrKind.INT)), source="V4.1 4.5",
          doc="Of the blocks of `size` entries the `count` whose best score is highest, ties to the lower id;"
              " the block of the newest visible entry is always one of them. Ids ascend, missing ones are -1"
              " and stand at the end."),
    OpDef("index_restrict", ("scores", "blocks"), _index_restrict, (_SIZE,), source="V4.1 4.5",
          doc="scores; -inf for entries outside the blocks."),
    OpDef("index_select", ("q", "weights", "keys", "pos", "n_valid", "blocks?"), _index_select,
          (RATIO, _K, _ROUNDING, AttrDef("size", AttrKind.INT, 0), _ASCENDING), source="4.3; V4.1 4.5",
          doc="index_topk of index_scores, restricted to blocks of `size` where they are given, without the"
              " scores in memory: the same set of ids, in no particular order unless rounding ="
              ' "reference" or `ascending`, and -1 at the end.'),
    OpDef("attention", ("q", "kv", "ring", "sinks", "pos", "n_valid", "entries?", "selected?", "start?"),
          _attention,
          (AttrDef("scale", AttrKind.FLOAT), AttrDef("window", AttrKind.INT),
           AttrDef("ratio", AttrKind.INT, 0), _ROUNDING),
          source="4.1 steps 3 and 4",
          doc="Softmax with a per-head sink over the window (ring and this call's kv) and the visible entries"
              " (all of them, or the selected); positions before `start` [B] are outside the window."
              ' With rounding = "reference" it is an online softmax over'
              " blocks of 64 slots, the window's slots oldest first and then the entries in their order: the"
              " maximum leaves the sink out, and a block's probabilities are rounded to BF16 where they meet"
              " the keys but not in the denominator."),
)  # fmt: skip
