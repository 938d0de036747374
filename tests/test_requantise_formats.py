"""The arithmetic of storage schemes: vectors worked by hand, an independent oracle, properties."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.frontend.encode import encode_fp4
from dsv4c.ir.dtypes import E2M1, DType, bf16_to_f32, decode, f32_to_bf16, pack, unpack
from dsv4c.ir.encode import (
    decode_matrix,
    encode,
    encode_scales,
    fn_to_fnuz,
    pow2_ceil,
    tensor_scale_of,
    to_e2m1,
    to_e4m3,
)  # fmt: skip
from dsv4c.ir.formats import SCHEMES, Scheme

F32 = npt.NDArray[np.float32]
SCALED = [s for s in SCHEMES.values() if not s.plain]
NAMES = [s.name for s in SCALED]


def f32(*values: float) -> F32:
    return np.array([values], np.float32)


def back(x: F32, scheme: Scheme, search: bool = False, importance: F32 | None = None) -> F32:
    made = encode(x, scheme, search, importance)
    return decode_matrix(made.codes, made.scales, made.tensor_scale, scheme)


# --------------------------------------------------------------------------------------- the table


def test_the_table_describes_what_the_encoder_makes() -> None:
    x = np.random.default_rng(0).standard_normal((130, 90), np.float32)
    for s in SCHEMES.values():
        made = encode(x, s)
        assert made.codes.shape == s.code_shape(130, 90) and made.codes.dtype == s.code.storage
        stored = made.codes.nbytes
        if s.scale is not None:
            assert made.scales.shape == s.scale_shape(130, 90) and made.scales.dtype == s.scale.storage
            stored += made.scales.nbytes
        assert (made.tensor_scale is not None) == s.tensor_scale
        assert s.nbytes(130, 90) == stored + 4 * s.tensor_scale
        assert s.values_per_byte == decode(made.codes, s.code).shape[1] // made.codes.shape[1]
    assert all(name == s.name for name, s in SCHEMES.items())


@pytest.mark.parametrize("s", SCALED, ids=NAMES)
def test_scales_alone_are_those_of_the_codes(s: Scheme) -> None:
    x = np.random.default_rng(1).standard_normal((300, 1100), np.float32)  # several bands, ragged tiles
    assert np.array_equal(encode_scales(x, s), encode(x, s).scales)
    if s.block[0] == 1:
        assert np.array_equal(encode_scales(x[:9], s, True), encode(x[:9], s, True).scales)


# -------------------------------------------------------------------------------- worked by hand

SECTION_7 = (0, 0.1, -0.2, 0.3, 0.7, 1.1, -1.3, 2.6, 3.3, -4.9, 5.1, 0.01, -0.02, 0.6, 1.9, -7.25)
"""The test vector of section 7 of the model specification, to be rounded to BF16."""
E4M3_OF_7 = (0, 0.1015625, -0.203125, 0.3125, 0.6875, 1.125, -1.25, 2.5, 3.25, -5, 5, 0.009765625,
             -0.01953125, 0.625, 1.875, -7)  # fmt: skip
E2M1_OF_7 = (0, 0, -0.0, 0, 1, 1, -1, 3, 3, -4, 6, 0, -0.0, 1, 2, -8)


def section_7() -> F32:
    block = bf16_to_f32(f32_to_bf16(np.array(SECTION_7, np.float32)))
    return np.concatenate([block, block])[None]


def same_bits(found: F32, want: tuple[float, ...]) -> bool:
    """Equality that tells -0 from 0, of a vector given once and found twice."""
    twice = np.array((*want, *want), np.float32)[None]
    return np.array_equal(found.view(np.uint32), twice.view(np.uint32))


def test_the_vector_of_section_7() -> None:
    x = section_7()
    made = encode(x, SCHEMES["fp8"])
    assert made.scales.tolist() == [[127 - 5]] and same_bits(back(x, SCHEMES["fp8"]), E4M3_OF_7)
    codes, scales = encode_fp4(x)
    assert scales.tolist() == [[127 + 1]]
    assert same_bits(decode_matrix(codes, scales, None, SCHEMES["mxfp4"]), E2M1_OF_7)


def test_the_same_vector_by_the_rules_of_ocp() -> None:
    """amax 7.25: floor(log2) is 2. E4M3 saturates 7.25 * 2^6 = 464 to 448; E2M1 saturates 7.25 to 6."""
    x = section_7()
    assert encode(x, SCHEMES["mxfp8"]).scales.tolist() == [[127 + 2 - 8]]
    assert same_bits(back(x, SCHEMES["mxfp8"]), E4M3_OF_7)
    assert encode(x, SCHEMES["mxfp4"]).scales.tolist() == [[127]]
    want = (0, 0, -0.0, 0.5, 0.5, 1, -1.5, 3, 3, -4, 6, 0, -0.0, 0.5, 2, -6)
    assert same_bits(back(x, SCHEMES["mxfp4"]), want)


def test_ties_of_e2m1_go_to_the_even_code() -> None:
    """Section 3.3: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4."""
    x = f32(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5, 6, 1e9)
    assert E2M1[to_e2m1(x)].tolist() == [[0, 1, 1, 2, 2, 4, 4, -4, 6, 6]]


def test_int8_by_hand() -> None:
    """amax 254 makes the scale 2; 3/2 and 5/2 are ties and go to 2, 1/2 to 0."""
    made = encode(f32(-254, 3, 5, 1, -1, 128, 0, -3), SCHEMES["int8"])
    assert made.scales.tolist() == [[2.0]]
    assert made.codes.tolist() == [[-127, 2, 2, 0, 0, 64, 0, -2]]


def test_int4_by_hand() -> None:
    """amax 7 makes the scale 1; columns 0 and 1 share a byte, column 0 in the low nibble."""
    x = f32(7, -3.5, 0.5, 1.5, 2.5, -1, -6.6, 0)
    made = encode(x, SCHEMES["int4"])
    assert made.scales.tolist() == [[0x3F80]]
    assert decode(made.codes, DType.I4X2).tolist() == [[7, -4, 0, 2, 2, -1, -7, 0]]
    assert made.codes.tolist() == [[0xC7, 0x20, 0xF2, 0x09]]


def test_an_int4_scale_is_rounded_to_bf16() -> None:
    """1/7 = 0x3E124925 rounds down to the BF16 number 0x3E12 = 0.142578125, so 1 comes back as 7 of those."""
    x = f32(1, 0.5)
    made = encode(x, SCHEMES["int4"])
    assert made.scales.tolist() == [[0x3E12]]
    assert back(x, SCHEMES["int4"]).tolist() == [[0.998046875, 4 * 0.142578125]]


def test_nvfp4_by_hand() -> None:
    """amax 2688 makes the tensor scale 1, so blocks of maximum 2688, 6, 0.01 and 1e-4 have these scales:
    448 (0x7E), 1 (0x38), 0.001666 -> 2^-9 = 0.001953125 (0x01), 0.000017 -> 0, where codes are 0."""
    x = np.zeros((1, 64), np.float32)
    x[0, [0, 16, 17, 18, 32, 48]] = 2688, 6, -2.6, 0.2, 0.01, 1e-4
    made = encode(x, SCHEMES["nvfp4"])
    assert made.tensor_scale is not None and made.tensor_scale.tolist() == [1.0]
    assert made.scales.tolist() == [[0x7E, 0x38, 0x01, 0x00]]
    found = back(x, SCHEMES["nvfp4"])
    assert found[0, [0, 16, 17, 18, 32]].tolist() == [2688, 6, -3, 0, 6 * 2.0**-9]
    assert np.count_nonzero(found) == 4 and not made.codes[0, 24:].any()
    assert tensor_scale_of(x / 2, SCHEMES["nvfp4"]).tolist() == [0.5]


def test_fnuz_by_hand() -> None:
    """448 = 0x7E stays 0x7E, which FNUZ reads as 224, and the scale doubles; -0 becomes 0."""
    made = encode(f32(448, -0.0, 1, -448), SCHEMES["fp8_fnuz"])
    assert made.codes.tolist() == [[0x7E, 0x00, 0x38, 0xFE]] and made.scales.tolist() == [[128]]
    assert back(f32(448, -0.0, 1, -448), SCHEMES["fp8_fnuz"]).tolist() == [[448, 0, 1, -448]]


def test_fp8_scales_by_hand() -> None:
    """P(448/448) = 1, one ulp more is 2; the floor 1e-4 gives 2^-22 (1e-4/448 = 2^-22.09)."""
    above = np.nextafter(np.float32(448), np.float32(449))
    for peak, code in ((448.0, 127), (above, 128), (224.0, 126), (0.0, 127 - 22), (1e-30, 127 - 22)):
        assert encode(f32(peak, 0), SCHEMES["fp8"]).scales.tolist() == [[code]], peak


@pytest.mark.parametrize("s", SCALED, ids=NAMES)
def test_zeros_and_the_ends_of_the_range(s: Scheme) -> None:
    """Blocks of zeros decode to zeros; no scale is NaN, infinite or below the smallest normal float32."""
    for value in (0.0, 1e-45, 1e-38, 3.0e38):
        x = np.full((3, 64), value, np.float32)
        x[:, ::2] *= -1
        made = encode(x, s)
        assert s.scale is not None
        scales = decode(made.scales, s.scale)
        assert np.isfinite(scales).all() and (s.tensor_scale or (scales >= 2.0**-126).all())
        found = decode_matrix(made.codes, made.scales, made.tensor_scale, s)
        assert np.isfinite(found).all()
        if value in (0.0, 1e-45):
            assert not found.any()
        elif value > 1:
            np.testing.assert_allclose(found, x, rtol=0.34)


# ---------------------------------------------------------------------------- independent oracle


def every_f16() -> F32:
    with np.errstate(invalid="ignore"):
        x = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    return x[np.isfinite(x)]


def floats(limit: float) -> F32:
    """Every F16 number and many others, within +-limit."""
    rng = np.random.default_rng(2)
    some = (rng.standard_normal(100_000) * np.exp2(rng.integers(-14, 9, 100_000))).astype(np.float32)
    x = np.concatenate([every_f16(), some])
    return x[np.abs(x) <= limit]


def test_e4m3_against_ml_dtypes() -> None:
    x = floats(448)
    assert np.array_equal(to_e4m3(x), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert np.array_equal(to_e4m3(f32(449, 1e30, -np.inf)), [[0x7E, 0x7E, 0xFE]])


def test_e2m1_against_ml_dtypes() -> None:
    x = floats(6)
    assert np.array_equal(to_e2m1(x), x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15)


def test_integers_and_scales_against_ml_dtypes() -> None:
    nibbles = np.arange(16, dtype=np.uint8)
    want = np.array([int(v) for v in nibbles.view(ml_dtypes.int4)])
    assert decode(pack(nibbles), DType.I4X2).tolist() == want.tolist()
    assert unpack(pack(nibbles)).tolist() == nibbles.tolist()
    codes = np.arange(255, dtype=np.uint8)
    powers = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(decode(codes, DType.F8E8M0), powers)


def test_fnuz_codes_against_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    value = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found = fn_to_fnuz(codes).view(ml_dtypes.float8_e4m3fnuz).astype(np.float32)
    np.testing.assert_array_equal(found, value / 2)  # NaN where it was NaN
    assert fn_to_fnuz(codes)[[0x80, 0x7F, 0xFF]].tolist() == [0x00, 0x80, 0x80]


def reference_block(values: list[Fraction], kind: str) -> tuple[int, list[Fraction]]:
    """OCP MX by exact arithmetic: (scale exponent, decoded values), the nearest number found by search."""
    table = {"mxfp8": (8, decode(np.arange(127, dtype=np.uint8), DType.F8E4M3)), "mxfp4": (2, E2M1[:8])}
    less, numbers = table[kind]
    grid = [Fraction(float(v)) for v in numbers]
    peak, exponent = max(map(abs, values)), -200
    while Fraction(2) ** (exponent + 1) <= peak:
        exponent += 1
    scale = Fraction(2) ** (exponent - less)
    out = []
    for v in values:
        near = min(range(len(grid)), key=lambda i: (abs(grid[i] - abs(v) / scale), i % 2))
        out.append((1 if v >= 0 else -1) * grid[near] * scale)
    return exponent - less, out


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4"])
def test_microscaling_against_exact_arithmetic(kind: str) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((24, 32)) * np.exp2(rng.integers(-30, 30, (24, 1)))).astype(np.float32)
    x[3, 5] = np.float32(2.0) ** 20  # a power of two as the largest
    made = encode(x, SCHEMES[kind])
    found = back(x, SCHEMES[kind])
    for row in range(24):
        exponent, want = reference_block([Fraction(float(v)) for v in x[row]], kind)
        assert int(made.scales[row, 0]) - 127 == exponent
        assert [Fraction(float(v)) for v in found[row]] == want


def test_power_of_two_scales_are_the_exact_ceiling() -> None:
    """Section 3.1, over all BF16 magnitudes in range: multiplying by float32(1/448) loses nothing."""
    peaks = bf16_to_f32(np.arange(0x3900, 0x7000, dtype=np.uint16))
    scales = encode(peaks[:, None].repeat(2, 1), dataclasses.replace(SCHEMES["fp8"], block=(1, 2))).scales
    for peak, code in zip(peaks, scales[:, 0], strict=True):
        y = Fraction(float(peak)) / 448
        assert Fraction(2) ** (int(code) - 128) < y <= Fraction(2) ** (int(code) - 127)
    assert pow2_ceil(f32(1, 1.5, 2)).tolist() == [[127, 128, 128]]


# ------------------------------------------------------------------------------------ properties


@st.composite
def weights(draw: st.DrawFn) -> F32:
    """Matrices of odd heights, ragged widths, scales far apart, and zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 140)), 2 * draw(st.integers(1, 80))
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-8, 9, (shape[0], 1)))
    x *= 2.0 ** draw(st.integers(-6, 20))
    x[rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.9]))] = 0
    return x.astype(np.float32)


