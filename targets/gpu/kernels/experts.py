"""Routed experts: routes sorted by expert, w13 with SwiGLU, w2, and the sum per token (section 4.4).

Knows Triton and nothing of dsv4c. A block of BM rows belongs to one expert; `blocks` int32 [G,3] holds
(expert, first row, rows), and a block with no rows writes nothing. No atomics: every result is summed in one
order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .decode import E2M1, finish, step


@triton.jit
def _mine(ids, n_valid, expert, r, R, T, TOPK: tl.constexpr):
    """Which of the routes r belong to an expert; those of padding belong to none."""
    token = r // TOPK
    real = (r < R) & (token % T < tl.load(n_valid + token // T, mask=r < R, other=0))
    return real & (tl.load(ids + r, mask=r < R, other=-1) == expert)


@triton.jit
def expert_count(ids, n_valid, counts, R, T, E: tl.constexpr, TOPK: tl.constexpr, BR: tl.constexpr):
    """counts int32 [E]: routes of every expert among ids int32 [R] of tokens [B,T]; grid (E,)."""
    expert = tl.program_id(0)
    total = tl.zeros((BR,), tl.int32)
    for r0 in range(0, R, BR):
        total += _mine(ids, n_valid, expert, r0 + tl.arange(0, BR), R, T, TOPK).to(tl.int32)
    tl.store(counts + expert, tl.sum(total, 0))


@triton.jit
def expert_place(
    ids, n_valid, counts, order, slots, blocks,
    R, T, G,
    E: tl.constexpr, TOPK: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Sorts routes by expert; grid (E,). order int32 [R]: route of every row; slots int32 [R]: row of every
    route, -1 for padding; blocks int32 [G,3]. BE is a power of two not below E.
    """
    expert, e = tl.program_id(0), tl.arange(0, BE)
    count = tl.load(counts + e, mask=e < E, other=0)
    padded = (count + BM - 1) // BM
    first = tl.sum(tl.where(e < expert, count, 0), 0)
    block = tl.sum(tl.where(e < expert, padded, 0), 0)
    own = tl.sum(tl.where(e == expert, count, 0), 0)
    used = (own + BM - 1) // BM
    for i in range(0, used):
        at = blocks + (block + i) * 3
        tl.store(at, expert)
        tl.store(at + 1, first + i * BM)
        tl.store(at + 2, tl.minimum(own - i * BM, BM))
    if expert == E - 1:
        for i in range(block + used, G):
            at = blocks + i * 3
            tl.store(at, 0)
            tl.store(at + 1, 0)
            tl.store(at + 2, 0)
    done = first
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        mine = _mine(ids, n_valid, expert, r, R, T, TOPK)
        place = done + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + place, r, mask=mine)
        tl.store(slots + r, place, mask=mine)
        done += tl.sum(mine.to(tl.int32), 0)
        if expert == 0:
            token = r // TOPK
            count_ = tl.load(n_valid + token // T, mask=r < R, other=0)
            tl.store(slots + r, tl.full((BR,), -1, tl.int32), mask=(r < R) & (token % T >= count_))


@triton.jit
def weighted_swiglu(gate, up, limit, weight):
    """f32 [BM,BN]: silu(min(gate, limit)) * clip(up, -limit, limit) * weight f32 [BM]."""
    gate = tl.minimum(gate, limit)
    up = tl.maximum(tl.minimum(up, limit), -limit)
    return gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]


