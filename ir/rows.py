"""Reads weight expressions some rows at a time: what lies between a file and new codes stays in the cache.

Owns the decoding of published FP8 and packed FP4. Knows nothing of files; what it cannot read by rows it is
given whole.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .dtypes import Array, DType, F32Array, decode
from .expr import WeightExpr

Rows = Callable[[slice], Array]
"""A range of rows, both ends given -> their raw storage."""

Whole = Callable[[WeightExpr], Array]
"""The raw storage of a whole expression."""

FP4_GROUP = 32
"""Columns of packed FP4 that share a scale."""


def by_rows(x: WeightExpr) -> bool:
    """Whether `rows_of` makes no more of `x` than the rows it is asked for."""
    match x.op:
        case "source":
            return bool(x.shape)
        case "rows" | "decode_fp4" | "decode_fp8":
            return by_rows(x.args[0])
        case "cast":
            return x.dtype is DType.F32 and by_rows(x.args[0])
        case _:
            return False


def rows_of(x: WeightExpr, whole: Whole) -> Rows:
    """A reader of the rows of `x`: raw storage of `x.dtype`, a view where nothing needs decoding.

    Args:
        whole: evaluates what cannot be read by rows; it is called now, and once.
    """
    match x.op:
        case "rows":
            inner, start = rows_of(x.args[0], whole), x.attr("start")
            assert isinstance(start, int)
            return lambda band: inner(slice(start + band.start, start + band.stop))
        case "cast" if x.dtype is DType.F32:
            inner, dtype = rows_of(x.args[0], whole), x.args[0].dtype
            return lambda band: decode(inner(band), dtype).astype(np.float32, copy=False)
        case "decode_fp4":
            codes, scales = (rows_of(a, whole) for a in x.args)
            dtype = x.args[1].dtype
            return lambda band: _fp4(codes(band), decode(scales(band), dtype))
        case "decode_fp8":
            codes, block, (first, second) = rows_of(x.args[0], whole), x.attr("block"), x.args
            assert isinstance(block, tuple)
            tile, tiles = (int(block[0]), int(block[1])), decode(whole(second), second.dtype)
            return lambda band: _fp8(decode(codes(band), first.dtype), tiles, tile, band.start)
        case _:
            array = whole(x)
            return lambda band: array[band]


def _fp4(codes: Array, scales: Array) -> F32Array:
    """Packed E2M1 [r, n/2] and scales [r, ceil(n/32)] -> float32 [r, n]."""
    values = np.asarray(decode(codes, DType.F4E2M1X2), np.float32)
    scale = np.asarray(scales, np.float32)
    rows, cols = values.shape
    if cols % FP4_GROUP == 0:
        groups = values.reshape(rows, -1, FP4_GROUP)
        groups *= scale[:, :, None]
    else:
        values *= np.repeat(scale, FP4_GROUP, axis=1)[:, :cols]
    return values


def _fp8(values: Array, tiles: Array, tile: tuple[int, int], start: int) -> F32Array:
    """float32 codes [r, n], scaled in place; row 0 is row `start` of the matrix that `tiles` belong to."""
    out = np.asarray(values, np.float32)
    (high, wide), (rows, cols) = tile, out.shape
    for i in range(start // high, -(-(start + rows) // high)):
        part = slice(max(i * high - start, 0), (i + 1) * high - start)
        out[part] *= np.repeat(np.asarray(tiles[i], np.float32), wide)[:cols]
    return out
