"""Products of 8-bit codes with 8-bit codes on the matrix units: linear maps and routed experts.

Knows Triton and nothing of dsv4c. ROWS says what both factors are: E4M3, E4M3_FNUZ or INT8. Codes of weights
are those of `decode` that fit: E4M3 as it is stored, E2M1 as E4M3 numbers, INT8. Products of codes are exact.
Their sums need not be: Hopper's units keep some 14 bits of a running sum of E4M3 products. So no sum of them
goes on for more than BK columns, at most 128; it is then multiplied by its scales and added in FP32. INT8 is
summed as int32, which is exact, and scaled at the end.

Groups of 32 columns of E2M1 share a step. In a row's group with the largest scale of the step they become
E4M3 numbers 2^6 times as large, in the others less by the quotient of the scales: exact, and never subnormal,
where scales of a step lie no further apart than 2^11. The compiler sees to that (`targets/gpu/near.py`).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .decode import E2M1, E4M3, E4M3_FNUZ, INT8, e8m0_value, sum_scales
from .experts import weighted_swiglu

_LIFT = tl.constexpr(6)
"""The largest E2M1 number times 2^6 is still an E4M3 number, 384."""


@triton.jit
def typed(codes, ROWS: tl.constexpr):
    """Bytes, or a pointer to bytes, as the numbers that the matrix units take.

    Rows are loaded by a pointer to numbers: bytes that are cast behind the load go to tensor memory on
    sm_100a, where Triton 3.9 made an empty kernel of products of 32 columns (2026-11-29).
    """
    if codes.dtype.is_ptr():
        if ROWS == INT8:
            return codes.to(tl.pointer_type(tl.int8))
        elif ROWS == E4M3_FNUZ:
            return codes.to(tl.pointer_type(tl.float8e4b8))
        else:
            return codes.to(tl.pointer_type(tl.float8e4nv))
    elif ROWS == E4M3_FNUZ:
        return codes.to(tl.float8e4b8, bitcast=True)
    else:
        return codes.to(tl.float8e4nv, bitcast=True)


@triton.jit
def load_codes(at, known, ROWS: tl.constexpr):
    """Numbers where `known`, elsewhere zero."""
    if ROWS == INT8:
        return tl.load(at, mask=known, other=0)
    else:
        return tl.load(at, mask=known, other=0.0)


@triton.jit
def e2m1_code(code, shift):
    """E4M3 codes (uint8) of E2M1 codes (uint8, 0 to 15) times 2^(shift / 8); zero has one sign."""
    magnitude = code & 7
    bits = tl.where(magnitude < 2, 0x30, magnitude * 4 + 0x30) + shift
    return tl.where(magnitude == 0, 0, bits | ((code & 8) << 4)).to(tl.uint8)


@triton.jit
def e2m1_tile(
    w, scale, rows, live, k0, K, SCOLS, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """(E4M3 codes uint8 [BN,BK], their scales f32 [BN]) of a matrix of E2M1 pairs with E8M0 scales."""
    at = rows.to(tl.int64)[:, None]
    pair = k0 // 2 + tl.arange(0, BK // 2)
    known = live[:, None] & (pair < K // 2)[None, :]
    both = tl.load(w + at * (K // 2) + pair[None, :], mask=known, other=0)
    group = k0 // WIDE + tl.arange(0, BK // WIDE)
    there = live[:, None] & (group < SCOLS)[None, :]
    exponent = tl.load(scale + at * SCOLS + group[None, :], mask=there, other=0).to(tl.int32)
    largest = tl.max(exponent, 1)
    shift = ((exponent - largest[:, None] + _LIFT) * 8).to(tl.uint8)
    wide = tl.broadcast_to(shift[:, :, None], (BN, BK // WIDE, WIDE // 2)).reshape(BN, BK // 2)
    code = tl.join(e2m1_code(both & 15, wide), e2m1_code(both >> 4, wide)).reshape(BN, BK)
    return code, e8m0_value(largest) * 0.015625


@triton.jit
def e4m3_tile(w, rows, live, k0, K, FORM: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr):
    """[BN,BK] of a matrix of one-byte codes as numbers; rows that are not `live`, columns from K on are 0."""
    k = k0 + tl.arange(0, BK)
    known = live[:, None] & (k < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + k[None, :]
    if ROWS == E4M3_FNUZ and FORM == E4M3:
        code = tl.load(w + at, mask=known, other=0)
        return typed(tl.where(code == 0x80, 0, code).to(tl.uint8), ROWS)  # -0, which is NaN there
    else:
        return load_codes(typed(w, ROWS) + at, known, ROWS)


@triton.jit
def row_tile(base, live, k0, K, ROWS: tl.constexpr, BK: tl.constexpr):
    """[BM,BK] numbers of rows of codes that begin at `base` [BM]."""
    k = k0 + tl.arange(0, BK)
    return load_codes(typed(base, ROWS)[:, None] + k[None, :], live[:, None] & (k < K)[None, :], ROWS)


@triton.jit
def add_step(
    acc, a, own, w, scale, rows, live, k0, K, SCOLS,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BM,BN] plus a [BM,BK] times BK columns of w, times the scales of both, own f32 [BM] and the
    weight's; INT8 is not scaled yet.
    """
    if ROWS == INT8:
        b = e4m3_tile(w, rows, live, k0, K, FORM, ROWS, BK)
        return tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    else:
        if FORM == E2M1:
            code, factor = e2m1_tile(w, scale, rows, live, k0, K, SCOLS, WIDE, BN, BK)
            b = typed(code, ROWS)
        else:
            b = e4m3_tile(w, rows, live, k0, K, FORM, ROWS, BK)
            factor = sum_scales(scale, rows, live, k0, SCOLS, SCALE, HIGH, WIDE)
        if ROWS == E4M3_FNUZ and FORM != E4M3_FNUZ:
            own = own * 2.0  # codes of the other kind of E4M3 are read as half the number
        return acc + tl.dot(a, tl.trans(b)) * (own[:, None] * factor[None, :])


