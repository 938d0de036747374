"""Experts over rows sorted by expert: w13 with SwiGLU, w2, and the sum per token (section 4.4).

Knows Triton and nothing of dsv4c: it is compiled and interpreted in an environment of its own.
A block of rows belongs to one expert; `blocks` int32 [G,3] holds (expert, first row, rows), and a block
with no rows writes nothing. Rows are contiguous, so every tile moves in one piece between GM and L1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_up(
    x, w13, weights, blocks, hidden,
    limit,
    D: tl.constexpr, INNER: tl.constexpr, ROUND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden = silu(min(x w1, limit)) * clip(x w3, -limit, limit) * weight, one tile [BM,BN] a program.

    x [R,D] and w13 [E,2 INNER,D] in one dtype, weights f32 [R], hidden [R,INNER]; grid (G, ceil(INNER/BN)).
    Both products are summed in FP32 over steps of BK columns; with ROUND they are rounded to the dtype of
    x before SwiGLU. The hidden value is rounded once, to the dtype it is stored in.
    """
    block, column = tl.program_id(0), tl.program_id(1)
    expert = tl.load(blocks + block * 3)
    first = tl.load(blocks + block * 3 + 1)
    count = tl.load(blocks + block * 3 + 2)
    m, n = tl.arange(0, BM), column * BN + tl.arange(0, BN)
    rows, live, inside = first + m, m < count, n < INNER
    base = w13 + expert.to(tl.int64) * (2 * INNER * D)
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        width = k < D
        a = tl.load(x + rows[:, None] * D + k[None, :], mask=live[:, None] & width[None, :], other=0.0)
        w1 = tl.load(base + n[:, None] * D + k[None, :], mask=inside[:, None] & width[None, :], other=0.0)
        gate = tl.dot(a, tl.trans(w1), gate, input_precision="ieee")
        w3 = tl.load(
            base + INNER * D + n[:, None] * D + k[None, :], mask=inside[:, None] & width[None, :], other=0.0
        )
        up = tl.dot(a, tl.trans(w3), up, input_precision="ieee")
    if ROUND:
        gate = gate.to(x.dtype.element_ty).to(tl.float32)
        up = up.to(x.dtype.element_ty).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.maximum(tl.minimum(up, limit), -limit)
    weight = tl.load(weights + rows, mask=live, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]
    tl.store(
        hidden + rows[:, None] * INNER + n[None, :],
        value.to(hidden.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


@triton.jit
def expert_down(
    hidden, w2, blocks, y,
    D: tl.constexpr, INNER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = hidden w2, one tile [BM,BN] a program.

    hidden [R,INNER] and w2 [E,D,INNER] in one dtype, y [R,D]; grid (G, ceil(D/BN)). Summed in FP32 over
    steps of BK columns and rounded once, to the dtype of y.
    """
    block, column = tl.program_id(0), tl.program_id(1)
    expert = tl.load(blocks + block * 3)
    first = tl.load(blocks + block * 3 + 1)
    count = tl.load(blocks + block * 3 + 2)
    m, n = tl.arange(0, BM), column * BN + tl.arange(0, BN)
    rows, live, inside = first + m, m < count, n < D
    base = w2 + expert.to(tl.int64) * (INNER * D)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, INNER, BK):
        k = k0 + tl.arange(0, BK)
        width = k < INNER
        a = tl.load(
            hidden + rows[:, None] * INNER + k[None, :], mask=live[:, None] & width[None, :], other=0.0
        )
        w = tl.load(base + n[:, None] * INNER + k[None, :], mask=inside[:, None] & width[None, :], other=0.0)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    tl.store(
        y + rows[:, None] * D + n[None, :],
        total.to(y.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


@triton.jit
def expert_sum(y, slots, out, D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """out[t] = sum of the rows y[slots[t, i]], i ascending; a negative slot adds nothing.

    y [R,D], slots int32 [T,K] in ascending expert, out [T,D]; grid (T, ceil(D/BN)). The sum is FP32 in
    that one order and rounded once, to the dtype of out.
    """
    token = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < D
    total = tl.zeros((BN,), tl.float32)
    for i in range(K):
        slot = tl.load(slots + token * K + i)
        row = tl.load(y + slot * D + n, mask=inside & (slot >= 0), other=0.0)
        total += row.to(tl.float32)
    tl.store(out + token * D + n, total.to(out.dtype.element_ty), mask=inside)
