"""Quantises float matrices to the stored formats: FP8 E4M3 with tile scales and packed FP4 with row scales.

The inverse of `dsv4c.ir.dtypes.decode` and of the decode weight expressions. Knows no names and no files.
Source: model specification, sections 2.1, 3.1 to 3.3; rounding is to nearest, ties to the even code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CheckpointError
from dsv4c.ir.dtypes import Array, DType, F32Array, decode

from .table import FP4_GROUP

Bytes = npt.NDArray[np.uint8]

_FP8_FLOOR = np.float32(1e-4)  # smallest block maximum an FP8 scale is made for
_FP4_FLOOR = np.float32(6 * 2.0**-126)
_INV_448 = np.array(0x3B124925, np.uint32).view(np.float32)  # 1/448 and 1/6, rounded to float32
_INV_6 = np.array(0x3E2AAAAB, np.uint32).view(np.float32)


def round_minifloat(values: F32Array, min_exponent: int, mantissa_bits: int, limit: float) -> Bytes:
    """Magnitude codes of the nearest representable |value|, saturating at `limit`; the sign is not included.

    `min_exponent` is that of the smallest normal number. Codes ascend with the value, so the code of a
    number is its distance from zero counted in representable numbers.
    """
    magnitude = np.minimum(np.abs(values), np.float32(limit))
    found = np.where(magnitude == 0, min_exponent, np.frexp(magnitude)[1] - 1)  # frexp gives zero exponent 0
    exponent = np.maximum(found, min_exponent)
    steps = np.rint(np.ldexp(magnitude, mantissa_bits - exponent)).astype(np.int32)
    return np.asarray(((exponent - min_exponent) << mantissa_bits) + steps, np.uint8)


def _signed(codes: Bytes, values: F32Array, bit: int) -> Bytes:
    return np.where(np.signbit(values), codes | np.uint8(bit), codes)


def to_e4m3(values: F32Array) -> Bytes:
    """float32 -> E4M3 (FN) codes, clamped to +-448."""
    return _signed(round_minifloat(values, -6, 3, 448.0), values, 0x80)


def to_e2m1(values: F32Array) -> Bytes:
    """float32 -> E2M1 codes 0..15, clamped to +-6."""
    return _signed(round_minifloat(values, 0, 1, 6.0), values, 0x08)


def pow2_ceil(values: F32Array) -> Bytes:
    """E8M0 code of the smallest power of two that is not below each positive float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.asarray((bits >> 23) + ((bits & 0x7FFFFF) != 0), np.uint8)


def pack_fp4(codes: Bytes) -> Bytes:
    """[..., 2n] E2M1 codes -> [..., n] bytes, the even index in the low nibble."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def encode_fp8(
    values: Array, block: tuple[int, int] = (128, 128), scale_dtype: DType = DType.F8E8M0
) -> tuple[Bytes, Array]:
    """f32 [o, i] -> (E4M3 codes [o, i], one scale per tile); the last tiles may be ragged.

    Args:
        scale_dtype: F8E8M0 gives power-of-two scales as codes, F32 gives maximum / 448.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    x = _finite(values)
    floor = np.maximum(_tile_max(x, block), _FP8_FLOOR)
    raw = (floor * _INV_448).astype(np.float32)
    scale: Array = pow2_ceil(raw) if scale_dtype is DType.F8E8M0 else raw
    return to_e4m3(x / _spread(decode(scale, scale_dtype), block, x.shape)), scale


def encode_fp4(values: Array) -> tuple[Bytes, Bytes]:
    """f32 [o, i] -> (packed E2M1 [o, i/2], E8M0 scale [o, ceil(i/32)]).

    Raises:
        CheckpointError: a value is NaN or infinite, or the number of columns is odd.
    """
    x = _finite(values)
    if x.shape[1] % 2:
        raise CheckpointError(
            f"a matrix of {x.shape[1]} columns cannot be packed FP4", allowed="an even number"
        )
    block = (1, FP4_GROUP)
    scale = pow2_ceil((np.maximum(_tile_max(x, block), _FP4_FLOOR) * _INV_6).astype(np.float32))
    return pack_fp4(to_e2m1(x / _spread(decode(scale, DType.F8E8M0), block, x.shape))), scale


def _finite(values: Array) -> F32Array:
    x = np.asarray(values, np.float32)
    if not np.isfinite(x).all():
        raise CheckpointError("a value to encode is NaN or infinite", allowed="finite numbers")
    return x


def _tile_max(x: F32Array, block: tuple[int, int]) -> F32Array:
    """[o, i] -> [ceil(o/rows), ceil(i/columns)]: the largest magnitude of every tile."""
    rows = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[0], block[0]), axis=0)
    return np.maximum.reduceat(rows, np.arange(0, x.shape[1], block[1]), axis=1)


def _spread(scale: Array, block: tuple[int, int], shape: tuple[int, ...]) -> F32Array:
    """One scale per tile -> one per element, or per column where a tile is one row high."""
    columns = np.repeat(scale, block[1], axis=1)[:, : shape[1]]
    return np.asarray(np.repeat(columns, block[0], axis=0)[: shape[0]], np.float32)