@triton.jit
def no_sum(ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Zeros [BM,BN] in the type of sums."""
    return tl.zeros((BM, BN), tl.int32 if ROWS == INT8 else tl.float32)


@triton.jit
def own_scales(own, line, live, k0, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """f32 [BM]: the scales of rows at column k0; of INT8 they are known."""
    if ROWS == INT8:
        return own
    else:
        return tl.load(line + k0 // BLOCK, mask=live, other=0.0)


@triton.jit
def scaled(
    acc, own, scale, rows, live, SCOLS,
    SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """f32 [BM,BN]: sums of INT8 times the scales of both rows; others are scaled already."""
    if ROWS == INT8:
        factor = sum_scales(scale, rows, live, 0, SCOLS, SCALE, HIGH, WIDE)
        return acc.to(tl.float32) * (own[:, None] * factor[None, :])
    else:
        return acc


@triton.jit
def linear_codes(
    x, factors, w, scale, y,
    M, N, K, COUNT, SCOLS, SROWS,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y f32 [M,N] = x w^T: x uint8 [M,K] codes with factors f32 [M,COUNT], one for BLOCK columns (INT8: COUNT
    is 1); w [N,K] as FORM says, scale [SROWS,SCOLS]. BK divides BLOCK; grid (ceil(N/BN), ceil(M/BM)).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live, inside = m < M, n < N
    base, line = x + m.to(tl.int64) * K, factors + m.to(tl.int64) * COUNT
    own = tl.load(line, mask=live, other=0.0)
    acc = no_sum(ROWS, BM, BN)
    for k0 in range(0, K, BK):
        own = own_scales(own, line, live, k0, ROWS, BLOCK)
        acc = add_step(
            acc, row_tile(base, live, k0, K, ROWS, BK), own, w, scale, n, inside, k0, K, SCOLS,
            FORM, SCALE, HIGH, WIDE, ROWS, BN, BK,
        )  # fmt: skip
    acc = scaled(acc, own, scale, n, inside, SCOLS, SCALE, HIGH, WIDE, ROWS)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], acc, mask=live[:, None] & inside[None, :])


@triton.jit
def expert_up_codes(
    x, factors, weights, order, blocks, w, scale, hidden,
    M, R, G, COUNT, SCOLS, SROWS, limit,
    E: tl.constexpr, TOPK: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What `expert_up` computes, of codes: hidden f32 [R,INNER], rows in `order`, not rounded yet.

    x uint8 [M,K] with factors f32 [M,COUNT], w [E,2 INNER,K] as FORM says, scale [E,SROWS,SCOLS]; grid (G,
    ceil(INNER/BN)).
    """
    at = blocks + tl.program_id(0) * 3
    expert, first, count = tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)
    m, n = tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live, inside = m < count, n < INNER
    if count > 0:
        route = tl.load(order + first + m, mask=live, other=0)
        token = (route // TOPK).to(tl.int64)
        base, line = x + token * K, factors + token * COUNT
        own = tl.load(line, mask=live, other=0.0)
        gate, up = no_sum(ROWS, BM, BN), no_sum(ROWS, BM, BN)
        matrix = w + expert * (2 * INNER) * (K // 2 if FORM == E2M1 else K)
        scales = scale + expert * SROWS * SCOLS
        for k0 in range(0, K, BK):
            own = own_scales(own, line, live, k0, ROWS, BLOCK)
            a = row_tile(base, live, k0, K, ROWS, BK)
            gate = add_step(
                gate, a, own, matrix, scales, n, inside, k0, K, SCOLS,
                FORM, SCALE, HIGH, WIDE, ROWS, BN, BK,
            )  # fmt: skip
            up = add_step(
                up, a, own, matrix, scales, INNER + n, inside, k0, K, SCOLS,
                FORM, SCALE, HIGH, WIDE, ROWS, BN, BK,
            )  # fmt: skip
        gate = scaled(gate, own, scales, n, inside, SCOLS, SCALE, HIGH, WIDE, ROWS)
        up = scaled(up, own, scales, INNER + n, inside, SCOLS, SCALE, HIGH, WIDE, ROWS)
        weight = tl.load(weights + route, mask=live, other=0.0)
        value = weighted_swiglu(gate, up, limit, weight)
        out = hidden + (first + m).to(tl.int64)[:, None] * INNER + n[None, :]
        tl.store(out, value, mask=live[:, None] & inside[None, :])


@triton.jit
def expert_down_codes(
    hidden, factors, blocks, w, scale, y,
    R, G, COUNT, SCOLS, SROWS,
    E: tl.constexpr, N: tl.constexpr, INNER: tl.constexpr,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y f32 [R,N] = hidden w2^T of codes: hidden uint8 [R,INNER] with factors f32 [R,COUNT], w [E,N,INNER] as
    FORM says, scale [E,SROWS,SCOLS]; grid (G, ceil(N/BN)).
    """
    at = blocks + tl.program_id(0) * 3
    expert, first, count = tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)
    m, n = tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live, inside = m < count, n < N
    if count > 0:
        row = (first + m).to(tl.int64)
        base, line = hidden + row * INNER, factors + row * COUNT
        own = tl.load(line, mask=live, other=0.0)
        matrix = w + expert * N * (INNER // 2 if FORM == E2M1 else INNER)
        scales = scale + expert * SROWS * SCOLS
        acc = no_sum(ROWS, BM, BN)
        for k0 in range(0, INNER, BK):
            own = own_scales(own, line, live, k0, ROWS, BLOCK)
            acc = add_step(
                acc, row_tile(base, live, k0, INNER, ROWS, BK), own, matrix, scales, n, inside, k0, INNER,
                SCOLS, FORM, SCALE, HIGH, WIDE, ROWS, BN, BK,
            )  # fmt: skip
        acc = scaled(acc, own, scales, n, inside, SCOLS, SCALE, HIGH, WIDE, ROWS)
        out = y + row[:, None] * N + n[None, :]
        tl.store(out, acc, mask=live[:, None] & inside[None, :])
