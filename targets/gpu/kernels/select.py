"""Index scores over compressed entries and the best K of them, exactly (section 4.3).

Knows Triton and nothing of dsv4c. The selection is a radix select on the bits of the scores: four passes find
the K-th largest value, a fifth writes what is above it and, of what equals it, the lowest entries.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def index_scores(
    q, weights, keys, pos, n_valid, scores,
    B, T, QS, WS, C,
    H: tl.constexpr, D: tl.constexpr, RATIO: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """scores f32 [B,T,C] = sum_h weights[h] relu(q[h] . keys[c]); grid (B T, ceil(C/BC)).

    q f32 [B,T,H,D] and weights f32 [B,T,H] with strides QS and WS per token, keys f32 [B,C,D], pos and
    n_valid int32 [B]. Blocks that a token does not see are left as they were.
    """
    bt = tl.program_id(0)
    b, t = bt // T, bt % T
    here = tl.load(pos + b) + t
    visible = tl.where(t < tl.load(n_valid + b), (here + 1) // RATIO, 0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if tl.program_id(1) * BC < visible:
        h = tl.arange(0, BH)
        weight = tl.load(weights + bt.to(tl.int64) * WS + h, mask=h < H, other=0.0)
        rows, token = keys + (b.to(tl.int64) * C + c)[:, None] * D, q + bt.to(tl.int64) * QS + h[:, None] * D
        dots = tl.zeros((BH, BC), tl.float32)
        for k in range(BD // BK):
            d = k * BK + tl.arange(0, BK)
            inside = (d < D)[None, :]
            query = tl.load(token + d[None, :], mask=(h < H)[:, None] & inside, other=0.0)
            key = tl.load(rows + d[None, :], mask=(c < visible)[:, None] & inside, other=0.0)
            dots = tl.dot(query, tl.trans(key), dots, input_precision=PRECISION)
        score = tl.sum(tl.maximum(dots, 0.0) * weight[:, None], 0)
        tl.store(scores + bt.to(tl.int64) * C + c, score, mask=c < visible)


@triton.jit
def _ordered(score):
    """int32 whose unsigned order is that of f32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648)


@triton.jit
def index_topk(
    scores, pos, n_valid, out,
    B, T, C,
    RATIO: tl.constexpr, TOPK: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out int32 [B,T,TOPK]: the entries of the largest scores f32 [B,T,C], -1 behind min(TOPK, visible) of
    them.

    Equal scores go to the lower entry; entries stand in the order: above the last chosen value ascending,
    then those equal to it ascending. grid (B T,). BT is a power of two not below TOPK.
    """
    bt = tl.program_id(0)
    b, t = bt // T, bt % T
    visible = tl.where(t < tl.load(n_valid + b), (tl.load(pos + b) + t + 1) // RATIO, 0)
    lanes, k = tl.arange(0, BC), tl.arange(0, BT)
    mine, place = scores + bt.to(tl.int64) * C, out + bt.to(tl.int64) * TOPK
    if visible <= TOPK:
        tl.store(place + k, tl.where(k < visible, k, -1), mask=k < TOPK)
    else:
        bins = tl.arange(0, 256)
        prefix = tl.full((), 0, tl.int32)
        need = tl.full((), TOPK, tl.int32)
        for digit in tl.static_range(4):
            shift = 24 - 8 * digit
            counts = tl.zeros((256,), tl.int32)
            for c0 in range(0, visible, BC):
                c = c0 + lanes
                key = _ordered(tl.load(mine + c, mask=c < visible, other=0.0))
                same = c < visible
                if digit > 0:
                    same = same & ((key >> (shift + 8)) == (prefix >> (shift + 8)))
                counts += tl.histogram((key >> shift) & 255, 256, mask=same)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
            chosen = tl.sum((above >= need).to(tl.int32), 0)
            need = need - tl.sum(tl.where(bins == chosen, above, 0), 0)
            prefix = prefix | (chosen << shift)
        limit = prefix ^ -2147483648
        larger = tl.full((), 0, tl.int32)
        equal = TOPK - need
        for c0 in range(0, visible, BC):
            c = c0 + lanes
            key = _ordered(tl.load(mine + c, mask=c < visible, other=0.0)) ^ -2147483648
            more = (c < visible) & (key > limit)
            at = larger + tl.cumsum(more.to(tl.int32), 0) - 1
            tl.store(place + at, c, mask=more)
            larger += tl.sum(more.to(tl.int32), 0)
            tie = (c < visible) & (key == limit)
            at = equal + tl.cumsum(tie.to(tl.int32), 0) - 1
            tl.store(place + at, c, mask=tie & (at < TOPK))
            equal += tl.sum(tie.to(tl.int32), 0)
