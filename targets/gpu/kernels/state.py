"""Positions, rings and the biases that go by position (sections 4.2 and 5).

Knows Triton and nothing of dsv4c. Rows that `n_valid` leaves out are never written to a state.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def positions(pos, out, B, T, BT: tl.constexpr):
    """out int32 [B,T] = pos[b] + t of pos int32 [B]; grid (B, ceil(T/BT))."""
    b, t = tl.program_id(0), tl.program_id(1) * BT + tl.arange(0, BT)
    tl.store(out + b * T + t, tl.load(pos + b) + t, mask=t < T)


@triton.jit
def entry_positions(pos, out, B, G, RATIO: tl.constexpr, BT: tl.constexpr):
    """out int32 [B,G] = (pos[b] // RATIO + g) RATIO of pos int32 [B]; grid (B, ceil(G/BT))."""
    b, g = tl.program_id(0), tl.program_id(1) * BT + tl.arange(0, BT)
    tl.store(out + b * G + g, (tl.load(pos + b) // RATIO + g) * RATIO, mask=g < G)


@triton.jit
def advance(pos, n_valid, B):
    """pos int32 [B] += n_valid int32 [B]; grid (B,)."""
    b = tl.program_id(0)
    tl.store(pos + b, tl.load(pos + b) + tl.load(n_valid + b))


@triton.jit
def ring_write(ring, rows, pos, n_valid, B, T, XS, RING: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """ring f32 [B,RING,D]: the last RING valid rows of f32 [B,T,D] at their positions; grid (B T,
    ceil(D/BD)).
    """
    bt, d = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    b, t = bt // T, bt % T
    count = tl.load(n_valid + b)
    if (t < count) & (t >= count - RING):
        v = tl.load(rows + bt.to(tl.int64) * XS + d, mask=d < D, other=0.0)
        slot = (tl.load(pos + b) + t) % RING
        tl.store(ring + (b.to(tl.int64) * RING + slot) * D + d, v, mask=d < D)


@triton.jit
def entries_append(
    entries, rows, pos, n_valid, B, G, C, XS, RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """entries f32 [B,C,D]: rows f32 [B,G,D] of stride XS that this call closes behind those that are there.

    pos and n_valid int32 [B]; grid (B G, ceil(D/BD)).
    """
    bg, d = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    b, first = bg // G, tl.load(pos + bg // G)
    j = first // RATIO + bg % G
    if j < (first + tl.load(n_valid + b)) // RATIO:
        v = tl.load(rows + bg.to(tl.int64) * XS + d, mask=d < D, other=0.0)
        tl.store(entries + (b.to(tl.int64) * C + j) * D + d, v, mask=d < D)


@triton.jit
def position_bias(x, bias, pos, y, B, T, XS, PERIOD: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """y f32 [B,T,N] = x + bias[(pos[b] + t) mod PERIOD] of bias f32 [PERIOD,N]; grid (B T, ceil(N/BN))."""
    bt, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    at = (tl.load(pos + bt // T) + bt % T) % PERIOD
    v = tl.load(x + bt.to(tl.int64) * XS + n, mask=n < N, other=0.0)
    v += tl.load(bias + at * N + n, mask=n < N, other=0.0)
    tl.store(y + bt.to(tl.int64) * N + n, v, mask=n < N)
