"""Encodes float32 matrices into the schemes of `formats.py` and decodes them, bit for bit.

Works on arrays; knows no names, files or expressions. Every rule rounds to nearest, ties to even, in
float32. With a the largest magnitude of a block (of the whole matrix: A), a stored block is

| scheme   | scale                                          | code of x                            |
|----------|------------------------------------------------|--------------------------------------|
| int8     | F32 s = a/127                                  | rint(x/s), clamped to +-127          |
| int4*    | BF16 s = bf16(a/7)                             | rint(x/s), clamped to +-7            |
| fp8      | E8M0 s = P(max(a, 1e-4) c), c = float32(1/448) | e4m3(x/s), clamped to +-448          |
| fp8_f32  | F32 s = max(a, 1e-4) c                         | the same                             |
| fp8_fnuz | E8M0 s = 2 P(max(a, 1e-4) c)                   | that of fp8; 0x80 (-0) becomes 0     |
| mxfp8    | E8M0 s = 2^(floor(log2 a) - 8), at least 2^-126 | e4m3(x/s), clamped to +-448         |
| mxfp4    | E8M0 s = 2^(floor(log2 a) - 2), at least 2^-126 | e2m1(x/s), clamped to +-6           |
| nvfp4    | E4M3 s = e4m3((a/6)/t), F32 t = A/2688         | e2m1(x/(s t)), clamped; 0 where s = 0 |

where P(y) = 2^ceil(log2 y). An F32 or BF16 scale whose quotient is below 2^-126 is 1, so a block of zeros
has scale 1 and codes 0. Sources: model specification sections 2.1, 3.1 to 3.3; OCP microscaling formats 1.0
section 6.3 (mxfp8, mxfp4); the nvfp4 rule is that of NVIDIA's two-level scaling with 2688 = 448 * 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CompileError

from .dtypes import Array, DType, F32Array, decode, f32_to_bf16, pack
from .formats import Scheme

Bytes = npt.NDArray[np.uint8]
Rows = Callable[[slice], Array]
"""A range of rows of a matrix, both ends given -> its float32 values."""

_TINY = np.float32(2.0**-126)
_FP8_FLOOR = np.float32(1e-4)
_INV_448 = np.array(0x3B124925, np.uint32).view(np.float32)  # 1/448 rounded to float32, section 3.1
_BAND = 1 << 17  # values encoded at a time: the temporaries of one band stay in the cache


@dataclass(frozen=True, eq=False)
class Encoded:
    """Raw storage of one matrix; `tensor_scale` is float32 [1] or None."""

    codes: Array
    scales: Array
    tensor_scale: F32Array | None = None


# --------------------------------------------------------------------------------- number formats


def round_minifloat(values: F32Array, min_exponent: int, mantissa_bits: int, limit: float) -> Bytes:
    """Magnitude codes of the nearest representable |value|, saturating at `limit`; the sign is not included.

    `min_exponent` is that of the smallest normal number. Codes ascend with the value, so the code of a
    number is its distance from zero counted in representable numbers.
    """
    magnitude = np.minimum(np.abs(values), np.float32(limit))
    bits, drop = magnitude.view(np.uint32), 23 - mantissa_bits
    normal = (bits + np.uint32((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    normal -= np.uint32((126 + min_exponent) << mantissa_bits)  # wraps for subnormals, which are not taken
    # A number whose last place is the spacing of the subnormals: adding it rounds to that spacing.
    magic = np.float32(2.0 ** (min_exponent + drop))
    small = (magnitude + magic).view(np.uint32) - magic.view(np.uint32)
    return np.where(magnitude < np.float32(2.0**min_exponent), small, normal).astype(np.uint8)


def _signed(codes: Bytes, values: F32Array, bit: int) -> Bytes:
    return codes | (np.signbit(values).view(np.uint8) << np.uint8(bit))


def to_e4m3(values: F32Array) -> Bytes:
    """float32 -> E4M3 (FN) codes, clamped to +-448."""
    return _table(-6, 3, 448.0, 7).take(_keys(values))


def to_e2m1(values: F32Array) -> Bytes:
    """float32 -> E2M1 codes 0..15, clamped to +-6."""
    return _table(0, 1, 6.0, 3).take(_keys(values))


def _keys(values: F32Array) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 numbers; the last bit also says whether anything follows.

    Between two numbers of BF16 there is no place where a format of at most 6 bits of mantissa rounds
    differently, so these bits say which code is the nearest.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.asarray((bits >> 16) | ((bits << 16) != 0), np.uint16)


@cache
def _table(min_exponent: int, mantissa_bits: int, limit: float, sign: int) -> Bytes:
    """[65536] codes with the sign in bit `sign`, by `_keys`."""
    keys = np.arange(1 << 16, dtype=np.uint32)
    values = ((keys << 16) | (keys & 1)).view(np.float32)
    codes = round_minifloat(np.nan_to_num(values), min_exponent, mantissa_bits, limit)
    return _signed(codes, values, sign)


def fn_to_fnuz(codes: Bytes) -> Bytes:
    """E4M3 FN codes -> FNUZ codes of half the value: the same bits, -0 becomes 0, both NaN become 0x80.

    Exact for every code: half of 448 is 224, and FNUZ reaches 240.
    """
    nan = (codes & 0x7F) == 0x7F
    return np.where(nan, np.uint8(0x80), np.where(codes == 0x80, np.uint8(0), codes))


def pow2_ceil(values: F32Array) -> Bytes:
    """P(y): E8M0 code of the smallest power of two that is not below each positive, normal float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.asarray((bits >> 23) + ((bits & 0x7FFFFF) != 0), np.uint8)


