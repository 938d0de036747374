"""Index scores over compressed entries and the best K of them, exactly (section 4.3; V4.1, section 4.5).

Knows Triton and nothing of dsv4c. The selection is a radix select on the bits of the scores: four passes find
the K-th largest value, a fifth writes what is above it and, of what equals it, the lowest entries. Where a
token has candidate blocks, scores of their entries alone are made, side by side in the order of the blocks.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def index_scores(
    q, weights, keys, pos, n_valid, blocks, scores,
    B, T, QS, WS, C, W,
    H: tl.constexpr, D: tl.constexpr, RATIO: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """scores f32 [B,T,W] = sum_h weights[h] relu(q[h] . key); grid (B T, ceil(W/BC)).

    q f32 [B,T,H,D] and weights f32 [B,T,H] with strides QS and WS per token, keys f32 [B,C,D], pos and
    n_valid int32 [B]. COUNT 0: W is C, and what a token does not see is left as it was. Else blocks int32
    [B,T,COUNT] names blocks of SIZE entries, ascending and -1 behind them, W is COUNT SIZE, and a score is
    -inf where there is no block or the token does not see the entry.
    """
    bt = tl.program_id(0)
    b, t = bt // T, bt % T
    here = tl.load(pos + b) + t
    visible = tl.where(t < tl.load(n_valid + b), (here + 1) // RATIO, 0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if COUNT == 0:
        entry, seen, busy = c, c < visible, tl.program_id(1) * BC < visible
    else:
        block = tl.load(blocks + bt * COUNT + c // SIZE, mask=c < W, other=-1)
        entry = block * SIZE + c % SIZE
        seen = (block >= 0) & (entry < visible)
        busy = tl.max(seen.to(tl.int32), 0) > 0
    score = tl.full((BC,), float("-inf"), tl.float32)
    if busy:
        h = tl.arange(0, BH)
        weight = tl.load(weights + bt.to(tl.int64) * WS + h, mask=h < H, other=0.0)
        token = q + bt.to(tl.int64) * QS + h[:, None] * D
        rows = keys + (b.to(tl.int64) * C + entry)[:, None] * D
        dots = tl.zeros((BH, BC), tl.float32)
        for k in range(BD // BK):
            d = k * BK + tl.arange(0, BK)
            inside = (d < D)[None, :]
            query = tl.load(token + d[None, :], mask=(h < H)[:, None] & inside, other=0.0)
            key = tl.load(rows + d[None, :], mask=seen[:, None] & inside, other=0.0)
            dots = tl.dot(query, tl.trans(key), dots, input_precision=PRECISION)
        score = tl.where(seen, tl.sum(tl.maximum(dots, 0.0) * weight[:, None], 0), score)
    tl.store(scores + bt.to(tl.int64) * W + c, score, mask=seen if COUNT == 0 else c < W)


@triton.jit
def block_tops(
    scores, pos, n_valid, tops,
    B, T, C, N,
    RATIO: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """tops f32 [B,T,N]: the best of scores f32 [B,T,C] in every block of SIZE entries, +inf for the newest.

    grid (B T, ceil(N/BN)). N is ceil(C/SIZE), BS a power of two not below SIZE, pos and n_valid int32 [B].
    Blocks of which a token sees nothing are left as they were.
    """
    bt = tl.program_id(0)
    b, t = bt // T, bt % T
    visible = tl.where(t < tl.load(n_valid + b), (tl.load(pos + b) + t + 1) // RATIO, 0)
    n, s = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BS)
    c = n[:, None] * SIZE + s[None, :]
    known = (s < SIZE)[None, :] & (c < visible)
    best = tl.max(tl.load(scores + bt.to(tl.int64) * C + c, mask=known, other=float("-inf")), 1)
    best = tl.where(n == (visible - 1) // SIZE, float("inf"), best)
    tl.store(tops + bt.to(tl.int64) * N + n, best, mask=n * SIZE < visible)


@triton.jit
def _ordered(score):
    """int32 whose unsigned order is that of f32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648)


@triton.jit
def _last_of(mine, n, TOPK: tl.constexpr, BC: tl.constexpr):
    """(limit, need): the order of the TOPK-th largest of n scores, and how many equal to it are chosen.

    Where n is less than TOPK the limit is below every score.
    """
    bins, lanes = tl.arange(0, 256), tl.arange(0, BC)
    prefix = tl.full((), 0, tl.int32)
    need = tl.full((), TOPK, tl.int32)
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros((256,), tl.int32)
        for c0 in range(0, n, BC):
            c = c0 + lanes
            key = _ordered(tl.load(mine + c, mask=c < n, other=0.0))
            same = c < n
            if digit > 0:
                same = same & ((key >> (shift + 8)) == (prefix >> (shift + 8)))
            counts += tl.histogram((key >> shift) & 255, 256, mask=same)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        chosen = tl.sum((above >= need).to(tl.int32), 0)
        need = need - tl.sum(tl.where(bins == chosen, above, 0), 0)
        prefix = prefix | (chosen << shift)
    return prefix ^ -2147483648, need


@triton.jit
def index_topk(
    scores, pos, n_valid, blocks, out,
    B, T, W,
    RATIO: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    TOPK: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out int32 [B,T,TOPK]: where the largest of scores f32 [B,T,W] stand, ascending, -1 behind them.

    Equal scores go to the lower place, and -inf is never chosen. A token has a score for every GROUP entries
    that it sees; with COUNT they are those of `index_scores` of blocks int32 [B,T,COUNT] of SIZE entries, and
    out names entries. pos and n_valid int32 [B]; grid (B T,). BT is a power of two not below TOPK.
    """
    bt = tl.program_id(0)
    b, t = bt // T, bt % T
    visible = tl.where(t < tl.load(n_valid + b), (tl.load(pos + b) + t + 1) // RATIO, 0)
    lanes, k = tl.arange(0, BC), tl.arange(0, BT)
    mine, place = scores + bt.to(tl.int64) * W, out + bt.to(tl.int64) * TOPK
    if COUNT == 0:
        n = (visible + GROUP - 1) // GROUP
        whole = n <= TOPK
    else:
        n = tl.where(visible > 0, COUNT * SIZE, 0)
        whole = n == 0
    if whole:
        tl.store(place + k, tl.where(k < n, k, -1), mask=k < TOPK)
    else:
        limit, need = _last_of(mine, n, TOPK, BC)
        taken = tl.full((), 0, tl.int32)
        equal = tl.full((), 0, tl.int32)
        for c0 in range(0, n, BC):
            c = c0 + lanes
            score = tl.load(mine + c, mask=c < n, other=float("-inf"))
            key = _ordered(score) ^ -2147483648
            tie = (c < n) & (key == limit)
            first = equal + tl.cumsum(tie.to(tl.int32), 0) <= need
            chosen = (score > float("-inf")) & ((key > limit) | (tie & first))
            at = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
            entry = c
            if COUNT > 0:
                entry = tl.load(blocks + bt * COUNT + c // SIZE, mask=chosen, other=0) * SIZE + c % SIZE
            tl.store(place + at, entry, mask=chosen)
            taken += tl.sum(chosen.to(tl.int32), 0)
            equal += tl.sum(tie.to(tl.int32), 0)
        tl.store(place + k, -1, mask=(k >= taken) & (k < TOPK))
