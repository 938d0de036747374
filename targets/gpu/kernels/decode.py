"""Weights decoded in registers, and products of them on the matrix units; shared by every product.

Knows Triton and nothing of dsv4c. FORM says how codes are stored, one of the numbers below; SCALE how scales
are. E8M0 and E4M3 scales of codes with few bits keep a BF16 number exact, so they are multiplied in
registers; FP32 and BF16 scales are multiplied to the sums of their block.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl

F32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
E4M3 = tl.constexpr(2)
E4M3_FNUZ = tl.constexpr(3)
INT8 = tl.constexpr(4)
E2M1 = tl.constexpr(5)  # from here on two values lie in a byte
INT4 = tl.constexpr(6)

NO_SCALE = tl.constexpr(0)
E8M0_SCALE = tl.constexpr(1)
E4M3_SCALE = tl.constexpr(2)
F32_SCALE = tl.constexpr(3)  # from here on they belong to sums
BF16_SCALE = tl.constexpr(4)


@triton.jit
def e4m3_value(code, BIAS: tl.constexpr):
    """f32 values of E4M3 codes (int32): bias 7 (OCP), or 8 (FNUZ of gfx942), where a code is half as much.

    Codes below 8 have no hidden bit: what the exponent 0 would give, less its hidden bit, twice. NaN codes
    are refused when weights are written.
    """
    magnitude = code & 0x7F
    bits = (magnitude << 20) + ((127 - BIAS) << 23)
    value = bits.to(tl.float32, bitcast=True)
    hidden = 0.0078125 if BIAS == 7 else 0.00390625
    value = tl.where(magnitude < 8, 2.0 * (value - hidden), value)
    return tl.where(code >= 0x80, -value, value)


@triton.jit
def e2m1_value(code):
    """f32 values of E2M1 codes (int32, 0 to 15)."""
    magnitude = code & 7
    bits = tl.where(magnitude >= 2, (magnitude << 22) + (126 << 23), tl.where(magnitude == 1, 126 << 23, 0))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(code):
    """f32 powers of two of E8M0 codes (int32)."""
    return tl.where(code == 0, 0x400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_value(code, SCALE: tl.constexpr):
    """f32 values of scales as they are stored."""
    if SCALE == E8M0_SCALE:
        return e8m0_value(code.to(tl.int32))
    elif SCALE == E4M3_SCALE:
        return e4m3_value(code.to(tl.int32), 7)
    else:
        return code.to(tl.float32)


@triton.jit
def code_value(code, FORM: tl.constexpr):
    """f32 values of one-byte codes, or the numbers themselves."""
    if FORM == E4M3:
        return e4m3_value(code.to(tl.int32), 7)
    elif FORM == E4M3_FNUZ:
        return e4m3_value(code.to(tl.int32), 8)
    else:
        return code.to(tl.float32)


@triton.jit
def nibble_value(code, FORM: tl.constexpr):
    """f32 values of four-bit codes (int32, 0 to 15); INT4 is two's complement."""
    if FORM == E2M1:
        return e2m1_value(code)
    else:
        return ((code ^ 8) - 8).to(tl.float32)


@triton.jit
def tile(
    w, scale, rows, live, k0, K, SCOLS,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BN,BK] of a matrix [.., K] from row numbers [BN] and column k0: BF16, or f32 where FORM is F32.

    Rows that are not `live` and columns from K on are zero. Scales [.., SCOLS] of HIGH rows (0: all) and WIDE
    columns that belong in registers are multiplied.
    """
    at = rows.to(tl.int64)[:, None]
    if FORM >= E2M1:
        pair = k0 // 2 + tl.arange(0, BK // 2)
        known = live[:, None] & (pair < K // 2)[None, :]
        both = tl.load(w + at * (K // 2) + pair[None, :], mask=known, other=0).to(tl.int32)
        value = tl.join(nibble_value(both & 15, FORM), nibble_value(both >> 4, FORM)).reshape(BN, BK)
    else:
        k = k0 + tl.arange(0, BK)
        known = live[:, None] & (k < K)[None, :]
        value = code_value(tl.load(w + at * K + k[None, :], mask=known, other=0), FORM)
    if SCALE > NO_SCALE and SCALE < F32_SCALE:
        line = (rows // HIGH if HIGH > 0 else rows * 0).to(tl.int64)[:, None] * SCOLS
        if WIDE >= BK:
            factor = tl.load(scale + line + k0 // WIDE, mask=live[:, None], other=0)
            value = value * scale_value(factor, SCALE)
        else:
            block = k0 // WIDE + tl.arange(0, BK // WIDE)
            inside = live[:, None] & (block < SCOLS)[None, :]
            factor = scale_value(tl.load(scale + line + block[None, :], mask=inside, other=0), SCALE)
            wide = tl.broadcast_to(factor[:, :, None], (BN, BK // WIDE, WIDE))
            value = value * wide.reshape(BN, BK)
    if FORM == F32:
        return value
    else:
        return value.to(tl.bfloat16)


@triton.jit
def sum_scales(scale, rows, live, k0, SCOLS, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """f32 [BN]: what sums over a step of columns from k0 are multiplied by; WIDE 0 is a scale per row."""
    line = (rows // HIGH if HIGH > 0 else rows * 0).to(tl.int64) * SCOLS
    column = k0 // WIDE if WIDE > 0 else 0
    return scale_value(tl.load(scale + line + column, mask=live, other=0), SCALE)


@triton.jit
def product(x, w, acc, PIECES: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BM,BN] + x [BM,BK] w [BN,BK]^T in FP32.

    BF16 weights are multiplied with x cut into PIECES BF16 numbers: one where x is BF16 already, three hold
    every FP32 number, and each product is exact. FP32 weights go through the split of the compiler.
    """
    if FORM == F32:
        return tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    wt = tl.trans(w)
    high = x.to(tl.bfloat16)
    if PIECES > 1:
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        if PIECES > 2:
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(low, wt, acc)
        acc = tl.dot(middle, wt, acc)
    return tl.dot(high, wt, acc)


@triton.jit
def step(
    x, w, scale, rows, live, k0, K, SCOLS, acc,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc plus the products of one step of BK columns, scaled where scales belong to sums of a block."""
    numbers = tile(w, scale, rows, live, k0, K, SCOLS, FORM, SCALE, HIGH, WIDE, BN, BK)
    if SCALE >= F32_SCALE and WIDE > 0:
        part = product(x, numbers, tl.zeros((BM, BN), tl.float32), PIECES, FORM, PRECISION)
        factor = sum_scales(scale, rows, live, k0, SCOLS, SCALE, HIGH, WIDE)
        return acc + part * factor[None, :]
    else:
        return product(x, numbers, acc, PIECES, FORM, PRECISION)


@triton.jit
def finish(
    acc, scale, tensor_scale, rows, live, SCOLS, BAND,
    SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TENSOR: tl.constexpr,
):  # fmt: skip
    """acc [BM,BN] times the scales of rows, and of bands of BAND rows where there are tensor scales."""
    if SCALE != NO_SCALE and WIDE == 0:
        acc = acc * sum_scales(scale, rows, live, 0, SCOLS, SCALE, HIGH, WIDE)[None, :]
    if TENSOR:
        acc = acc * tl.load(tensor_scale + rows // BAND, mask=live, other=0.0)[None, :]
    return acc