def _pow2_floor(values: F32Array, less: int) -> Bytes:
    """E8M0 code of 2^(floor(log2 y) - less), at least 1, which is 2^-126."""
    exponent = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 23).astype(np.int32)
    return np.asarray(np.maximum(exponent - less, 1), np.uint8)


# ----------------------------------------------------------------------------------- scales


def _quotient(peak: F32Array, by: int) -> F32Array:
    quotient = (peak / np.float32(by)).astype(np.float32)
    return np.where(quotient < _TINY, np.float32(1), quotient)


def _fp8_raw(peak: F32Array) -> F32Array:
    return np.asarray(np.maximum(peak, _FP8_FLOOR) * _INV_448, np.float32)


def _nvfp4_scale(peak: F32Array, tensor: F32Array) -> Bytes:
    return to_e4m3(((peak / np.float32(6)) / tensor).astype(np.float32))


_ScaleRule = Callable[[F32Array, F32Array], Array]
_SCALES: dict[str, _ScaleRule] = {
    "int8": lambda peak, _: _quotient(peak, 127),
    "int4": lambda peak, _: f32_to_bf16(_quotient(peak, 7)),
    "int4_g64": lambda peak, _: f32_to_bf16(_quotient(peak, 7)),
    "int4_g128": lambda peak, _: f32_to_bf16(_quotient(peak, 7)),
    "fp8": lambda peak, _: pow2_ceil(_fp8_raw(peak)),
    "fp8_f32": lambda peak, _: _fp8_raw(peak),
    "fp8_fnuz": lambda peak, _: pow2_ceil(_fp8_raw(peak)) + np.uint8(1),
    "mxfp8": lambda peak, _: _pow2_floor(peak, 8),
    "mxfp4": lambda peak, _: _pow2_floor(peak, 2),
    "nvfp4": _nvfp4_scale,
}
"""Scheme -> raw scales from the largest magnitudes and the tensor scale."""


def _integers(x: F32Array, limit: int) -> npt.NDArray[np.int8]:
    return np.clip(np.rint(x, out=x), -limit, limit, out=x).astype(np.int8)


_CODES: dict[DType, Callable[[F32Array], Array]] = {
    DType.I8: lambda x: _integers(x, 127),
    DType.I4X2: lambda x: pack(_integers(x, 7).view(np.uint8) & np.uint8(15)),
    DType.F8E4M3: to_e4m3,
    DType.F8E4M3FNUZ: lambda x: fn_to_fnuz(to_e4m3(x * np.float32(2))),
    DType.F4E2M1X2: lambda x: pack(to_e2m1(x)),
}
"""Code type -> raw codes of x/scale, an array that may be overwritten."""


