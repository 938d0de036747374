"""Changes of storage that keep every value: new codes and scales from old ones, without a float between.

Works on raw arrays, knows no names and no expressions. `EXACT` lists the pairs of schemes it can join; a
matrix whose values the new scheme does not hold is an error, never an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsv4c.errors import CompileError

from .dtypes import E2M1, Array, DType, decode, unpack
from .encode import Bytes, fn_to_fnuz, to_e4m3
from .formats import SCHEMES, Scheme


@dataclass(frozen=True)
class Recoding:
    """How one scheme becomes another.

    Attributes:
        codes: (old codes, old scales) -> new codes; None when the codes stay as they are.
        scales: (old scales, rows, cols of the values) -> new scales; None when they stay.
        why: why it is exact, and when it is not.
    """

    codes: Callable[[Array, Array], Bytes] | None
    scales: Callable[[Array, int, int], Array] | None
    why: str


def _retile(old: Scheme, new: Scheme, scales: Array, rows: int, cols: int) -> Array:
    """Each new block takes the scale of the old block around it."""
    (oh, ow), (nh, nw) = old.tile(rows, cols), new.tile(rows, cols)
    high, wide = new.scale_shape(rows, cols)
    return scales[np.arange(high)[:, None] * nh // oh, np.arange(wide)[None] * nw // ow]


def _tile_scales(scales: Array, rows: int, cols: int) -> Bytes:
    """mxfp4 -> fp8 (section 2.1): S = 2^-6 times the largest group scale of a 128 x 128 tile, >= 2^-126."""
    groups = np.maximum.reduceat(scales.view(np.uint8), np.arange(0, scales.shape[1], 4), axis=1)
    largest = np.maximum.reduceat(groups, np.arange(0, rows, 128), axis=0)
    if (largest == 255).any():
        raise CompileError("a scale is NaN", allowed="E8M0 codes 0 to 254")
    return np.maximum(largest.astype(np.int32) - 6, 1).astype(np.uint8)


def _e2m1_in_tiles(codes: Array, scales: Array) -> Bytes:
    """mxfp4 -> fp8: E2M1 code times (own scale / S) as E4M3, refused where that is no E4M3 number."""
    rows, cols = codes.shape[0], 2 * codes.shape[1]
    tiles = _tile_scales(scales, rows, cols).astype(np.int32)
    out = np.empty((rows, cols), np.uint8)
    for i in range(len(tiles)):  # one band of tiles at a time keeps the temporaries small
        band = slice(128 * i, 128 * (i + 1))
        group = scales[band].view(np.uint8).astype(np.int32)
        ratio = np.ldexp(np.float32(1), group - np.repeat(tiles[i], 4)[None, : group.shape[1]])
        values = E2M1[unpack(codes[band])] * np.repeat(ratio, 32, axis=1)[:, :cols]
        out[band] = to_e4m3(values.astype(np.float32))
        if not np.array_equal(decode(out[band], DType.F8E4M3), values):
            raise CompileError(
                "scales inside one 128 x 128 tile differ by more than 2^14", allowed="an exact conversion",
                hint="mxfp8 keeps the scale of every group",
            )  # fmt: skip
    return out


def _double(scales: Array) -> Bytes:
    """E8M0 scales times two."""
    bits = scales.view(np.uint8)
    if (bits == 254).any():
        raise CompileError("a scale of 2^127 cannot be doubled", allowed="E8M0 scales below 2^127")
    return np.where(bits == 255, bits, bits + np.uint8(1))


def _e2m1_as_e4m3(codes: Array, _: Array) -> Bytes:
    return to_e4m3(E2M1)[unpack(codes)]


_FP8, _MXFP8 = SCHEMES["fp8"], SCHEMES["mxfp8"]

EXACT: dict[tuple[str, str], Recoding] = {
    ("fp8", "mxfp8"): Recoding(
        None, lambda s, r, c: _retile(_FP8, _MXFP8, s, r, c), "32 divides 128: every group lies in one tile"
    ),
    ("fp8", "fp8_f32"): Recoding(None, lambda s, r, c: decode(s, DType.F8E8M0), "powers of two are float32"),
    ("fp8", "fp8_fnuz"): Recoding(
        lambda c, s: fn_to_fnuz(c.view(np.uint8)),
        lambda s, r, c: _double(s),
        "the same bits mean half as much; refused for a scale of 2^127",
    ),
    ("mxfp4", "mxfp8"): Recoding(_e2m1_as_e4m3, None, "every E2M1 number is an E4M3 number"),
    ("mxfp4", "fp8"): Recoding(
        _e2m1_in_tiles, _tile_scales, "section 2.1; refused where one tile spans more than 2^14"
    ),
    ("mxfp4", "fp8_fnuz"): Recoding(
        lambda c, s: fn_to_fnuz(_e2m1_in_tiles(c, s)),
        lambda s, r, c: _double(_tile_scales(s, r, c)),
        "by way of fp8",
    ),
}
"""(old scheme, new scheme) -> the conversion that keeps every value."""
