"""Rounding of values to BF16, FP16, E4M3, E2M1 and INT8 and back (sections 3.1 to 3.3 and 7; V4.1 3).

Knows arrays only. Everything is computed on the float32 cast of the values, whatever their type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.ir.dtypes import bf16_to_f32, f32_to_bf16

Arr = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

E4M3_FLOOR, E2M1_FLOOR = np.float32(1e-4), np.float32(6 * 2.0**-126)
"""The least amax of a block (section 7)."""
E4M3_SCALE_FLOOR = np.float32(6 * 2.0**-9)
"""The same where the scale is an E4M3 number: its least positive one, times 6 (V4.1, section 3)."""
ONE_448TH, ONE_6TH = np.array([0x3B124925, 0x3E2AAAAB], np.uint32).view(np.float32)
"""1/448 and 1/6 as the reference's FP32 constants (section 3.1)."""


def bf16(x: npt.NDArray[Any]) -> Arr:
    """x rounded to the nearest BF16, ties to even, in the type of x."""
    return bf16_to_f32(f32_to_bf16(x.astype(np.float32, copy=False))).astype(x.dtype, copy=False)


def fp16(x: npt.NDArray[Any]) -> Arr:
    """x rounded to the nearest IEEE binary16, ties to even; infinite from 65520 on."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32, copy=False).astype(np.float16).astype(x.dtype)


def power_of_two(y: F32) -> F32:
    """P(y) = 2^ceil(log2 y) of positive, normal float32, on bits (section 3.1)."""
    bits = np.ascontiguousarray(y, np.float32).view(np.uint32)
    up = (bits & 0x7F800000) + np.where(bits & 0x7FFFFF, np.uint32(0x800000), np.uint32(0))
    return up.astype(np.uint32).view(np.float32)


def _steps(v: F32, mantissa: int, least: int) -> F32:
    """v rounded to `mantissa` bits after the leading one, exponents from `least` up; ties to even."""
    exponent = np.maximum(np.frexp(v)[1] - 1, least)
    step = np.ldexp(np.float32(1), exponent - mantissa).astype(np.float32)
    return np.asarray(np.rint(v / step) * step, np.float32)


def e4m3(x: F32) -> F32:
    """[..., block] by rule Q8_B: scale P(max(amax, 1e-4) / 448), E4M3 codes, back."""
    scale = power_of_two(np.maximum(_amax(x), E4M3_FLOOR) * ONE_448TH)
    return bf16(_steps(np.clip(x / scale, np.float32(-448), np.float32(448)), 3, -6) * scale)


def e2m1(x: F32) -> F32:
    """[..., block] by rule Q4_B: scale P(max(amax, 6 2^-126) / 6), E2M1 codes, back."""
    scale = power_of_two(np.maximum(_amax(x), E2M1_FLOOR) * ONE_6TH)
    return bf16(_steps(np.clip(x / scale, np.float32(-6), np.float32(6)), 1, 0) * scale)


def e2m1_e4m3(x: F32) -> F32:
    """[..., block] by rule Q4e_B of V4.1: scale max(amax, 6 2^-9) / 6 as E4M3, E2M1 codes, back."""
    scale = _steps(np.minimum(np.maximum(_amax(x), E4M3_SCALE_FLOOR) / np.float32(6), np.float32(448)), 3, -6)
    return bf16(_steps(np.clip(x / scale, np.float32(-6), np.float32(6)), 1, 0) * scale)


def int8(x: F32) -> F32:
    """[..., block] symmetric: scale amax / 127 in FP32, nearest integer, ties to even; zeros stay zeros."""
    scale = _amax(x) / np.float32(127)
    return np.asarray(np.rint(x / np.where(scale == 0, np.float32(1), scale)) * scale, np.float32)


def _amax(x: F32) -> F32:
    return np.asarray(np.abs(x).max(axis=-1, keepdims=True), np.float32)


def blocks(rule: Callable[[F32], F32], x: Arr, block: int) -> Arr:
    """`rule` over every `block` values of the last axis, the last of which may be fewer, in the type of x.

    Padding may hold NaN and stays what it is or becomes another NaN.
    """
    out = np.empty_like(x)
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, x.shape[-1], block):
            here = slice(at, min(at + block, x.shape[-1]))
            out[..., here] = rule(x[..., here].astype(np.float32))
    return out
