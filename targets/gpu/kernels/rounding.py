"""Rows rounded to 8-bit codes with scales, or to the numbers that these stand for (sections 3.1 and 3.2).

Knows Triton and nothing of dsv4c. Codes are made on the bits of FP32 numbers, so that every GPU, and the
interpreter, gives the same ones whatever conversions it has. In padding, which may hold NaN, codes are what
comes out, and are read into rows of padding alone.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .decode import E4M3_FNUZ, INT8, e4m3_value

_ONE_448TH = tl.constexpr(0.0022321429569274187)
"""1/448 as an FP32 number, bits 0x3B124925 (section 3.1)."""
_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 2^23: what is added to it and taken away again is rounded to an integer, ties to even."""


@triton.jit
def e4m3_scale(most):
    """f32 powers of two P(max(most, 1e-4) / 448) for the largest absolute values f32 of blocks."""
    bits = (tl.maximum(most, 1e-4) * _ONE_448TH).to(tl.int32, bitcast=True)
    up = (bits & 0x7F800000) + tl.where((bits & 0x7FFFFF) != 0, 0x800000, 0)
    return up.to(tl.float32, bitcast=True)


@triton.jit
def e4m3_code(x, scale):
    """int32 E4M3 codes of x / scale, clipped to 448; nearest, ties to even. `scale` is a power of two."""
    inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    value = x * inverse
    size = tl.minimum(tl.abs(value), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((size * 512.0 + _TO_INTEGER) - _TO_INTEGER).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    return code | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def int8_code(x, scale):
    """f32 integers x / scale, nearest, ties to even; zeros where the scale is zero."""
    quotient = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    return (quotient + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def _block(x, row, head, XS, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr):
    """(columns [GROUP,BD], which of them there are, f32 [GROUP,BD]) of the blocks of this program."""
    first = tl.program_id(2) * (GROUP * BLOCK)
    i = tl.arange(0, BD)[None, :]
    column = first + tl.arange(0, GROUP)[:, None] * BLOCK + i
    inside = (i < BLOCK) & (column < D)
    return column, inside, tl.load(x + row * XS + head * D + column, mask=inside, other=0.0)


@triton.jit
def row_codes(
    x, codes, factors,
    M, XS,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """codes uint8 [M,D] of rows of x f32, and factors f32 [M,COUNT] that BLOCK columns of codes have.

    ROWS: E4M3 (power-of-two scales), E4M3_FNUZ (the same bits, which there are half as much, so factors are
    doubled, and zero has one sign), INT8 (largest absolute value / 127). BD is a power of two not below
    BLOCK; grid (M, 1, ceil(COUNT/GROUP)).
    """
    row = tl.program_id(0).to(tl.int64)
    column, inside, v = _block(x, row, 0, XS, D, BLOCK, BD, GROUP)
    most = tl.max(tl.abs(v), 1)
    if ROWS == INT8:
        factor = tl.div_rn(most, 127.0)
        code = int8_code(v, factor[:, None]).to(tl.int32) & 0xFF
    else:
        factor = e4m3_scale(most)
        code = e4m3_code(v, factor[:, None])
        if ROWS == E4M3_FNUZ:
            code = tl.where(code == 0x80, 0, code)
            factor = factor * 2.0
    tl.store(codes + row * D + column, code.to(tl.uint8), mask=inside)
    block = tl.program_id(2) * GROUP + tl.arange(0, GROUP)
    tl.store(factors + row * COUNT + block, factor, mask=block < COUNT)


@triton.jit
def round_rows(
    x, y,
    M, XS,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """y f32 [M,HEADS,D]: the numbers that `row_codes` stands for, for products of numbers; every head has
    blocks of its own. grid (M, HEADS, ceil(ceil(D/BLOCK)/GROUP)).
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, inside, v = _block(x, row, head, XS, D, BLOCK, BD, GROUP)
    most = tl.max(tl.abs(v), 1)
    if ROWS == INT8:
        factor = tl.div_rn(most, 127.0)[:, None]
        v = int8_code(v, factor) * factor
    else:
        factor = e4m3_scale(most)[:, None]
        v = e4m3_value(e4m3_code(v, factor), 7) * factor
    tl.store(y + (row * HEADS + head) * D + column, v, mask=inside)