@triton.jit
def expert_up(
    x, weights, order, blocks, w, scale, tensor_scale, hidden,
    M, XS, R, G, SCOLS, SROWS, BAND, limit,
    E: tl.constexpr, TOPK: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, ROUND: tl.constexpr,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TENSOR: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden f32 [R,INNER] = silu(min(x w1, limit)) * clip(x w3, -limit, limit) * weight, rows in `order`.

    x f32 [M,K] rows of stride XS, weights f32 [R], w [E,2 INNER,K] as FORM says, scale [E,SROWS,SCOLS]; grid
    (G, ceil(INNER/BN)). With ROUND the result is rounded once, to a BF16 number.
    """
    at = blocks + tl.program_id(0) * 3
    expert, first, count = tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)
    m, n = tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live, inside = m < count, n < INNER
    if count > 0:
        route = tl.load(order + first + m, mask=live, other=0)
        base = x + (route // TOPK).to(tl.int64)[:, None] * XS
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        matrix = w + expert * (2 * INNER) * (K // 2 if FORM >= E2M1 else K)
        factors = scale + expert * SROWS * SCOLS
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            a = tl.load(base + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            gate = step(
                a, matrix, factors, n, inside, k0, K, SCOLS, gate,
                FORM, SCALE, HIGH, WIDE, PIECES, PRECISION, BM, BN, BK,
            )  # fmt: skip
            up = step(
                a, matrix, factors, INNER + n, inside, k0, K, SCOLS, up,
                FORM, SCALE, HIGH, WIDE, PIECES, PRECISION, BM, BN, BK,
            )  # fmt: skip
        bands = tensor_scale + expert * (2 * INNER // BAND)
        gate = finish(gate, factors, bands, n, inside, SCOLS, BAND, SCALE, HIGH, WIDE, TENSOR)
        up = finish(up, factors, bands, INNER + n, inside, SCOLS, BAND, SCALE, HIGH, WIDE, TENSOR)
        weight = tl.load(weights + route, mask=live, other=0.0)
        value = weighted_swiglu(gate, up, limit, weight)
        if ROUND:
            value = value.to(tl.bfloat16).to(tl.float32)
        out = hidden + (first + m).to(tl.int64)[:, None] * INNER + n[None, :]
        tl.store(out, value, mask=live[:, None] & inside[None, :])


@triton.jit
def expert_down(
    hidden, blocks, w, scale, tensor_scale, y,
    R, G, SCOLS, SROWS, BAND,
    E: tl.constexpr, N: tl.constexpr, INNER: tl.constexpr,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TENSOR: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y f32 [R,N] = hidden w2^T, rows in the order of hidden f32 [R,INNER].

    w [E,N,INNER] as FORM says, scale [E,SROWS,SCOLS]; grid (G, ceil(N/BN)).
    """
    at = blocks + tl.program_id(0) * 3
    expert, first, count = tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)
    m, n = tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live, inside = m < count, n < N
    if count > 0:
        base = hidden + (first + m).to(tl.int64)[:, None] * INNER
        matrix = w + expert * N * (INNER // 2 if FORM >= E2M1 else INNER)
        factors = scale + expert * SROWS * SCOLS
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, INNER, BK):
            k = k0 + tl.arange(0, BK)
            a = tl.load(base + k[None, :], mask=live[:, None] & (k < INNER)[None, :], other=0.0)
            acc = step(
                a, matrix, factors, n, inside, k0, INNER, SCOLS, acc,
                FORM, SCALE, HIGH, WIDE, PIECES, PRECISION, BM, BN, BK,
            )  # fmt: skip
        bands = tensor_scale + expert * (N // BAND)
        acc = finish(acc, factors, bands, n, inside, SCOLS, BAND, SCALE, HIGH, WIDE, TENSOR)
        out = y + (first + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, acc, mask=live[:, None] & inside[None, :])


@triton.jit
def expert_sum(y, slots, out, M, R, N: tl.constexpr, TOPK: tl.constexpr, BN: tl.constexpr):
    """out f32 [M,N]: per token the sum of its rows of y [R,N], in the order of slots int32 [M,TOPK]; -1 adds
    nothing. grid (M, ceil(N/BN)).
    """
    m = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for i in range(TOPK):
        slot = tl.load(slots + m * TOPK + i)
        row = y + tl.maximum(slot, 0).to(tl.int64) * N
        total += tl.load(row + n, mask=(n < N) & (slot >= 0), other=0.0)
    tl.store(out + m.to(tl.int64) * N + n, total, mask=n < N)
