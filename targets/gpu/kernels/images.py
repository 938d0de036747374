"""Rows of images into the text, and what only the image encoder needs (V4.1, section 9).

Knows Triton and nothing of dsv4c. All arithmetic is FP32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_images(
    x, tokens, images, n_images, y,
    B, T, R, XS, image_token,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y f32 [B,T,D] = x of stride XS, but row i of images f32 [B,R,D] for the i-th image token of this call.

    tokens int32 [B,T]; of sequence b as many rows are used as n_images int32 [B] says, R at most; grid (B T,
    ceil(D/BD)). Image tokens in front are counted by steps of BT.
    """
    bt, d = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    b, t, lanes = bt // T, bt % T, tl.arange(0, BT)
    before = tl.full((), 0, tl.int32)
    taken = tl.load(tokens + bt) == image_token
    for t0 in range(0, tl.where(taken, t, 0), BT):
        earlier = tl.load(tokens + b * T + t0 + lanes, mask=t0 + lanes < t, other=-1)
        before += tl.sum(((earlier == image_token) & (t0 + lanes < t)).to(tl.int32), 0)
    taken = taken & (before < tl.minimum(tl.load(n_images + b), R))
    inside = d < D
    v = tl.load(x + bt.to(tl.int64) * XS + d, mask=inside & (taken == 0), other=0.0)
    row = b.to(tl.int64) * R + before
    v += tl.load(images + row * D + d, mask=inside & taken, other=0.0)
    tl.store(y + bt.to(tl.int64) * D + d, v, mask=inside)


@triton.jit
def gather_cells(x, cells, y, B, N, M, XS, D: tl.constexpr, CELL: tl.constexpr, BN: tl.constexpr):
    """y f32 [B,M,D CELL]: channel c of row cells[b,m,i] of x f32 [B,N,D] at c CELL + i, zero for row -1.

    x has a stride of XS, cells int32 [B,M,CELL]; grid (B M, ceil(D CELL/BN)).
    """
    bm, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < D * CELL
    row = tl.load(cells + bm * CELL + n % CELL, mask=inside, other=-1)
    at = (bm // M).to(tl.int64) * N + tl.maximum(row, 0)
    v = tl.load(x + at * XS + n // CELL, mask=inside & (row >= 0), other=0.0)
    tl.store(y + bm.to(tl.int64) * (D * CELL) + n, v, mask=inside)


@triton.jit
def image_span(rows, layout, start, newline, end, y, B, M, S, XS, D: tl.constexpr, BD: tl.constexpr):
    """y f32 [B,S,D]: row layout[b,s] of rows f32 [B,M,D], or start, newline, end where it is -1, -2, -3.

    rows have a stride of XS, layout int32 [B,S], the marks f32 [D]; grid (B S, ceil(D/BD)).
    """
    bs, d = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    inside, row = d < D, tl.load(layout + bs)
    at = (bs // S).to(tl.int64) * M + tl.maximum(row, 0)
    v = tl.load(rows + at * XS + d, mask=inside & (row >= 0), other=0.0)
    v += tl.load(start + d, mask=inside & (row == -1), other=0.0)
    v += tl.load(newline + d, mask=inside & (row == -2), other=0.0)
    v += tl.load(end + d, mask=inside & (row == -3), other=0.0)
    tl.store(y + bs.to(tl.int64) * D + d, v, mask=inside)


@triton.jit
def full_attention(
    q, k, v, out,
    B, N, QS, KS, VS, scale,
    H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out f32 [B,N,H,D] = softmax(scale q k^T) v over all N, without a mask; grid (ceil(N/BM), B H).

    q, k and v f32 [B,N,H,D] with strides QS, KS and VS per row. An online softmax over steps of BN keys; dot
    products are summed by steps of BK channels. All arithmetic is FP32, products by the split of PRECISION.
    """
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    m, n, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    asked, inside = m < N, d < D
    first = b.to(tl.int64) * N
    query = q + (first + m)[:, None] * QS + h * D
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for n0 in range(0, N, BN):
        seen = n0 + n < N
        at = first + n0 + n
        logits = tl.zeros((BM, BN), tl.float32)
        for c in range(BD // BK):
            e = c * BK + tl.arange(0, BK)
            known = (e < D)[None, :]
            one = tl.load(query + e[None, :], mask=asked[:, None] & known, other=0.0)
            two = tl.load(k + at[:, None] * KS + h * D + e[None, :], mask=seen[:, None] & known, other=0.0)
            logits = tl.dot(one, tl.trans(two), logits, input_precision=PRECISION)
        logits = tl.where(seen[None, :], logits * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp(logits - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        values = tl.load(
            v + at[:, None] * VS + h * D + d[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        acc = tl.dot(p, values, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    place = out + ((first + m)[:, None] * H + h) * D + d[None, :]
    tl.store(place, acc / total[:, None], mask=asked[:, None] & inside[None, :])
