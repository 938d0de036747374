"""Norms, rotary embedding and arithmetic on rows (sections 3.5 and 3.6).

Knows Triton and nothing of dsv4c. All numbers are FP32. XS is the stride of the rows of x, in elements, so
that a row may be a part of a wider one.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm(
    x, weight, y, M, XS, eps, HEADS: tl.constexpr, D: tl.constexpr, WEIGHTS: tl.constexpr, BD: tl.constexpr
):
    """y f32 [M,HEADS,D] = x / sqrt(mean(x^2) + eps), times weight f32 [WEIGHTS,D]; grid (M, HEADS).

    WEIGHTS is 0 for none, 1 for one that all heads share, or HEADS.
    """
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    inside = d < D
    v = tl.load(x + row * XS + head * D + d, mask=inside, other=0.0)
    v = v / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    if WEIGHTS > 0:
        v = v * tl.load(weight + (head * D if WEIGHTS > 1 else 0) + d, mask=inside, other=0.0)
    tl.store(y + (row * HEADS + head) * D + d, v, mask=inside)


@triton.jit
def norm_rotary(
    x, weight, cos, sin, y,
    M, XS, eps,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr,
    INVERSE: tl.constexpr, HALVES: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y f32 [M,HEADS,D]: rows of x normed where NORM, times weight f32 [D] where WEIGHTED, then the last 2
    HALF channels turned by cos and sin f32 [M,HALF]; grid (M, HEADS).

    Pairs are neighbours, or with HALVES a channel and the one HALF behind it. INVERSE turns back.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, i = tl.arange(0, BD), tl.arange(0, BD // 2)
    base, place = x + row * XS + head * D, y + (row * HEADS + head) * D
    FIRST: tl.constexpr = D - 2 * HALF
    factor = 1.0
    if NORM:
        v = tl.load(base + d, mask=d < D, other=0.0)
        factor = 1.0 / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    turned = i < HALF
    one = FIRST + (i if HALVES else 2 * i)
    two = one + (HALF if HALVES else 1)
    a = tl.load(base + one, mask=turned, other=0.0) * factor
    b = tl.load(base + two, mask=turned, other=0.0) * factor
    keep = tl.load(base + d, mask=d < FIRST, other=0.0) * factor
    if WEIGHTED:
        a = a * tl.load(weight + one, mask=turned, other=0.0)
        b = b * tl.load(weight + two, mask=turned, other=0.0)
        keep = keep * tl.load(weight + d, mask=d < FIRST, other=0.0)
    co = tl.load(cos + row * HALF + i, mask=turned, other=1.0)
    si = tl.load(sin + row * HALF + i, mask=turned, other=0.0)
    if INVERSE:
        si = -si
    tl.store(place + d, keep, mask=d < FIRST)
    tl.store(place + one, a * co - b * si, mask=turned)
    tl.store(place + two, a * si + b * co, mask=turned)


@triton.jit
def rope_angles(positions, frequencies, cos, sin, M, HALF: tl.constexpr, BD: tl.constexpr):
    """cos and sin f32 [M,HALF] of positions int32 [M] times frequencies f32 [HALF], rounded to FP32; grid
    (M,).
    """
    row, i = tl.program_id(0), tl.arange(0, BD)
    inside = i < HALF
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + i, mask=inside, other=0.0)
    tl.store(cos + row * HALF + i, tl.cos(angle), mask=inside)
    tl.store(sin + row * HALF + i, tl.sin(angle), mask=inside)


@triton.jit
def unary(x, y, M, XS, factor, low, high, N: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr):
    """y f32 [M,N] of rows of x; grid (M, ceil(N/BN)). KIND 0: x times factor; 1: sqrt(log(1 + exp(x))); 2: x
    clipped to low..high; 3: x rounded to BF16; 4: x (1 + erf(x / sqrt 2)) / 2.
    """
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    v = tl.load(x + row * XS + n, mask=n < N, other=0.0)
    if KIND == 0:
        v = v * factor
    elif KIND == 1:
        small = tl.exp(-tl.abs(v))
        # log(1 + small) without losing small: the division takes the rounding of 1 + small back
        sum_ = 1.0 + small
        tail = tl.where(sum_ == 1.0, small, tl.log(sum_) * (small / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
        v = tl.sqrt(tl.maximum(v, 0.0) + tail)
    elif KIND == 2:
        v = tl.minimum(tl.maximum(v, low), high)
    elif KIND == 3:
        v = v.to(tl.bfloat16).to(tl.float32)
    else:
        v = v * ((1.0 + tl.erf(v * 0.7071067811865476)) * 0.5)
    tl.store(y + row * N + n, v, mask=n < N)


@triton.jit
def binary(x, z, y, M, XS, ZS, limit, N: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr):
    """y f32 [M,N] of rows of x and z; grid (M, ceil(N/BN)). KIND 0: x + z; 1: silu(x) z; 2: silu(min(x,
    limit)) times z clipped to -limit..limit.
    """
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    a = tl.load(x + row * XS + n, mask=n < N, other=0.0)
    b = tl.load(z + row * ZS + n, mask=n < N, other=0.0)
    if KIND == 0:
        v = a + b
    else:
        if KIND == 2:
            a, b = tl.minimum(a, limit), tl.maximum(tl.minimum(b, limit), -limit)
        v = a / (1.0 + tl.exp(-a)) * b
    tl.store(y + row * N + n, v, mask=n < N)


@triton.jit
def copy_rows(x, y, M, XS, N: tl.constexpr, TIMES: tl.constexpr, BN: tl.constexpr):
    """y f32 [M,TIMES,N]: rows of x, TIMES times each; grid (M, ceil(N/BN))."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    v = tl.load(x + row * XS + n, mask=n < N, other=0.0)
    for i in tl.static_range(TIMES):
        tl.store(y + (row * TIMES + i) * N + n, v, mask=n < N)


@triton.jit
def gather_rows(x, rows, y, B, T, L, XS, N: tl.constexpr, BN: tl.constexpr):
    """y f32 [B,L,N]: row rows[b,l] of x f32 [B,T,N], rows int32 [B,L]; grid (B L, ceil(N/BN))."""
    bl, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    row = (bl // L).to(tl.int64) * T + tl.load(rows + bl)
    tl.store(y + bl.to(tl.int64) * N + n, tl.load(x + row * XS + n, mask=n < N, other=0.0), mask=n < N)
