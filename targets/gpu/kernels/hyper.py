"""Hyper-connections: mixes with Sinkhorn's iterations, collapse and expand (section 4).

Knows Triton and nothing of dsv4c. All arithmetic is FP32. The projection is cut into SPLITS parts of its
columns, so that one token already keeps many cores busy; the parts are added in order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hc_project(
    streams, fn, parts,
    M,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts f32 [SPLITS,M,BN]: columns 0.. are streams fn^T over PART columns, the last the sum of squares.

    streams f32 [M,WIDTH], fn f32 [COLUMNS,WIDTH]; BN is above COLUMNS. grid (ceil(M/BM), SPLITS).
    """
    m, n, split = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.program_id(1)
    live, inside = m < M, n < COLUMNS
    total = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    for k0 in range(split * PART, (split + 1) * PART, BK):
        k = k0 + tl.arange(0, BK)
        known = (k < WIDTH) & (k < (split + 1) * PART)
        x = tl.load(
            streams + m.to(tl.int64)[:, None] * WIDTH + k[None, :],
            mask=live[:, None] & known[None, :],
            other=0.0,
        )
        w = tl.load(fn + n[:, None] * WIDTH + k[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        squares += tl.sum(x * x, 1)
    total = tl.where((n == BN - 1)[None, :], squares[:, None], total)
    at = parts + (split * M + m)[:, None] * BN + n[None, :]
    tl.store(at, total, mask=live[:, None])


@triton.jit
def _sum_parts(parts, m, live, column, M, SPLITS: tl.constexpr, BN: tl.constexpr):
    """The columns of all parts, added in order; `column` and `live` have the shape of the result."""
    total = tl.load(parts + m * BN + column, mask=live, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(parts + (split * M + m) * BN + column, mask=live, other=0.0)
    return total


@triton.jit
def hc_sinkhorn(
    parts, base, scale, pre, post, comb,
    M, eps, norm_eps,
    WIDTH: tl.constexpr, N: tl.constexpr, ITERS: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """pre, post f32 [M,N] and comb f32 [M,N,N] of parts f32 [SPLITS,M,BN]; grid (ceil(M/BM),).

    base f32 [N(2+N)], scale f32 [3]; N is a power of two. ITERS counts the normalisations of columns.
    """
    m, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, N)
    live = m < M
    norm = 1.0 / tl.sqrt(_sum_parts(parts, m, live, BN - 1, M, SPLITS, BN) / WIDTH + norm_eps)
    rows, known, column = m[:, None], live[:, None], i[None, :]
    a = _sum_parts(parts, rows, known, column, M, SPLITS, BN) * norm[:, None]
    a = a * tl.load(scale) + tl.load(base + i)[None, :]
    tl.store(pre + rows * N + column, 1.0 / (1.0 + tl.exp(-a)) + eps, mask=known)
    a = _sum_parts(parts, rows, known, N + column, M, SPLITS, BN) * norm[:, None]
    a = a * tl.load(scale + 1) + tl.load(base + N + i)[None, :]
    tl.store(post + rows * N + column, 2.0 / (1.0 + tl.exp(-a)), mask=known)

    square = i[None, :, None] * N + i[None, None, :]
    rows, known = m[:, None, None], live[:, None, None]
    c = _sum_parts(parts, rows, known, 2 * N + square, M, SPLITS, BN) * norm[:, None, None]
    c = c * tl.load(scale + 2) + tl.load(base + 2 * N + square)
    c = tl.exp(c - tl.max(c, 2)[:, :, None])
    c = c / tl.sum(c, 2)[:, :, None] + eps
    c = c / (tl.sum(c, 1)[:, None, :] + eps)
    for _ in range(ITERS - 1):
        c = c / (tl.sum(c, 2)[:, :, None] + eps)
        c = c / (tl.sum(c, 1)[:, None, :] + eps)
    tl.store(comb + rows * (N * N) + square, c, mask=known)


@triton.jit
def hc_head(
    parts, base, scale, out,
    M, eps, norm_eps,
    WIDTH: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out f32 [M,N] = sigmoid(mix * scale + base) + eps of parts f32 [SPLITS,M,BN]; grid (ceil(M/BM),).

    base f32 [N], scale f32 [1].
    """
    m, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, N)
    live = m < M
    norm = 1.0 / tl.sqrt(_sum_parts(parts, m, live, BN - 1, M, SPLITS, BN) / WIDTH + norm_eps)
    a = _sum_parts(parts, m[:, None], live[:, None], i[None, :], M, SPLITS, BN) * norm[:, None]
    a = a * tl.load(scale) + tl.load(base + i)[None, :]
    tl.store(out + m[:, None] * N + i[None, :], 1.0 / (1.0 + tl.exp(-a)) + eps, mask=live[:, None])


@triton.jit
def hc_collapse(streams, pre, out, M, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """out f32 [M,D] = sum_j pre_j X_j, j ascending, of streams f32 [M,N,D] and pre f32 [M,N]; grid (M,
    ceil(D/BN)).
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = d < D
    total = tl.zeros((BN,), tl.float32)
    for j in tl.static_range(N):
        x = tl.load(streams + (row * N + j) * D + d, mask=inside, other=0.0)
        total += tl.load(pre + row * N + j) * x
    tl.store(out + row * D + d, total, mask=inside)


@triton.jit
def hc_expand(streams, y, post, comb, out, M, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """out_k = post_k y + sum_j comb_jk X_j of streams f32 [M,N,D], y f32 [M,D], post f32 [M,N] and comb f32
    [M,N,N]; grid (M, ceil(D/BN)). out f32 [M,N,D].
    """
    row = tl.program_id(0).to(tl.int64)
    d, j = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, N)
    inside = d < D
    x = tl.load(streams + (row * N + j[:, None]) * D + d[None, :], mask=inside[None, :], other=0.0)
    fresh = tl.load(y + row * D + d, mask=inside, other=0.0)
    for k in tl.static_range(N):
        weights = tl.load(comb + row * (N * N) + j * N + k)
        total = tl.load(post + row * N + k) * fresh + tl.sum(weights[:, None] * x, 0)
        tl.store(out + (row * N + k) * D + d, total, mask=inside)
