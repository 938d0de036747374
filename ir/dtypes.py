"""Element types of the DeepSeek-V4 models and the exact decoding of their stored bits.

Knows number formats only; nothing of tensors, graphs or files. Source: OCP 8-bit floating point
specification 1.0, OCP microscaling formats 1.0, and section 2.1 of the model specification.
"""

from __future__ import annotations

import enum
from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
F32Array = npt.NDArray[np.float32]


class DType(enum.Enum):
    """An element type. The value is its name in IR text and in artifacts.

    `F4E2M1X2` is one byte holding two E2M1 codes, the even index in the low nibble, `I4X2` the same with
    two signed two's complement integers; shapes of such tensors count bytes. E4M3 exists twice on purpose:
    the same bits mean twice as much in OCP (`FN`) as in FNUZ, and only FN has a code for minus zero.
    """

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    I32 = "i32"
    I64 = "i64"
    I8 = "i8"
    F8E4M3 = "f8e4m3"
    F8E4M3FNUZ = "f8e4m3fnuz"
    F8E8M0 = "f8e8m0"
    F4E2M1X2 = "f4e2m1x2"
    I4X2 = "i4x2"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of one stored element."""
        return self.storage.itemsize

    @property
    def storage(self) -> np.dtype[np.generic]:
        """NumPy dtype that holds the raw bits (BF16 as uint16, 8-bit floats and packed FP4 as uint8)."""
        return np.dtype(_STORAGE[self])

    @property
    def is_float(self) -> bool:
        return self not in (DType.I32, DType.I64, DType.I8, DType.I4X2, DType.BOOL)


_STORAGE = {
    DType.F32: np.float32, DType.BF16: np.uint16, DType.F16: np.float16, DType.I32: np.int32,
    DType.I64: np.int64, DType.I8: np.int8, DType.F8E4M3: np.uint8, DType.F8E4M3FNUZ: np.uint8,
    DType.F8E8M0: np.uint8, DType.F4E2M1X2: np.uint8, DType.I4X2: np.uint8, DType.BOOL: np.bool_,
}  # fmt: skip


@cache
def _e4m3_table(fnuz: bool) -> F32Array:
    """[256] float32: the value of every E4M3 code; NaN codes are NaN."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    bias = 8 if fnuz else 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - bias)
    subnormal = mantissa / 8 * 2.0 ** (1 - bias)
    table = (sign * np.where(exponent == 0, subnormal, normal)).astype(np.float32)
    table[[0x80] if fnuz else [0x7F, 0xFF]] = np.nan
    return table


@cache
def _e8m0_table() -> F32Array:
    """[256] float32: 2^(code-127); code 0 is the subnormal 2^-127, code 255 is NaN."""
    table = np.full(256, np.nan, np.float32)
    table[:255] = np.ldexp(1.0, np.arange(255) - 127)
    return table


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""[16] float32: the value of every E2M1 code; bit 3 is the sign."""


@cache
def _e2m1_pairs() -> npt.NDArray[np.uint64]:
    """[256] the two float32 of every byte of packed E2M1, side by side; one look-up instead of two."""
    codes = np.arange(256)
    pairs = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1)
    return pairs.view(np.uint64).reshape(256)


def bf16_to_f32(bits: Array) -> F32Array:
    """uint16 BF16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Array) -> npt.NDArray[np.uint16]:
    """float32 -> uint16 BF16 bits, round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def unpack(bits: Array) -> npt.NDArray[np.uint8]:
    """[..., n] bytes -> [..., 2n] nibbles 0..15, low nibble first."""
    packed = bits.view(np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(nibbles: Array) -> npt.NDArray[np.uint8]:
    """[..., 2n] nibbles 0..15 -> [..., n] bytes, the even index in the low nibble; inverse of `unpack`."""
    codes = nibbles.view(np.uint8)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def decode(bits: Array, dtype: DType) -> Array:
    """Raw storage -> float32 values (integers and bool are returned as they are).

    Packed FP4 `[..., n]` bytes give `[..., 2n]` values, low nibble first; packed I4 gives int8.
    """
    match dtype:
        case DType.BF16:
            return bf16_to_f32(bits)
        case DType.F16:
            return bits.astype(np.float32)
        case DType.F8E4M3:
            return _e4m3_table(False).take(bits.view(np.uint8))
        case DType.F8E4M3FNUZ:
            return _e4m3_table(True).take(bits.view(np.uint8))
        case DType.F8E8M0:
            return _e8m0_table()[bits.view(np.uint8)]
        case DType.F4E2M1X2:
            return _e2m1_pairs().take(bits.view(np.uint8)).view(np.float32)
        case DType.I4X2:
            return ((unpack(bits) ^ 8).astype(np.int8) - np.int8(8)).astype(np.int8)
        case _:
            return bits
