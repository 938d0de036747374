"""Number formats: decoding against the specification bit by bit, encoding against a search."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from dsv4c.errors import CheckpointError
from dsv4c.frontend.encode import encode_fp4, encode_fp8
from dsv4c.ir.dtypes import E2M1, DType, bf16_to_f32, decode, f32_to_bf16, pack
from dsv4c.ir.encode import pow2_ceil, to_e2m1, to_e4m3
from dsv4c.ir.weights import decode_fp4, decode_fp8, source, values

ALL_BYTES = np.arange(256, dtype=np.uint8)


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> Fraction:
    """The value of one code by the definition of a binary floating-point number, sign bit left out."""
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    assert exponent < 1 << exponent_bits
    fraction = Fraction(mantissa, 1 << mantissa_bits)
    if exponent == 0:
        return fraction * Fraction(2) ** (1 - bias)
    return (1 + fraction) * Fraction(2) ** (exponent - bias)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality that tells -0 from 0."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


# ------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("code", range(16))
def test_e2m1_code(code: int) -> None:
    value = float(minifloat(code & 7, 2, 1, 1))
    expected = -value if code & 8 else value
    assert same_bits(E2M1[code], np.float32(expected))


@pytest.mark.parametrize("code", range(256))
def test_e4m3_code(code: int) -> None:
    got = decode(ALL_BYTES[code : code + 1], DType.F8E4M3)[0]
    if code & 0x7F == 0x7F:
        assert np.isnan(got)
        return
    value = float(minifloat(code & 0x7F, 4, 3, 7))
    assert same_bits(got, np.float32(-value if code & 0x80 else value))


def test_e4m3_landmarks() -> None:
    codes = np.array([0x7E, 0x01, 0x08, 0x38], np.uint8)
    assert decode(codes, DType.F8E4M3).tolist() == [448, 2**-9, 2**-6, 1]


def test_fnuz_reads_the_same_bits_as_half_the_value() -> None:
    usual = (ALL_BYTES & 0x7F) != 0x7F
    usual &= ALL_BYTES != 0x80
    halves = decode(ALL_BYTES[usual], DType.F8E4M3FNUZ) * 2
    assert np.array_equal(halves, decode(ALL_BYTES[usual], DType.F8E4M3))


@pytest.mark.parametrize("code", range(256))
def test_e8m0_code(code: int) -> None:
    got = decode(ALL_BYTES[code : code + 1], DType.F8E8M0)[0]
    assert np.isnan(got) if code == 255 else Fraction(float(got)) == Fraction(2) ** (code - 127)


def test_low_nibble_comes_first() -> None:
    packed = np.array([[0x21, 0x7F]], np.uint8)
    assert decode(packed, DType.F4E2M1X2).tolist() == [[0.5, 1.0, -6.0, 6.0]]
    assert pack(np.array([[1, 2, 15, 7]], np.uint8)).tolist() == packed.tolist()


def test_signed_bytes_hold_the_same_codes() -> None:
    assert same_bits(decode(ALL_BYTES.view(np.int8), DType.F4E2M1X2), decode(ALL_BYTES, DType.F4E2M1X2))


def test_bfloat16_round_trip_of_every_finite_code() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    assert np.array_equal(f32_to_bf16(bf16_to_f32(finite)), finite)


# --------------------------------------------------------------------------- decode expressions


class Store(dict):  # type: ignore[type-arg]
    def read(self, name: str) -> np.ndarray:
        return self[name]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 128), (129, 127), (130, 257), (7, 300)])
@pytest.mark.parametrize("block", [(128, 128), (32, 64), (1, 3)])
@pytest.mark.parametrize("scale_dtype", [DType.F8E8M0, DType.F32])
def test_fp8_tiles_may_be_ragged(shape: tuple[int, int], block: tuple[int, int], scale_dtype: DType) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 0x7F, shape).astype(np.uint8)
    tiles = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = rng.integers(120, 134, tiles).astype(np.uint8)
    if scale_dtype is DType.F32:
        scale = rng.random(tiles, np.float32) + np.float32(0.1)
    store = Store(codes=codes, scale=scale)
    x = decode_fp8(source("codes", DType.F8E4M3, shape), source("scale", scale_dtype, tiles), block)
    number, factor = decode(codes, DType.F8E4M3), decode(scale, scale_dtype)
    expected = np.empty(shape, np.float32)
    for row, column in np.ndindex(shape):
        expected[row, column] = number[row, column] * factor[row // block[0], column // block[1]]
    assert same_bits(values(x, store), expected)


@pytest.mark.parametrize("columns", [2, 32, 34, 56, 64, 96, 126])
def test_fp4_groups_may_be_ragged(columns: int) -> None:
    rng = np.random.default_rng(2)
    packed = rng.integers(0, 256, (5, columns // 2)).astype(np.uint8)
    scale = rng.integers(100, 150, (5, -(-columns // 32))).astype(np.uint8)
    x = decode_fp4(source("c", DType.F4E2M1X2, packed.shape), source("s", DType.F8E8M0, scale.shape))
    expected = np.empty((5, columns), np.float32)
    for row, column in np.ndindex(5, columns):
        byte = int(packed[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        expected[row, column] = float(E2M1[code]) * 2.0 ** (int(scale[row, column // 32]) - 127)
    assert same_bits(values(x, Store(c=packed, s=scale)), expected)


# ------------------------------------------------------------------------------------ encoding


def nearest(value: float, table: list[Fraction]) -> int:
    """Code of the nearest value of an ascending table; of two equally near ones the even code."""
    exact = abs(Fraction(value))
    return min(range(len(table)), key=lambda code: (abs(table[code] - exact), code % 2))


E4M3_TABLE = [minifloat(c, 4, 3, 7) for c in range(0x7F)]
E2M1_TABLE = [minifloat(c, 2, 1, 1) for c in range(8)]


@pytest.mark.parametrize(
    "encode, table", [(to_e4m3, E4M3_TABLE), (to_e2m1, E2M1_TABLE)], ids=["e4m3", "e2m1"]
)
def test_rounding_is_to_nearest_even(encode, table: list[Fraction]) -> None:
    numbers = [float(v) for v in table]
    middles = [(a + b) / 2 for a, b in pairwise(numbers)]
    around = [float(np.nextafter(np.float32(m), np.float32(d))) for m in middles for d in (0, np.inf)]
    random = (np.random.default_rng(3).standard_normal(500).astype(np.float32) * 3).tolist()
    points = [*numbers, *middles, *around, *random, float(table[-1]) * 2, 1e30, 1e-40]
    got = encode(np.array(points, np.float32)) & (len(table) if len(table) == 0x7F else 7)
    assert got.tolist() == [nearest(p, table) for p in np.array(points, np.float32).tolist()]


@pytest.mark.parametrize("encode, sign", [(to_e4m3, 0x80), (to_e2m1, 8)])
def test_sign_survives_also_of_zero(encode, sign: int) -> None:
    positive = np.array([0.0, 0.01, 1.0, 5.0], np.float32)
    assert np.array_equal(encode(-positive), encode(positive) | sign)


def test_every_finite_code_encodes_to_itself() -> None:
    finite = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]
    assert np.array_equal(to_e4m3(decode(finite, DType.F8E4M3)), finite)
    assert np.array_equal(to_e2m1(E2M1), np.arange(16))


def test_power_of_two_ceiling() -> None:
    points = np.array([1, 1.0000001, 2, 3, 0.5, 0.75, 2.0**-126, 2.0**-127, 448], np.float32)
    exponents = [0, 1, 1, 2, -1, 0, -126, -126, 9]
    assert (pow2_ceil(points).astype(int) - 127).tolist() == exponents


SPEC_INPUT = [0, 0.1, -0.2, 0.3, 0.7, 1.1, -1.3, 2.6, 3.3, -4.9, 5.1, 0.01, -0.02, 0.6, 1.9, -7.25] * 2
SPEC_FP8 = [
    0, 0.1015625, -0.203125, 0.3125, 0.6875, 1.125, -1.25, 2.5, 3.25, -5, 5, 0.009765625, -0.01953125, 0.625,
    1.875, -7,
] * 2  # fmt: skip
SPEC_FP4 = [0, 0, -0.0, 0, 1, 1, -1, 3, 3, -4, 6, 0, -0.0, 1, 2, -8] * 2


def test_vector_of_the_specification() -> None:
    """Model specification, section 7."""
    x = bf16_to_f32(f32_to_bf16(np.array([SPEC_INPUT], np.float32)))
    codes, scale = encode_fp8(x)
    assert decode(scale, DType.F8E8M0).tolist() == [[2.0**-5]]
    assert same_bits(decode(codes, DType.F8E4M3) * np.float32(2.0**-5), np.array([SPEC_FP8], np.float32))
    packed, scale = encode_fp4(x)
    assert decode(scale, DType.F8E8M0).tolist() == [[2.0]]
    assert same_bits(decode(packed, DType.F4E2M1X2) * np.float32(2), np.array([SPEC_FP4], np.float32))


@pytest.mark.parametrize("shape", [(1, 2), (5, 34), (129, 130), (300, 56), (128, 256)])
@pytest.mark.parametrize("scale_dtype", [DType.F8E8M0, DType.F32])
def test_fp8_round_trip(shape: tuple[int, int], scale_dtype: DType) -> None:
    x = np.random.default_rng(4).standard_normal(shape, np.float32)
    codes, scale = encode_fp8(x, (128, 128), scale_dtype)
    assert codes.shape == shape and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert scale.dtype == scale_dtype.storage
    expr = decode_fp8(source("c", DType.F8E4M3, shape), source("s", scale_dtype, scale.shape), (128, 128))
    back = values(expr, Store(c=codes, s=scale))
    tiny = decode(scale, scale_dtype).max() * 2.0**-10
    assert (np.abs(back - x) <= np.abs(x) / 16 + tiny).all()
    if scale_dtype is DType.F8E8M0:
        again, _ = encode_fp8(back)
        assert np.array_equal(decode(again, DType.F8E4M3) == 0, back == 0)


@pytest.mark.parametrize("shape", [(1, 2), (5, 34), (7, 56), (3, 128)])
def test_fp4_round_trip_is_exact_the_second_time(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(5).standard_normal(shape, np.float32)
    store = Store()

    def once(v: np.ndarray) -> np.ndarray:
        store["c"], store["s"] = encode_fp4(v)
        codes = source("c", DType.F4E2M1X2, store["c"].shape)
        return values(decode_fp4(codes, source("s", DType.F8E8M0, store["s"].shape)), store)

    first = once(x)
    assert first.shape == x.shape
    assert (np.abs(first - x) <= np.abs(x).max(axis=1, keepdims=True) / 3).all()
    assert np.array_equal(once(first), first)


def test_zero_and_tiny_blocks_get_a_finite_scale() -> None:
    for x in (np.zeros((2, 64), np.float32), np.full((2, 64), 1e-38, np.float32)):
        for codes, scale in (encode_fp8(x), encode_fp4(x)):
            assert codes.dtype == np.uint8 and scale.max() < 255


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.ones((2, 32), np.float32)
    x[1, 3] = bad
    for encode in (encode_fp8, encode_fp4):
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            encode(x)


def test_packed_fp4_needs_pairs() -> None:
    with pytest.raises(CheckpointError, match="31 columns"):
        encode_fp4(np.ones((2, 31), np.float32))
