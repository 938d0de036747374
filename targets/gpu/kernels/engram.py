"""Engram: token classes, n-gram row ids, table rows decoded, gate, convolution (specification of Engram).

Knows Triton and nothing of dsv4c. Ids are exact; a negative id is a token without a class.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .decode import NO_SCALE, code_value, scale_value


@triton.jit
def compress_tokens(
    tokens, classes, out, M, V, DEAD: tl.constexpr, DEAD_TOKEN: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """out int32 [M]: the class of each of tokens int32 [M] by classes int32 [V]; grid (ceil(M/BM),).

    -1 for the dead token and what lies outside of the table; with DEAD 0 negative tokens stay what they are.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    token = tl.load(tokens + m, mask=m < M, other=0)
    known = (token >= 0) & (token < V) & (token != DEAD_TOKEN)
    found = tl.load(classes + token, mask=known & (m < M), other=-1)
    if DEAD == 0:
        found = tl.where(token < 0, token, found)
    tl.store(out + m, found, mask=m < M)


@triton.jit
def ngram_rows(
    ids, history, pos, n_valid, numbers, out,
    B, T,
    ORDERS: tl.constexpr, HEADS: tl.constexpr, HISTORY: tl.constexpr, PAD: tl.constexpr, DEAD: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """out int32 [B,T,ORDERS HEADS]: the rows of the n-grams that end at each token, -1 for padding; grid (B
    T,).

    ids int32 [B,T], history int32 [B,HISTORY] of earlier ids by position, pos and n_valid int32 [B]. numbers
    int64: ORDERS + 1 multipliers, then ORDERS HEADS primes, then as many offsets. Products and their XOR are
    int64.
    """
    bt, k = tl.program_id(0), tl.arange(0, BH)
    b, t = bt // T, bt % T
    first, real = tl.load(pos + b), t < tl.load(n_valid + b)
    mixed = tl.full((), 0, tl.int64)
    blocked = t < 0
    for age in tl.static_range(ORDERS + 1):
        at, inside = first + t - age, t - age >= 0
        value = tl.load(ids + bt - age, mask=inside & real, other=PAD)
        older = tl.load(
            history + b * HISTORY + tl.maximum(at, 0) % HISTORY, mask=(t - age < 0) & (at >= 0), other=PAD
        )
        value = tl.where(inside, value, older)
        if DEAD:
            blocked = blocked | (value < 0)
            value = tl.where(blocked, PAD, value)
        mixed = mixed ^ (value.to(tl.int64) * tl.load(numbers + age))
        if age > 0:
            head = (age - 1) * HEADS + k
            prime = tl.load(numbers + ORDERS + 1 + head, mask=k < HEADS, other=1)
            offset = tl.load(numbers + ORDERS + 1 + ORDERS * HEADS + head, mask=k < HEADS, other=0)
            rest = mixed % prime
            rest = tl.where(rest < 0, rest + prime, rest)
            row = tl.where(real, (rest + offset).to(tl.int32), -1)
            tl.store(out + bt * (ORDERS * HEADS) + head, row, mask=k < HEADS)


@triton.jit
def ngram_history(history, ids, pos, n_valid, B, T, HISTORY: tl.constexpr, BH: tl.constexpr):
    """history int32 [B,HISTORY]: the last valid of ids int32 [B,T] at their positions; grid (B,)."""
    b = tl.program_id(0)
    t = tl.load(n_valid + b) - 1 - tl.arange(0, BH)
    known = (t >= 0) & (tl.arange(0, BH) < HISTORY)
    id_ = tl.load(ids + b * T + t, mask=known, other=0)
    tl.store(history + b * HISTORY + (tl.load(pos + b) + t) % HISTORY, id_, mask=known)


@triton.jit
def engram_rows(
    rows, w, scale, out,
    M, V, SROWS,
    FORM: tl.constexpr, SCALE: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out f32 [M,COLUMNS WIDTH]: the rows of a table w [V,WIDTH] side by side, decoded; zeros for negative
    rows.

    rows int32 [M,COLUMNS], scale [SROWS,GROUPS], one for WIDTH/GROUPS codes; grid (M, ceil(COLUMNS
    WIDTH/BN)).
    """
    m, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < COLUMNS * WIDTH
    row = tl.load(rows + m * COLUMNS + n // WIDTH, mask=inside, other=-1)
    known, at = inside & (row >= 0), tl.maximum(row, 0).to(tl.int64)
    value = code_value(tl.load(w + at * WIDTH + n % WIDTH, mask=known, other=0), FORM)
    if SCALE != NO_SCALE:
        group = n % WIDTH // (WIDTH // GROUPS)
        value = value * scale_value(tl.load(scale + at * GROUPS + group, mask=known, other=0), SCALE)
    tl.store(out + m.to(tl.int64) * (COLUMNS * WIDTH) + n, value, mask=inside)


@triton.jit
def engram_gate(
    x, kv, q_weight, k_weight, ids, out,
    M, KS, eps, floor,
    N: tl.constexpr, D: tl.constexpr, COPYSIGN: tl.constexpr, RESIDUAL: tl.constexpr, MARKED: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """out f32 [M,N,D] = gate value, plus x where RESIDUAL; grid (M, N).

    x f32 [M,N,D]; kv f32 rows of stride KS: N keys of D channels and one value. q_weight and k_weight f32
    [N,D]. The gate is the sigmoid of the signed root of the normed dot product of x and key. ids int32 [M],
    where MARKED: tokens with a negative one get nothing. All arithmetic is FP32.
    """
    row, stream, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    inside = d < D
    at = (row * N + stream) * D + d
    a = tl.load(x + at, mask=inside, other=0.0)
    key = tl.load(kv + row * KS + stream * D + d, mask=inside, other=0.0)
    weight = tl.load(q_weight + stream * D + d, mask=inside, other=0.0)
    weight = weight * tl.load(k_weight + stream * D + d, mask=inside, other=0.0)
    dot = tl.sum(a * weight * key, 0)
    spread = tl.sqrt(tl.sum(a * a, 0) / D + eps) * tl.sqrt(tl.sum(key * key, 0) / D + eps)
    delta = dot / tl.sqrt(D * 1.0) / spread
    root = tl.sqrt(tl.maximum(tl.abs(delta), floor))
    signed = tl.where(delta < 0, -root, root)
    if COPYSIGN == 0:
        signed = tl.where(delta == 0, 0.0, signed)
    value = tl.load(kv + row * KS + N * D + d, mask=inside, other=0.0) / (1.0 + tl.exp(-signed))
    if MARKED:
        value = tl.where(tl.load(ids + row) < 0, 0.0, value)
    if RESIDUAL:
        value = a + value
    tl.store(out + at, value, mask=inside)


@triton.jit
def short_conv(
    rows, ring, weight, pos, n_valid, y,
    B, T, XS,
    N: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, RING: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y f32 [B,T,N] = silu(sum_i weight[:,i] row[t - DILATION (TAPS - 1 - i)]), i ascending.

    rows f32 [B,T,N] of stride XS; earlier ones lie in ring f32 [B,RING,N] at their positions, and before the
    start there are zeros. weight f32 [N,TAPS], pos and n_valid int32 [B]; grid (B T, ceil(N/BN)). Padding
    gives zeros.
    """
    bt, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b, t = bt // T, bt % T
    first, real = tl.load(pos + b), t < tl.load(n_valid + b)
    inside = (n < N) & real
    total = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(TAPS):
        ago = DILATION * (TAPS - 1 - i)
        fresh, old = t >= ago, (t < ago) & (first + t >= ago)
        z = tl.load(rows + (bt - ago).to(tl.int64) * XS + n, mask=inside & fresh, other=0.0)
        slot = b.to(tl.int64) * RING + tl.maximum(first + t - ago, 0) % RING
        z += tl.load(ring + slot * N + n, mask=inside & old, other=0.0)
        total += tl.load(weight + n * TAPS + i, mask=inside, other=0.0) * z
    tl.store(y + bt.to(tl.int64) * N + n, total / (1.0 + tl.exp(-total)), mask=n < N)
