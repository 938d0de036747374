"""Router, dispatch, combine, and the fused expert MLP (section 4.4).

`dispatch` gives each expert its rows as a tensor of its own; how many is known only at run time, so
each has its own symbolic dimension ``<label>.<expert>``.
"""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.dims import sym
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32, i32

Types = tuple[TensorType, ...]


def _same(sig: Signature) -> Types:
    return (f32(*sig.shape(0)),)


def _route_topk(sig: Signature) -> Types:
    b, t, e = sig.shape(0, 3)
    sig.equal(sig.shape(1, 1)[0], e, "the experts of scores and bias")
    if sig.int("k") > static(sig, e, "expert count"):
        sig.fail(f"cannot choose {sig.int('k')} of {e} experts")
    if len(sig.types) == 3:
        sig.fail("needs an image_bias beside the tokens")
    if len(sig.types) > 2:
        sig.fits(2, b, t)
        sig.fits(3, e)
    return (i32(b, t, sig.int("k")),)


def _route_hash(sig: Signature) -> Types:
    return (i32(*sig.shape(0, 2), sig.shape(1, 2)[1]),)


def _route_weights(sig: Signature) -> Types:
    b, t, _ = sig.shape(0, 3)
    sig.fits(1, b, t, sig.shape(1, 3)[2])
    return (f32(*sig.shape(1, 3)),)


def _routing(sig: Signature, first: int = 0) -> None:
    """From operand `first`: x [B,T,d], ids and weights [B,T,k], n_valid [B]."""
    b, t, _ = sig.shape(first, 3)
    k = sig.shape(first + 1, 3)[2]
    sig.fits(first + 1, b, t, k)
    sig.fits(first + 2, b, t, k)
    sig.fits(first + 3, b)


def _dispatch(sig: Signature) -> Types:
    _routing(sig)
    _, _, d = sig.shape(0, 3)
    out: list[TensorType] = []
    for expert in range(sig.int("experts")):
        rows = sym(f"{sig.attrs['label']}.{expert}")
        out += [f32(rows, d), f32(rows)]
    return tuple(out)


def _scale_rows(sig: Signature) -> Types:
    sig.equal(sig.shape(0, 2)[0], sig.shape(1, 1)[0], "the rows of x and weights")
    return (f32(*sig.shape(0)),)


def _combine(sig: Signature) -> Types:
    b, t, _ = sig.shape(0, 3)
    d = sig.shape(2, 2)[1]
    sig.fits(1, b)
    for index in range(2, len(sig.types)):
        sig.equal(sig.shape(index, 2)[1], d, "the width of every expert's rows")
    return (f32(b, t, d),)


def _experts(sig: Signature, first: int = 0) -> int:
    """From operand `first`: what `_routing` takes, w13 [E,2i,d], w2 [E,d,i]; returns E."""
    _routing(sig, first)
    d = sig.shape(first, 3)[2]
    e, i2, k = sig.shape(first + 4, 3)
    sig.equal(k, d, "the width of x and w13")
    sig.fits(first + 5, e, d, static(sig, i2, "expert width") // 2)
    return static(sig, e, "expert count")


def _expert_mlp(sig: Signature) -> Types:
    _experts(sig)
    rows = ("bf16_rows", "int8_rows", "e4m3_rows", "int8_token")
    sig.choice("rounding", "none", "bf16", "fp16", "e4m3", "mxfp8", *rows)
    if sig.int("block") < 0:
        sig.fail(f"cannot round hidden values in blocks of {sig.int('block')}")
    return (f32(*sig.shape(0)),)


def _expert_statistics(sig: Signature) -> Types:
    sig.fits(0, _experts(sig, 1), 3)
    return (sig.type(0),)


def _input_statistics(sig: Signature) -> Types:
    b, _, k = sig.shape(1, 3)
    sig.fits(0, k)
    sig.fits(2, b)
    return (sig.type(0),)


MOE: tuple[OpDef, ...] = (
    OpDef("sqrt_softplus", ("x",), _same, source="4.4", doc="sqrt(log(1 + exp(x)))."),
    OpDef("route_topk", ("scores", "bias", "tokens?", "image_bias?"), _route_topk,
          (AttrDef("k", AttrKind.INT), AttrDef("image_token", AttrKind.INT, -1)), source="4.4; V4.1 4.6",
          doc="Ids of the k largest of scores + bias, ties to the lower id; of scores + image_bias where the"
              " token is image_token."),
    OpDef("route_hash", ("tokens", "table"), _route_hash, source="4.4", doc="table[token]."),
    OpDef("route_weights", ("scores", "ids"), _route_weights,
          (AttrDef("factor", AttrKind.FLOAT), AttrDef("eps", AttrKind.FLOAT)), source="4.4",
          doc="factor s_e / (sum of the chosen s + eps)."),
    OpDef("dispatch", ("x", "ids", "weights", "n_valid"), _dispatch,
          (AttrDef("experts", AttrKind.INT), AttrDef("label", AttrKind.STR)), source="4.4",
          doc="Per expert the rows of x that chose it and their routing weights, in token order; padding"
              " is dropped."),
    OpDef("scale_rows", ("x", "weights"), _scale_rows, source="4.4", doc="Row i of x times weights[i]."),
    OpDef("combine", ("ids", "n_valid", "ys*"), _combine, source="4.4",
          doc="The inverse of dispatch: per token the sum of its experts' rows, ascending expert; padding"
              " gets 0."),
    OpDef("expert_mlp", ("x", "ids", "weights", "n_valid", "w13", "w2"), _expert_mlp,
          (AttrDef("limit", AttrKind.FLOAT), AttrDef("rounding", AttrKind.STR, "none"),
           AttrDef("block", AttrKind.INT, 128)), source="4.4; V4.1 3",
          doc="dispatch, every expert's clamped SwiGLU MLP with the routing weight before w2, and combine, in"
              ' one. With rounding = "bf16" the three products and the hidden values are rounded to BF16;'
              ' with "e4m3" the hidden values also pass round_values of that rule and `block`. "fp16" is'
              ' "bf16" with FP16 in its place; with "mxfp8" only the hidden values are rounded, by e4m3 in'
              ' blocks of 32; "bf16_rows" says that x holds BF16 numbers and rounds the hidden values to'
              ' BF16, so that products may be summed in pairs; "int8_rows" says that x holds codes times'
              ' scales of round_values by int8 in blocks of 32 and rounds the hidden values so; "e4m3_rows"'
              ' is the same by e4m3 and `block`, "int8_token" by int8 and whole rows.'),
    OpDef("expert_statistics", ("counts", "x", "ids", "weights", "n_valid", "w13", "w2"), _expert_statistics,
          (AttrDef("limit", AttrKind.FLOAT),), consumes=0, source="REAP, arXiv:2510.13999",
          doc="counts plus, per expert, the tokens that chose it and the sums of their routing weights and of"
              " the norms of its weighted outputs; padding is not counted."),
    OpDef("input_statistics", ("sums", "x", "n_valid"), _input_statistics, consumes=0, source="none",
          doc="sums plus, per column, the squares of x [B,T,K] over all tokens; padding is not counted."),
)  # fmt: skip
