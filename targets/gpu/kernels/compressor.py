"""Closing groups of the compressors: pooling, or pooling, norm, rotary and the entry itself (section 4.2).

Knows Triton and nothing of dsv4c. A group's rows lie in the ring, where earlier calls brought them, or in
this call's rows.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row(new, ring, b, p, first, channel, T, S, live, RING: tl.constexpr, CHANNELS: tl.constexpr):
    """f32 [BR,BC]: rows of positions p [BR], channels [BR,BC]: before `first` from the ring; 0 where not
    live.
    """
    old, fresh = p < first, p >= first
    slot = ring + b.to(tl.int64) * (RING * CHANNELS) + tl.maximum(p, 0)[:, None] % RING * CHANNELS + channel
    x = tl.load(slot, mask=old[:, None] & live, other=0.0)
    row = new + (b.to(tl.int64) * T + (p - first))[:, None] * S + channel
    return x + tl.load(row, mask=fresh[:, None] & live, other=0.0)


@triton.jit
def _pooled(
    kv, gate, kv_ring, gate_ring, b, j, first, T, KS, GS,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """f32 [BC]: the softmax-gated sum of group j, in steps of BR rows; 0 from WIDTH on."""
    ROWS: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    CHANNELS: tl.constexpr = 2 * WIDTH if OVERLAP else WIDTH
    c, r = tl.arange(0, BC), tl.arange(0, BR)
    inside = c < WIDTH
    top = tl.full((BC,), float("-inf"), tl.float32)
    above = tl.zeros((BC,), tl.float32)
    below = tl.zeros((BC,), tl.float32)
    # The first group has nothing before it; rows of its own always follow in the same or a later step.
    begin = tl.where(j > 0, 0, RATIO) if OVERLAP else 0
    for r0 in range(begin, ROWS, BR):
        row = r0 + r
        p = (j - 1) * RATIO + row if OVERLAP else j * RATIO + row
        shift = tl.where(row >= RATIO, WIDTH, 0) if OVERLAP else row * 0
        channel = shift[:, None] + c[None, :]
        live = (row < ROWS)[:, None] & inside[None, :]
        g = _row(gate, gate_ring, b, p, first, channel, T, GS, live, ROWS, CHANNELS)
        v = _row(kv, kv_ring, b, p, first, channel, T, KS, live, ROWS, CHANNELS)
        g = tl.where((row < ROWS)[:, None], g, float("-inf"))
        new_top = tl.maximum(top, tl.max(g, 0))
        e = tl.exp(g - new_top[None, :])
        shrink = tl.exp(top - new_top)
        above = above * shrink + tl.sum(e * v, 0)
        below = below * shrink + tl.sum(e, 0)
        top = new_top
    return tl.where(inside, above / below, 0.0)


@triton.jit
def compress(
    kv, gate, kv_ring, gate_ring, pos, n_valid, out,
    B, T, G, KS, GS,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out f32 [B,G,WIDTH]: the groups that this call's tokens close, zeros behind them; grid (B, G).

    Operands are those of `entries_close`.
    """
    b, i, c = tl.program_id(0), tl.program_id(1), tl.arange(0, BC)
    first, count = tl.load(pos + b), tl.load(n_valid + b)
    j = first // RATIO + i
    y = tl.zeros((BC,), tl.float32)
    if j < (first + count) // RATIO:
        y = _pooled(
            kv, gate, kv_ring, gate_ring, b, j, first, T, KS, GS, RATIO, WIDTH, OVERLAP, BR, BC
        )  # fmt: skip
    tl.store(out + (b.to(tl.int64) * G + i) * WIDTH + c, y, mask=c < WIDTH)


@triton.jit
def entries_close(
    entries, kv, gate, kv_ring, gate_ring, weight, cos, sin, pos, n_valid,
    B, T, G, C, KS, GS, eps,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, HALF: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """entries f32 [B,C,WIDTH]: writes what this call's tokens close; grid (B, G).

    kv and gate f32 [B,T,CH] with strides KS and GS per token, their rings f32 [B,R,CH]; CH = WIDTH and R =
    RATIO, or both twice with OVERLAP, where a group takes the second half of the channels and the group
    before it the first. weight f32 [WIDTH], cos and sin f32 [B,G,HALF], pos and n_valid int32 [B].
    Softmax-gated sums over steps of BR rows, norm and rotary are FP32.
    """
    b, i = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(pos + b), tl.load(n_valid + b)
    j = first // RATIO + i
    if j < (first + count) // RATIO:
        c = tl.arange(0, BC)
        inside = c < WIDTH
        y = _pooled(
            kv, gate, kv_ring, gate_ring, b, j, first, T, KS, GS, RATIO, WIDTH, OVERLAP, BR, BC
        )  # fmt: skip
        y = y / tl.sqrt(tl.sum(y * y, 0) / WIDTH + eps) * tl.load(weight + c, mask=inside, other=0.0)
        even, odd = tl.split(y.reshape(BC // 2, 2))
        turn = tl.arange(0, BC // 2) - (WIDTH // 2 - HALF)
        turned = (turn >= 0) & (turn < HALF)
        angle = (b * G + i) * HALF + turn
        co = tl.load(cos + angle, mask=turned, other=1.0)
        si = tl.load(sin + angle, mask=turned, other=0.0)
        y = tl.join(even * co - odd * si, even * si + odd * co).reshape(BC)
        tl.store(entries + (b.to(tl.int64) * C + j) * WIDTH + c, y, mask=inside)