def _to_f16(x: F32Array) -> Array:
    """The nearest FP16 numbers, ties to even; subnormal or 0 where there is no normal one."""
    peak = np.abs(x).max(initial=0)
    if peak >= 65520:  # half way to what would be the next number
        raise CompileError(
            f"a magnitude of {peak:.6g} is beyond FP16", allowed="65504, its largest number",
            hint="keep this class of weights in bf16 or f32, or take other numerics",
        )  # fmt: skip
    return x.astype(np.float16)


_PLAIN: dict[DType, Callable[[F32Array], Array]] = {
    DType.F32: lambda x: x,
    DType.BF16: f32_to_bf16,
    DType.F16: _to_f16,
}
"""Element type of a plain scheme -> raw numbers."""


# ----------------------------------------------------------------------------------- tiles


def tile_max(x: F32Array, tile: tuple[int, int]) -> F32Array:
    """[o, i] -> [ceil(o/rows), ceil(i/columns)]: the largest magnitude of every tile."""
    high, wide = min(tile[0], len(x)), min(tile[1], x.shape[1])
    magnitude = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[1], wide), axis=1)
    return np.maximum.reduceat(magnitude, np.arange(0, len(x), high), axis=0) if high > 1 else magnitude


def spread(scale: F32Array, tile: tuple[int, int], shape: tuple[int, ...]) -> F32Array:
    """One scale per tile -> something that broadcasts over a [rows, columns] of `shape`."""
    high, wide = tile
    out = scale if wide >= shape[1] else np.repeat(scale, wide, axis=1)[:, : shape[1]]
    return out if high == 1 or (high >= shape[0]) else np.repeat(out, high, axis=0)[: shape[0]]


