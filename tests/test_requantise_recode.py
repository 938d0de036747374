"""Changes of scheme that keep every value, and their refusals where they cannot."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from dsv4c.errors import CompileError
from dsv4c.ir.dtypes import DType, pack
from dsv4c.ir.encode import decode_matrix
from dsv4c.ir.formats import SCHEMES
from dsv4c.ir.recode import EXACT

Bytes = npt.NDArray[np.uint8]


Rng = np.random.Generator


def stored(name: str, rng: Rng, rows: int, cols: int, low: int, high: int) -> tuple[Bytes, Bytes]:
    """Random codes and scales (exponents low..high-1) of a scheme."""
    s = SCHEMES[name]
    codes = rng.integers(0, 256, s.code_shape(rows, cols)).astype(np.uint8)
    if s.code is DType.F8E4M3:
        codes[(codes & 0x7F) == 0x7F] = 0
    return codes, (127 + rng.integers(low, high, s.scale_shape(rows, cols))).astype(np.uint8)


@pytest.mark.parametrize(("old", "new"), list(EXACT), ids=[f"{a}-{b}" for a, b in EXACT])
@pytest.mark.parametrize("shape", [(128, 128), (1, 2), (130, 34), (257, 300), (64, 4096)])
def test_recoding_keeps_every_value(old: str, new: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    for low, high in ((-20, -6), (-127, -114), (0, 1), (100, 114)):
        codes, scales = stored(old, rng, *shape, low, high)
        how, before, after = EXACT[old, new], SCHEMES[old], SCHEMES[new]
        fresh = how.codes(codes, scales) if how.codes else codes
        moved = how.scales(scales, *shape) if how.scales else scales
        assert after.scale is not None
        assert fresh.shape == after.code_shape(*shape) and fresh.dtype == after.code.storage
        assert moved.shape == after.scale_shape(*shape) and moved.dtype == after.scale.storage
        want = decode_matrix(codes, scales, None, before)
        found = decode_matrix(fresh, moved, None, after)
        assert np.array_equal(found, want) and np.isfinite(found).all()
        assert how.why


def test_fp4_in_fp8_reaches_exactly_as_far_as_section_2_1_says() -> None:
    """Scales in one tile may differ by 2^14: 0.5 is then the smallest subnormal and 6 is 384; not by 2^15."""
    how = EXACT["mxfp4", "fp8"]
    assert how.codes and how.scales
    codes = pack(np.tile(np.array([1, 7], np.uint8), (2, 32)))
    for apart in (14, 15):
        scales = np.array([[127, 127 - apart], [120, 126]], np.uint8)
        if apart == 15:
            with pytest.raises(CompileError, match=r"differ by more than 2\^14.*\n.*mxfp8"):
                how.codes(codes, scales)
            continue
        found = how.codes(codes, scales)
        assert how.scales(scales, 2, 64).tolist() == [[127 - 6]]
        assert found[0, :2].tolist() == [0x60, 0x7C]  # 0.5 * 2^6 = 32, 6 * 2^6 = 384
        assert found[0, 32:34].tolist() == [0x01, 0x0C]  # 2^-9 and 6 * 2^-8


def test_the_smallest_scales_of_fp4_in_fp8() -> None:
    tiles = EXACT["mxfp4", "fp8"].scales
    assert tiles
    for largest, code in ((0, 1), (6, 1), (7, 1), (8, 2), (254, 248)):
        assert tiles(np.array([[0, largest]], np.uint8), 1, 64).tolist() == [[code]]


def test_groups_of_zeros_do_not_stop_fp4_in_fp8() -> None:
    codes, scales = np.zeros((1, 32), np.uint8), np.array([[200, 1]], np.uint8)
    codes[0, :16] = 0x77
    how = EXACT["mxfp4", "fp8"]
    assert how.codes and how.codes(codes, scales)[0, 32:].tolist() == [0] * 32


def test_what_cannot_be_recoded_is_refused() -> None:
    double, tiles = EXACT["fp8", "fp8_fnuz"].scales, EXACT["mxfp4", "fp8"].scales
    assert double and tiles
    assert double(np.array([[0, 253, 255]], np.uint8), 1, 384).tolist() == [[1, 254, 255]]
    with pytest.raises(CompileError, match=r"2\^127 cannot be doubled"):
        double(np.array([[254]], np.uint8), 1, 1)
    with pytest.raises(CompileError, match="a scale is NaN"):
        tiles(np.array([[255]], np.uint8), 1, 32)


def test_nan_codes_stay_nan() -> None:
    codes, scales = np.array([[0x7F, 0xFF, 0x38]], np.uint8), np.array([[127]], np.uint8)
    how = EXACT["fp8", "fp8_fnuz"]
    assert how.codes and how.scales
    found = decode_matrix(how.codes(codes, scales), how.scales(scales, 1, 3), None, SCHEMES["fp8_fnuz"])
    assert np.isnan(found[0, :2]).all() and found[0, 2] == 1
