"""Attention over a sliding window and compressed entries, with a sink per head (section 4.1).

Knows Triton and nothing of dsv4c: it is compiled and interpreted in an environment of its own.
Keys are values. Blocks of BK keys are aligned to absolute positions (the window) and to entry numbers, so a
result does not depend on how a prompt was cut into calls.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(base, rows, live, D: tl.constexpr, BD: tl.constexpr):
    """[N,BD]: the rows [N] of base [..,D], zeros where not live and beyond D.

    A mask over columns costs a tensor in the unified buffer, so there is none where D fills the tile.
    """
    d = tl.arange(0, BD)
    mask = live[:, None] if D == BD else live[:, None] & (d < D)[None, :]
    return tl.load(base + rows[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _gather(base, rows, D: tl.constexpr, BD: tl.constexpr):
    """[N,BD]: the rows [N] of base [..,D], all of which exist; rows are moved one by one."""
    d = tl.arange(0, BD)
    if D == BD:
        return tl.load(base + rows[:, None] * D + d[None, :])
    else:
        return tl.load(base + rows[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)


@triton.jit
def _either(a, b, BITS: tl.constexpr):
    """a or b, of which at least one is +0: without arithmetic, which BF16 has only by way of FP32."""
    if BITS == 16:
        return (a.to(tl.int16, bitcast=True) | b.to(tl.int16, bitcast=True)).to(a.dtype, bitcast=True)
    else:
        return (a.to(tl.int32, bitcast=True) | b.to(tl.int32, bitcast=True)).to(a.dtype, bitcast=True)


@triton.jit
def _online(q, keys, seen, scale, acc, top, total):
    """One step of the online softmax: keys [BK,BD], seen [BK]; acc [BH,BD], top and total [BH] in FP32.

    Probabilities are rounded to the dtype of the keys where they meet them, not in the denominator.
    """
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    p = tl.exp(logits - new_top[:, None])
    shrink = tl.exp(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(keys.dtype), keys, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def sparse_attention(
    q, kv, ring, sinks, pos, n_valid, entries, selected, out,
    T, C, scale,
    H: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, RATIO: tl.constexpr,
    K: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [B,T,H,D] of q [B,T,H,D], kv [B,T,D] and ring [B,RING,D] in one dtype; grid (B * T, ceil(H/BH)).

    sinks f32 [H], pos and n_valid int32 [B], entries [B,C,D], selected int32 [B,T,K]. RATIO 0: no entries;
    K 0: every visible entry; else the first min(K, visible) of `selected`, where -1 is no entry. BD is the
    power of two that holds D. Sums are FP32, out is rounded once. Padding (t >= n_valid) gives zeros and is
    not read, nor are slots that no visible key stands in.
    """
    b, t = tl.program_id(0) // T, tl.program_id(0) % T
    start, count = tl.load(pos + b), tl.load(n_valid + b)
    here = start + t
    h, d, lanes = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BD), tl.arange(0, BK)
    real, heads = t < count, h < H
    base = tl.program_id(0).to(tl.int64) * (H * D)
    query = _rows(q + base, h, heads, D, BD)
    # The sink is the first member of the sum: its probability is exp(sink - top) and its value is zero.
    top = tl.load(sinks + h, mask=heads, other=0.0)
    total = tl.full((BH,), 1.0, tl.float32)
    acc = tl.zeros((BH, BD), tl.float32)

    oldest = tl.maximum(here - WINDOW + 1, 0)
    end = tl.where(real, here + 1, 0)
    for p0 in range(oldest // BK * BK, end, BK):
        p = p0 + lanes
        old, new = (p >= oldest) & (p < start), (p >= oldest) & (p >= start) & (p <= here)
        # Where RING is a multiple of BK a block never wraps: one piece of memory.
        slot = p0 % RING + lanes if RING % BK == 0 else p % RING
        past = _rows(ring + b.to(tl.int64) * (RING * D), slot, old, D, BD)
        fresh = _rows(kv + b.to(tl.int64) * T * D, p - start, new, D, BD)
        keys = _either(past, fresh, q.dtype.element_ty.primitive_bitwidth)
        acc, top, total = _online(query, keys, old | new, scale, acc, top, total)

    if RATIO > 0:
        visible = tl.where(real, (here + 1) // RATIO, 0)
        if K > 0:
            visible = tl.minimum(visible, K)
        mine = entries + b.to(tl.int64) * C * D
        for j0 in range(0, visible, BK):
            j = j0 + lanes
            seen = j < visible
            if K > 0:
                j = tl.load(selected + tl.program_id(0) * K + j, mask=seen, other=-1)
                seen = j >= 0
                # Entry 0 is written, or none would be visible: it stands in for what is not there.
                keys = _gather(mine, tl.maximum(j, 0), D, BD)
            else:
                keys = _rows(mine, j, seen, D, BD)
            acc, top, total = _online(query, keys, seen, scale, acc, top, total)

    value = (acc / total[:, None]).to(out.dtype.element_ty)
    mask = heads[:, None] if D == BD else heads[:, None] & (d < D)[None, :]
    tl.store(out + base + h[:, None] * D + d[None, :], value, mask=mask)