EXACT_TWICE = [s for s in SCALED if s.scale in (DType.F8E8M0, DType.BF16)]


@pytest.mark.parametrize("s", EXACT_TWICE, ids=[s.name for s in EXACT_TWICE])
@settings(max_examples=25, deadline=None)
@given(x=weights())
def test_a_second_round_trip_changes_nothing(s: Scheme, x: F32) -> None:
    once = back(x, s)
    assert np.array_equal(back(once, s), once)


@pytest.mark.parametrize("name", ["int8", "fp8_f32"])
@settings(max_examples=25, deadline=None)
@given(x=weights())
def test_a_second_round_trip_moves_float_scales_by_one_ulp(name: str, x: F32) -> None:
    """(127 s)/127 in float32 may be the neighbour of s; the codes stay."""
    s = SCHEMES[name]
    first = encode(x, s)
    once = decode_matrix(first.codes, first.scales, None, s)
    again = encode(once, s)
    if name == "int8":
        assert np.array_equal(again.codes, first.codes)
        kept = first.codes.any(axis=1)
        np.testing.assert_array_max_ulp(again.scales[kept], first.scales[kept], 1)
    np.testing.assert_allclose(decode_matrix(again.codes, again.scales, None, s), once, rtol=2e-7)


def bound(x: F32, s: Scheme) -> npt.NDArray[np.float64]:
    """The largest error that the rule of a scheme allows, per value."""
    made, (rows, cols) = encode(x, s), x.shape
    assert s.scale is not None
    high, wide = s.tile(rows, cols)
    scale = np.repeat(decode(made.scales, s.scale).astype(np.float64), high, axis=0)[:rows]
    scale = np.repeat(scale, wide, axis=1)[:, :cols]
    relative = np.abs(x.astype(np.float64))
    match s.name:
        case "int8":
            return scale * (0.5 + 2e-5)
        case "int4" | "int4_g64" | "int4_g128":
            return scale * 0.52  # the BF16 scale may be 2^-9 short, 7/512 of a step
        case "fp8" | "fp8_f32" | "fp8_fnuz":
            subnormal = 2.0**-10 * (2 if s.name == "fp8_fnuz" else 1)
            return np.maximum(relative / 16, scale * subnormal) * (1 + 1e-6)
        case "mxfp8":
            return np.maximum(np.maximum(relative / 16, scale * 2.0**-10), relative - 448 * scale)
        case "mxfp4":
            return np.maximum(scale, relative - 6 * scale)
        case _:
            assert made.tensor_scale is not None
            # a scale of 0 or a subnormal one is off by up to 2^-10, which six codes multiply
            return (scale + 6 * 2.0**-10) * float(made.tensor_scale[0]) * (1 + 1e-6)


