"""The image encoder and how its rows enter the text (specification of V4.1, section 9).

An image has N patches of the ViT, at rows and columns of a grid; k patches side by side make one of its M
image tokens, and a span of S positions holds them in the text. All three counts are known when an image is.
"""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32

Types = tuple[TensorType, ...]


def _grid_angles(sig: Signature) -> Types:
    b, n, two = sig.shape(0, 3)
    sig.equal(two, 2, "row and column")
    quarter = static(sig, sig.shape(1, 1)[0], "frequency count")
    return f32(b, n, 2 * quarter), f32(b, n, 2 * quarter)


def _full_attention(sig: Signature) -> Types:
    shape = sig.shape(0, 4)
    sig.fits(1, *shape)
    sig.fits(2, *shape)
    return (f32(*shape),)


def _gather_cells(sig: Signature) -> Types:
    b, _, d = sig.shape(0, 3)
    cells, count, k = sig.shape(1, 3)
    sig.equal(cells, b, "the images of patches and cells")
    return (f32(b, count, static(sig, d, "width") * static(sig, k, "cell size")),)


def _image_span(sig: Signature) -> Types:
    b, _, d = sig.shape(0, 3)
    images, span = sig.shape(1, 2)
    sig.equal(images, b, "the images of rows and layout")
    for index in (2, 3, 4):
        sig.fits(index, d)
    return (f32(b, span, d),)


def _merge_images(sig: Signature) -> Types:
    b, t, d = sig.shape(0, 3)
    sig.fits(1, b, t)
    sig.fits(2, b, sig.shape(2, 3)[1], d)
    sig.fits(3, b)
    return (f32(b, t, d),)


def _gelu(sig: Signature) -> Types:
    return (f32(*sig.shape(0)),)


VISION: tuple[OpDef, ...] = (
    OpDef("grid_angles", ("places", "frequencies"), _grid_angles, source="V4.1 9.2",
          doc="cos and sin of row x frequency, then of column x frequency; the product rounds to FP32."),
    OpDef("full_attention", ("q", "k", "v"), _full_attention, (AttrDef("scale", AttrKind.FLOAT),),
          source="V4.1 9.2", doc="softmax(scale q k^T) v per head over all N, without a mask."),
    OpDef("gelu", ("x",), _gelu, source="V4.1 9.3", doc="x (1 + erf(x / sqrt 2)) / 2."),
    OpDef("gather_cells", ("x", "cells"), _gather_cells, source="V4.1 9.3",
          doc="The k rows of x [B,N,d] that `cells` [B,M,k] names, channel by channel: entry c k + i of a"
              " result is channel c of row i; row -1 is zero."),
    OpDef("image_span", ("rows", "layout", "start", "newline", "end"), _image_span, source="V4.1 9.4",
          doc="rows[layout], and start, newline, end where the layout says -1, -2, -3."),
    OpDef("merge_images", ("x", "tokens", "images", "n_images"), _merge_images,
          (AttrDef("image_token", AttrKind.INT),), source="V4.1 9.4",
          doc="x, but row i of `images` in place of the i-th image token of this call, for i < n_images and"
              " i < I."),
)  # fmt: skip
