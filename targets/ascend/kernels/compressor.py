"""Softmax-gated pooling of a group of tokens into one entry, with and without overlap (section 4.2).

Knows Triton and nothing of dsv4c: it is compiled and interpreted in an environment of its own.
A group starts at a multiple of RATIO and the ring is one or two groups long, so a group is one piece of
memory in the ring and one in this call's rows, whatever the position.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(new, ring, b, first, start, T, RING: tl.constexpr, CHANNELS: tl.constexpr, channel, live, r):
    """Rows first..first+RATIO of [.., CHANNELS] as FP32: before `start` from the ring, 0 where not live."""
    p = first + r
    old = p < start
    x = tl.load(
        ring + (b * RING + first % RING + r[:, None]) * CHANNELS + channel[None, :],
        mask=old[:, None] & live[None, :], other=0.0,
    )  # fmt: skip
    y = tl.load(
        new + (b * T + p[:, None] - start) * CHANNELS + channel[None, :],
        mask=(p >= start)[:, None] & live[None, :], other=0.0,
    )  # fmt: skip
    return x.to(tl.float32) + y.to(tl.float32)


@triton.jit
def compress(
    kv, gate, kv_ring, gate_ring, pos, n_valid, out,
    T, G,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [B,G,WIDTH]: entry i of this call's closed groups, zeros beyond; grid (B * G, ceil(WIDTH/BC)).

    kv and gate [B,T,C], their rings [B,R,C]; C = WIDTH and R = RATIO, or both twice with OVERLAP, where the
    group takes the second half of the channels and the group before it the first. pos, n_valid int32 [B].
    All sums are FP32; the entry is rounded once, to the dtype of out. Rows that no closed group holds are
    never read.
    """
    b, i = tl.program_id(0) // G, tl.program_id(0) % G
    start, count = tl.load(pos + b), tl.load(n_valid + b)
    j = start // RATIO + i
    closed = j < (start + count) // RATIO
    c, r = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, RATIO)
    inside = c < WIDTH
    live = inside & closed
    RING: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    C: tl.constexpr = 2 * WIDTH if OVERLAP else WIDTH
    HALF: tl.constexpr = WIDTH if OVERLAP else 0
    first = j * RATIO
    g = _rows(gate, gate_ring, b, first, start, T, RING, C, HALF + c, live, r)
    v = _rows(kv, kv_ring, b, first, start, T, RING, C, HALF + c, live, r)
    top = tl.max(g, 0)
    if OVERLAP:
        # The first group has nothing before it: its gates are -inf there, and their weights exactly zero.
        before = live & (j > 0)
        earlier = tl.maximum(first - RATIO, 0)
        g0 = _rows(gate, gate_ring, b, earlier, start, T, RING, C, c, before, r)
        v0 = _rows(kv, kv_ring, b, earlier, start, T, RING, C, c, before, r)
        g0 = tl.where(before[None, :], g0, float("-inf"))
        top = tl.maximum(top, tl.max(g0, 0))
    e = tl.exp(g - top[None, :])
    above, below = tl.sum(e * v, 0), tl.sum(e, 0)
    if OVERLAP:
        e0 = tl.exp(g0 - top[None, :])
        above += tl.sum(e0 * v0, 0)
        below += tl.sum(e0, 0)
    value = tl.where(live, above / below, 0.0)
    at = tl.program_id(0) * WIDTH + c
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