def bands(rows: int, cols: int, high: int) -> Iterator[slice]:
    """Row ranges of about `_BAND` values, each of whole tiles of `high` rows."""
    step = max(_BAND // max(cols, 1) // high, 1) * high
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


# ------------------------------------------------------------------------------ encode, decode


def encode(
    x: F32Array, scheme: Scheme, search: bool = False, importance: F32Array | None = None
) -> Encoded:
    """float32 [rows, cols] -> its storage; packed codes need an even `cols`.

    Args:
        search: of several largest magnitudes a to make a scale for (see `CLIPS`) keep per block the one with
            the least squared error, the first where errors are equal.
        importance: [cols], what the squared error of a column counts for, e.g. its mean squared input; only
            with `search`.

    Raises:
        CompileError: a value is NaN or infinite.
    """
    return encode_rows(lambda band: x[band], x.shape, scheme, search, importance)


def encode_rows(
    read: Rows, shape: tuple[int, ...], scheme: Scheme, search: bool = False,
    importance: F32Array | None = None, only_scales: bool = False,
) -> Encoded:  # fmt: skip
    """`encode` of a matrix [rows, cols] that is read some rows at a time and never there as a whole.

    Args:
        read: called in order, once per range of rows; once more before that where there is a tensor scale.
        only_scales: leave the codes out; they are an empty array.
    """
    rows, cols = shape
    codes = np.empty((0, cols) if only_scales else scheme.code_shape(rows, cols), scheme.code.storage)
    if scheme.scale is None:
        for band in bands(rows, cols, 1):
            part = np.asarray(read(band), np.float32)
            _expect_finite(part)
            codes[band] = _PLAIN[scheme.code](part)
        return Encoded(codes, np.empty(0, np.float32))
    tile, tensor = scheme.tile(rows, cols), tensor_scale_rows(read, shape, scheme)
    scales = np.empty(scheme.scale_shape(rows, cols), scheme.scale.storage)
    for band in bands(rows, cols, tile[0]):
        part = np.ascontiguousarray(read(band), np.float32)
        made = _scales(part, scheme, tile, tensor, search, importance)
        scales[band.start // tile[0] : -(-band.stop // tile[0])] = made
        if not only_scales:
            codes[band] = _CODES[scheme.code](_divide(part, made, scheme, tile, tensor))
    return Encoded(codes, scales, tensor if scheme.tensor_scale else None)


def encode_scales(
    x: F32Array, scheme: Scheme, search: bool = False, importance: F32Array | None = None
) -> Array:
    """The scales of `encode`, without making the codes."""
    return encode_rows(lambda band: x[band], x.shape, scheme, search, importance, only_scales=True).scales


def tensor_scale_of(x: F32Array, scheme: Scheme) -> F32Array:
    """float32 [1]: A/2688 for schemes that have a tensor scale (1 where that is below 2^-126), else 1."""
    return tensor_scale_rows(lambda band: x[band], x.shape, scheme)


def tensor_scale_rows(read: Rows, shape: tuple[int, ...], scheme: Scheme) -> F32Array:
    """`tensor_scale_of` a matrix that is read some rows at a time."""
    if not scheme.tensor_scale:
        return np.ones(1, np.float32)
    parts = (np.asarray(read(band), np.float32) for band in bands(shape[0], shape[1], 1))
    peak = np.max(np.array([0, *(np.abs(part).max(initial=0) for part in parts)], np.float32), keepdims=True)
    _expect_finite(peak)
    return _quotient(peak, 448 * 6)


def _expect_finite(x: F32Array) -> None:
    if not np.isfinite(x).all():
        raise CompileError("a value to encode is NaN or infinite", allowed="finite numbers")


def decode_matrix(codes: Array, scales: Array, tensor_scale: Array | None, scheme: Scheme) -> F32Array:
    """The float32 [rows, cols] of raw storage; `tensor_scale` may hold one number per equal band of rows."""
    assert scheme.scale is not None
    rows, cols = codes.shape[0], codes.shape[1] * scheme.values_per_byte
    tile, out = scheme.tile(rows, cols), np.empty((rows, cols), np.float32)
    for band in bands(rows, cols, tile[0]):
        values = decode(codes[band], scheme.code)
        scale = decode(scales[band.start // tile[0] : -(-band.stop // tile[0])], scheme.scale)
        np.multiply(values, spread(np.asarray(scale, np.float32), tile, values.shape), out=out[band])
    if tensor_scale is not None:
        per_row = np.repeat(np.asarray(tensor_scale, np.float32), rows // len(tensor_scale))
        out *= per_row[:, None]
    return out


def _divide(
    x: F32Array, scales: Array, scheme: Scheme, tile: tuple[int, int], tensor: F32Array
) -> F32Array:
    """x / scale as the codes take it; 0 where an nvfp4 scale is 0."""
    assert scheme.scale is not None
    scale = np.asarray(decode(scales, scheme.scale), np.float32)
    if scheme.tensor_scale:
        scale = np.asarray(scale * tensor, np.float32)
        scale[scale == 0] = np.inf
    return np.asarray(x / spread(scale, tile, x.shape), np.float32)


# ------------------------------------------------------------------------------------ search

CLIPS = {True: (1.0, 2.0), False: tuple(1 - i / 32 for i in range(17))}
"""By whether the scale is a power of two: factors on the largest magnitude of a block that a search tries."""


def _scales(
    x: F32Array, scheme: Scheme, tile: tuple[int, int], tensor: F32Array, search: bool,
    importance: F32Array | None,
) -> Array:  # fmt: skip
    peak = tile_max(x, tile)
    _expect_finite(peak)  # as all values are then
    if not search:
        return _SCALES[scheme.name](peak, tensor)
    best: Array | None = None
    least = np.empty(0)
    for clip in CLIPS[scheme.scale is DType.F8E8M0]:
        scales = _SCALES[scheme.name](np.asarray(peak * np.float32(clip), np.float32), tensor)
        error = _error(x, scales, scheme, tile, tensor, importance)
        if best is None:
            best, least = scales, error
            continue
        better = error < least
        best, least = np.where(better, scales, best), np.minimum(error, least)
    assert best is not None
    return best


def _error(
    x: F32Array, scales: Array, scheme: Scheme, tile: tuple[int, int], tensor: F32Array,
    importance: F32Array | None,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """[tiles]: the squared error of every tile, columns weighed by `importance`."""
    codes = _CODES[scheme.code](_divide(x, scales, scheme, tile, tensor))
    back = decode_matrix(codes, scales, tensor if scheme.tensor_scale else None, scheme)
    squared = np.square(x.astype(np.float64) - back)
    if importance is not None:
        squared *= importance
    columns = np.add.reduceat(squared, np.arange(0, x.shape[1], min(tile[1], x.shape[1])), axis=1)
    return np.asarray(np.add.reduceat(columns, np.arange(0, len(x), tile[0]), axis=0), np.float64)
