"""Hyper-connections: the mix of a sub-layer with Sinkhorn's iterations, collapse and expand (section 4).

Knows Triton and nothing of dsv4c: it is compiled and interpreted in an environment of its own.
All arithmetic is FP32. The mix is two kernels: the projection runs on the matrix unit and leaves its few
columns in memory, where the second reads them as the vectors and matrices they are.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hc_project(
    streams, fn, out,
    ROWS, norm_eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out f32 [ROWS,COLUMNS] = (streams fn^T) / sqrt(mean(streams^2) + norm_eps); grid (ceil(ROWS/BM),).

    streams [ROWS,WIDTH] (a token's streams side by side) and fn [COLUMNS,WIDTH] in one dtype; BN holds
    COLUMNS.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    live, inside = m < ROWS, n < COLUMNS
    total = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    for k0 in range(0, WIDTH, BK):
        k = k0 + tl.arange(0, BK)
        width = k < WIDTH
        x = tl.load(
            streams + m.to(tl.int64)[:, None] * WIDTH + k[None, :],
            mask=live[:, None] & width[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(fn + n[:, None] * WIDTH + k[None, :], mask=inside[:, None] & width[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
    norm = 1.0 / tl.sqrt(squares / WIDTH + norm_eps)
    tl.store(
        out + m[:, None] * COLUMNS + n[None, :], total * norm[:, None], mask=live[:, None] & inside[None, :]
    )


@triton.jit
def hc_sinkhorn(
    mixed, base, scale, pre, post, comb,
    ROWS, eps,
    N: tl.constexpr, ITERS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """pre, post f32 [ROWS,N] and comb f32 [ROWS,N,N] of mixed f32 [ROWS,N(2+N)]; grid (ceil(ROWS/BM),).

    base f32 [N(2+N)], scale f32 [3]; N is a power of two. ITERS counts the normalisations of columns.
    """
    m, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, N)
    live = m < ROWS
    columns: tl.constexpr = N * (2 + N)
    at = m[:, None] * columns + i[None, :]
    a = tl.load(mixed + at, mask=live[:, None], other=0.0) * tl.load(scale) + tl.load(base + i)[None, :]
    tl.store(pre + m[:, None] * N + i[None, :], 1.0 / (1.0 + tl.exp(-a)) + eps, mask=live[:, None])
    a = tl.load(mixed + N + at, mask=live[:, None], other=0.0) * tl.load(scale + 1)
    a += tl.load(base + N + i)[None, :]
    tl.store(post + m[:, None] * N + i[None, :], 2.0 / (1.0 + tl.exp(-a)), mask=live[:, None])

    square = i[None, :, None] * N + i[None, None, :]
    c = tl.load(
        mixed + 2 * N + m[:, None, None] * columns + square, mask=live[:, None, None], other=0.0
    ) * tl.load(scale + 2) + tl.load(base + 2 * N + square)  # fmt: skip
    c = tl.exp(c - tl.max(c, 2)[:, :, None])
    c = c / tl.sum(c, 2)[:, :, None] + eps
    c = c / (tl.sum(c, 1)[:, None, :] + eps)
    for _ in range(ITERS - 1):
        c = c / (tl.sum(c, 2)[:, :, None] + eps)
        c = c / (tl.sum(c, 1)[:, None, :] + eps)
    tl.store(comb + m[:, None, None] * (N * N) + square, c, mask=live[:, None, None])


@triton.jit
def hc_collapse(streams, pre, out, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """out [R,D] = sum_j pre_j X_j of streams [R,N,D] and pre f32 [R,N]; grid (R, ceil(D/BN)).

    Summed in FP32, j ascending, and rounded once, to the dtype of out.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = d < D
    total = tl.zeros((BN,), tl.float32)
    for j in tl.static_range(N):
        x = tl.load(streams + (row * N + j) * D + d, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(pre + row * N + j) * x
    tl.store(out + row * D + d, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def hc_expand(streams, y, post, comb, out, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """out_k = post_k y + sum_j comb_jk X_j of streams [R,N,D] and y [R,D]; grid (R, ceil(D/BN)).

    post f32 [R,N], comb f32 [R,N,N]; out [R,N,D]. Summed in FP32 and rounded once, to the dtype of out.
    """
    row = tl.program_id(0).to(tl.int64)
    d, j = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, N)
    inside = d < D
    x = tl.load(
        streams + (row * N + j[:, None]) * D + d[None, :], mask=inside[None, :], other=0.0
    ).to(tl.float32)  # fmt: skip
    fresh = tl.load(y + row * D + d, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(N):
        weights = tl.load(comb + row * (N * N) + j * N + k)
        total = tl.load(post + row * N + k) * fresh + tl.sum(weights[:, None] * x, 0)
        tl.store(out + (row * N + k) * D + d, total.to(out.dtype.element_ty), mask=inside)
