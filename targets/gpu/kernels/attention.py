"""Attention over a sliding window and compressed entries, with a sink per head (section 4.1).

Knows Triton and nothing of dsv4c. Keys are values. Blocks of BK keys are aligned to absolute positions (the
window) and to entry numbers, so a result does not depend on how a prompt was cut into calls.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(
    q, rows, seen, heads, D: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """f32 [BH,BK]: q . key in steps of BC channels, so that few of them are in registers at a time.

    q points to the heads of one token, rows [BK] to keys, which are zero where not seen. A loop that is not
    unrolled keeps the compiler from holding all of q.
    """
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    out = tl.zeros((BH, BK), tl.float32)
    for c in range(BD // BC):
        d = c * BC + tl.arange(0, BC)
        inside = d < D
        query = tl.load(q + h[:, None] * D + d[None, :], mask=heads[:, None] & inside[None, :], other=0.0)
        key = tl.load(rows[:, None] + d[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
        out = tl.dot(query, tl.trans(key), out, input_precision=PRECISION)
    return out


@triton.jit
def _weights(logits, seen, top, total):
    """One step of the online softmax: logits [BH,BK], seen [BK], top and total [BH].

    The maximum begins at the sink, so a block of which nothing is seen changes nothing.
    """
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    p = tl.exp(logits - new_top[:, None])
    shrink = tl.exp(top - new_top)
    return p, shrink, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def _values(
    p,
    shrink,
    rows,
    seen,
    acc,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [BH,BV] shrunk, plus p [BH,BK] times the channels from FIRST on of the keys at rows [BK]."""
    d = FIRST + tl.arange(0, BV)
    keys = tl.load(rows[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
    return tl.dot(p, keys, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit
def _attend(
    q, rows, seen, heads, scale, one, two, top, total,
    D: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A block of keys: one and two [BH,BD/2] are the halves of the sum, so that half the keys are in
    registers.
    """
    logits = _logits(q, rows, seen, heads, D, H, PRECISION, BH, BK, BD, BC) * scale
    p, shrink, top, total = _weights(logits, seen, top, total)
    one = _values(p, shrink, rows, seen, one, D, 0, BD // 2, PRECISION)
    two = _values(p, shrink, rows, seen, two, D, BD // 2, BD // 2, PRECISION)
    return one, two, top, total


@triton.jit
def attention(
    q, kv, ring, sinks, pos, n_valid, entries, selected, start, out,
    B, T, QS, KS, C, scale,
    H: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, RATIO: tl.constexpr,
    TOPK: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out f32 [B,T,H,D] of q f32 [B,T,H,D], kv f32 [B,T,D], ring f32 [B,RING,D]; grid (B T, ceil(H/BH)).

    q and kv have a stride of QS and KS per token. sinks f32 [H], pos, n_valid and start int32 [B], entries
    f32 [B,C,D], selected int32 [B,T,TOPK] with -1 behind what is chosen. RATIO 0: no entries; TOPK 0: every
    entry that the token may see; START 0: a window may begin at position 0. Padding gives zeros. The softmax
    begins with the sink as its maximum; all arithmetic is FP32, products by the split of PRECISION.
    """
    bt = tl.program_id(0)
    b, t = bt // T, bt % T
    h, lanes = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BK)
    heads = h < H
    first, real = tl.load(pos + b), t < tl.load(n_valid + b)
    here = first + t
    token = q + bt.to(tl.int64) * QS
    asked = heads & real
    top = tl.load(sinks + h, mask=heads, other=0.0)
    total = tl.full((BH,), 1.0, tl.float32)
    one = tl.zeros((BH, BD // 2), tl.float32)
    two = tl.zeros((BH, BD // 2), tl.float32)

    oldest = tl.maximum(here - WINDOW + 1, 0)
    if START:
        oldest = tl.maximum(oldest, tl.load(start + b))
    end = tl.where(real, here + 1, 0)
    own = kv + b.to(tl.int64) * T * KS
    past = ring + b.to(tl.int64) * (RING * D)
    for p0 in range(oldest // BK * BK, end, BK):
        p = p0 + lanes
        old, new = (p >= oldest) & (p < first), (p >= oldest) & (p >= first) & (p <= here)
        rows = tl.where(old, past + (p % RING).to(tl.int64) * D, own + (p - first).to(tl.int64) * KS)
        one, two, top, total = _attend(
            token, rows, old | new, asked, scale, one, two, top, total, D, H, PRECISION, BH, BK, BD, BC
        )

    if RATIO > 0:
        visible = tl.where(real, (here + 1) // RATIO, 0)
        if TOPK > 0:
            visible = tl.minimum(visible, TOPK)
        mine = entries + b.to(tl.int64) * C * D
        for j0 in range(0, visible, BK):
            j = j0 + lanes
            seen = j < visible
            if TOPK > 0:
                j = tl.load(selected + bt * TOPK + j, mask=seen, other=-1)
                seen = j >= 0
            rows = mine + j.to(tl.int64) * D
            one, two, top, total = _attend(
                token, rows, seen, asked, scale, one, two, top, total, D, H, PRECISION, BH, BK, BD, BC
            )

    d = tl.arange(0, BD // 2)
    place = out + bt.to(tl.int64) * (H * D) + h[:, None] * D + d[None, :]
    tl.store(place, tl.where(real, one / total[:, None], 0.0), mask=heads[:, None] & (d < D)[None, :])
    value = tl.where(real, two / total[:, None], 0.0)
    tl.store(place + BD // 2, value, mask=heads[:, None] & (d + BD // 2 < D)[None, :])
