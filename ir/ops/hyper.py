"""Manifold-constrained hyper-connections (section 4, blocks and head)."""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32

Types = tuple[TensorType, ...]


def _projection(sig: Signature, rows: int) -> None:
    _, _, n, d = sig.shape(0, 4)
    expected = (rows, static(sig, n, "stream count") * static(sig, d, "width"))
    sig.fits(1, *expected)
    sig.fits(2, rows)


def _hc_mix(sig: Signature) -> Types:
    b, t, dim, _ = sig.shape(0, 4)
    n = static(sig, dim, "stream count")
    _projection(sig, n * (2 + n))
    sig.fits(3, 3)
    return f32(b, t, n), f32(b, t, n), f32(b, t, n, n)


def _hc_head_mix(sig: Signature) -> Types:
    b, t, dim, _ = sig.shape(0, 4)
    _projection(sig, static(sig, dim, "stream count"))
    sig.fits(3, 1)
    return (f32(b, t, dim),)


def _hc_collapse(sig: Signature) -> Types:
    b, t, n, d = sig.shape(0, 4)
    sig.fits(1, b, t, n)
    return (f32(b, t, d),)


def _hc_expand(sig: Signature) -> Types:
    b, t, n, d = sig.shape(0, 4)
    sig.fits(1, b, t, d)
    sig.fits(2, b, t, n)
    sig.fits(3, b, t, n, n)
    return (f32(b, t, n, d),)


_EPS = (AttrDef("eps", AttrKind.FLOAT), AttrDef("norm_eps", AttrKind.FLOAT))

HYPER: tuple[OpDef, ...] = (
    OpDef("hc_mix", ("streams", "fn", "base", "scale"), _hc_mix, (*_EPS, AttrDef("iters", AttrKind.INT)),
          source="4 steps 1 to 3", doc="pre, post and the Sinkhorn-normalised comb of a sub-layer."),
    OpDef("hc_collapse", ("streams", "pre"), _hc_collapse, source="4 step 4", doc="sum_j pre_j X_j."),
    OpDef("hc_expand", ("streams", "y", "post", "comb"), _hc_expand, source="4 step 5",
          doc="X'_k = post_k y + sum_j comb_jk X_j."),
    OpDef("hc_head_mix", ("streams", "fn", "base", "scale"), _hc_head_mix, _EPS, source="4 Head",
          doc="The head's collapse weights."),
)  # fmt: skip