@pytest.mark.parametrize("s", SCALED, ids=NAMES)
@settings(max_examples=25, deadline=None)
@given(x=weights())
def test_errors_stay_within_half_a_step(s: Scheme, x: F32) -> None:
    assert (np.abs(back(x, s).astype(np.float64) - x) <= bound(x, s)).all()


@pytest.mark.parametrize("s", SCALED, ids=NAMES)
@settings(max_examples=20, deadline=None)
@given(x=weights(), k=st.integers(-3, 3))
def test_powers_of_two_go_through(s: Scheme, x: F32, k: int) -> None:
    """Scaling by a power of two scales the result, so no rule depends on the unit (away from the floors)."""
    x = np.where(np.abs(x) < 2.0**-20, np.float32(0), x) * np.float32(2**20)
    assert np.array_equal(back(x * np.float32(2.0**k), s), back(x, s) * np.float32(2.0**k))


# ---------------------------------------------------------------------------------------- search

SEARCHED = [s for s in SCALED if s.block[0] == 1]


@pytest.mark.parametrize("s", SEARCHED, ids=[s.name for s in SEARCHED])
@settings(max_examples=10, deadline=None)
@given(x=weights())
def test_a_search_never_adds_error_to_a_block(s: Scheme, x: F32) -> None:
    def error(search: bool) -> npt.NDArray[np.float64]:
        squared = np.square(back(x, s, search).astype(np.float64) - x)
        wide = s.tile(*x.shape)[1]
        return np.asarray(np.add.reduceat(squared, np.arange(0, x.shape[1], wide), axis=1))

    plain, found = error(False), error(True)
    assert (found <= plain * (1 + 1e-12)).all()


def test_a_search_finds_the_clip_by_hand() -> None:
    """One value of 14 among many of 1: scale 2 puts 1 on a tie that goes to 0, a smaller one clips 14.

    With importance 0 for the first column clipping is free.
    """
    x = np.ones((1, 32), np.float32)
    x[0, 0] = 14
    s = SCHEMES["int4"]
    assert back(x, s)[0, :2].tolist() == [14, 0]
    importance = np.ones(32, np.float32)
    importance[0] = 0
    found = back(x, s, True, importance)[0]
    assert np.square(found[1:] - 1).sum() < 0.1 and found[0] < 14
    same = back(x, s, True, np.zeros(32, np.float32))
    assert np.array_equal(same, back(x, s)), "no column counts: the first candidate is the plain rule"


def test_importance_lowers_the_error_that_counts() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((16, 128)).astype(np.float32)
    importance = np.square(rng.standard_normal(128)).astype(np.float32) * np.exp2(rng.integers(-6, 6, 128))
    for s in SEARCHED:
        weighed = [
            (np.square(back(x, s, True, weight).astype(np.float64) - x) * importance).sum()
            for weight in (importance.astype(np.float32), None)
        ]
        assert weighed[0] <= weighed[1], s.name
    assert weighed[0] < weighed[1]
