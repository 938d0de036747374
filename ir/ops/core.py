"""Ops every transformer has: weights, embedding, linear maps, norms, element-wise."""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32

Types = tuple[TensorType, ...]


def _weight(sig: Signature) -> Types:
    raise AssertionError("a weight's type is its expression's")


def _embed(sig: Signature) -> Types:
    return (f32(*sig.shape(0, 2), sig.shape(1, 2)[1]),)


def _repeat_streams(sig: Signature) -> Types:
    b, t, d = sig.shape(0, 3)
    return (f32(b, t, sig.int("n"), d),)


def _linear(sig: Signature) -> Types:
    n, k = sig.shape(1, 2)
    x = sig.shape(0)
    sig.equal(x[-1], k, "the input width and the weight's columns")
    sig.choice("inputs", "any", "bf16", "int8")
    return (f32(*x[:-1], n),)


def _grouped_linear(sig: Signature) -> Types:
    b, t, h, d = sig.shape(0, 4)
    n, k = (static(sig, s, "weight shape") for s in sig.shape(1, 2))
    groups = sig.int("groups")
    if n % groups or static(sig, h, "head count") * static(sig, d, "head width") != groups * k:
        sig.fail(f"cannot split {h} x {d} channels over {groups} groups of {k} columns")
    sig.choice("inputs", "any", "bf16", "int8")
    return (f32(b, t, n),)


def _norm(sig: Signature) -> Types:
    x = sig.shape(0)
    sig.equal(x[-1], sig.shape(1, 1)[0], "the input width and the norm's weight")
    return (f32(*x),)


def _add_bias(sig: Signature) -> Types:
    x = sig.shape(0)
    sig.fits(1, x[-1])
    return (f32(*x),)


def _same(sig: Signature) -> Types:
    return (f32(*sig.shape(0)),)


def _unit_norm(sig: Signature) -> Types:
    sig.choice("rounding", "none", "reference")
    return _same(sig)


def _binary(sig: Signature) -> Types:
    if sig.shape(0) != sig.shape(1):
        sig.fail(f"needs equal shapes, got {sig.type(0)} and {sig.type(1)}")
    return (f32(*sig.shape(0)),)


def _split_heads(sig: Signature) -> Types:
    b, t, c = sig.shape(0, 3)
    width, heads = static(sig, c, "channel count"), sig.int("heads")
    if width % heads:
        sig.fail(f"cannot split {width} channels into {heads} heads")
    return (f32(b, t, heads, width // heads),)


def _merge_heads(sig: Signature) -> Types:
    b, t, h, d = sig.shape(0, 4)
    return (f32(b, t, static(sig, h, "head count") * static(sig, d, "head width")),)


def _gather_rows(sig: Signature) -> Types:
    b, _, d = sig.shape(0, 3)
    return (f32(b, sig.shape(1, 2)[1], d),)


_EPS = AttrDef("eps", AttrKind.FLOAT)
_ROUNDING = AttrDef("rounding", AttrKind.STR, "none")
_INPUTS = AttrDef("inputs", AttrKind.STR, "any")

CORE: tuple[OpDef, ...] = (
    OpDef("weight", (), _weight, doc="A lazy weight; its expression names the checkpoint tensors."),
    OpDef("embed", ("tokens", "table"), _embed, source="4 Embedding",
          doc="Row `table[token]` of each token."),
    OpDef("repeat_streams", ("x",), _repeat_streams, (AttrDef("n", AttrKind.INT),), source="4 Embedding",
          doc="The same row in each of `n` residual streams."),
    OpDef("linear", ("x", "w"), _linear, (_INPUTS,), source="3.4",
          doc='x w^T, w [N, K]; FP32 accumulation. inputs = "bf16" says that x holds BF16 numbers, whose'
              ' products may be summed in pairs; "int8" that it holds codes times scales of round_values by'
              ' int8 in blocks of 32, whose products with codes of w may be summed as integers.'),
    OpDef("grouped_linear", ("x", "w"), _grouped_linear, (AttrDef("groups", AttrKind.INT), _INPUTS),
          source="4.1 step 6",
          doc="Consecutive heads form groups; group g is multiplied by its own row block of w."),
    OpDef("rms_norm", ("x", "w"), _norm, (_EPS,), source="3.5",
          doc="x (mean(x^2) + eps)^-1/2 w over the last axis."),
    OpDef("unit_norm", ("x",), _unit_norm, (_EPS, _ROUNDING), source="4.1 step 1",
          doc='rms_norm without a weight; with rounding = "reference" the square, the mean, the sum with eps,'
              " the root and the product are each rounded to BF16."),
    OpDef("split_heads", ("x",), _split_heads, (AttrDef("heads", AttrKind.INT),),
          doc="[B,T,H*D] as [B,T,H,D]."),
    OpDef("merge_heads", ("x",), _merge_heads, doc="[B,T,H,D] as [B,T,H*D]."),
    OpDef("add", ("a", "b"), _binary, doc="a + b."),
    OpDef("add_bias", ("x", "bias"), _add_bias, doc="x + bias over the last axis."),
    OpDef("scale", ("x",), _same, (AttrDef("factor", AttrKind.FLOAT),), doc="x times a constant."),
    OpDef("clamp", ("x",), _same, (AttrDef("low", AttrKind.FLOAT), AttrDef("high", AttrKind.FLOAT)),
          source="4.4", doc="min(max(x, low), high)."),
    OpDef("swiglu", ("gate", "up"), _binary, source="4.4", doc="silu(gate) up."),
    OpDef("clamped_swiglu", ("gate", "up"), _binary, (AttrDef("limit", AttrKind.FLOAT),), source="4.4",
          doc="silu(min(gate, limit)) clamp(up, -limit, limit)."),
    OpDef("gather_rows", ("x", "rows"), _gather_rows,
          doc="x[b, rows[b, l]]: the positions whose logits are asked for."),
)  # fmt: skip
