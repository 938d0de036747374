"""The router: the best experts of a token, or those of a table, and their weights (section 4.4).

Knows Triton and nothing of dsv4c. Scores are FP32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_topk(
    scores, bias, tokens, image_bias, ids,
    M, XS, image_token,
    E: tl.constexpr, TOPK: tl.constexpr, IMAGES: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """ids int32 [M,TOPK]: experts by scores f32 [M,E] + bias f32 [E], best first, the lower of equal ones
    first.

    With IMAGES image_bias f32 [E] takes the place of bias where tokens int32 [M] are image_token. grid (M,).
    Every round takes the best that is left; a bias of -inf keeps its place at the end.
    """
    row, e = tl.program_id(0), tl.arange(0, BE)
    s = tl.load(scores + row.to(tl.int64) * XS + e, mask=e < E, other=0.0)
    chosen_bias = bias
    if IMAGES:
        chosen_bias = tl.where(tl.load(tokens + row) == image_token, image_bias, bias)
    s += tl.load(chosen_bias + e, mask=e < E, other=0.0)
    bits = s.to(tl.int32, bitcast=True)
    # An order of int32 in which nothing is below -inf but what was taken and what does not exist.
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(e < E, key, -2147483648)
    for i in range(TOPK):
        best = tl.max(key, 0)
        chosen = tl.min(tl.where(key == best, e, BE), 0)
        tl.store(ids + row * TOPK + i, chosen)
        key = tl.where(e == chosen, -2147483648, key)


@triton.jit
def route_hash(tokens, table, ids, M, V, TOPK: tl.constexpr, BE: tl.constexpr):
    """ids int32 [M,TOPK] = table[token] of tokens int32 [M] and table int32 [V,TOPK]; grid (M,)."""
    row, i = tl.program_id(0), tl.arange(0, BE)
    at = tl.load(tokens + row) * TOPK + i
    tl.store(ids + row * TOPK + i, tl.load(table + at, mask=i < TOPK, other=0), mask=i < TOPK)


@triton.jit
def route_weights(
    scores, ids, weights, M, XS, factor, eps, E: tl.constexpr, TOPK: tl.constexpr, BE: tl.constexpr
):
    """weights f32 [M,TOPK] = scores of ids int32 [M,TOPK] over their sum plus eps, times factor; grid (M,).
    """
    row, i = tl.program_id(0), tl.arange(0, BE)
    known = i < TOPK
    expert = tl.load(ids + row * TOPK + i, mask=known, other=0)
    s = tl.load(scores + row.to(tl.int64) * XS + expert, mask=known, other=0.0)
    tl.store(weights + row * TOPK + i, s / (tl.sum(s, 0) + eps) * factor, mask=known)


@triton.jit
def add_route(
    ids, weights, more_ids, more_weights, M, TOPK: tl.constexpr, EXPERT: tl.constexpr, BE: tl.constexpr
):
    """ids int32 and weights f32 [M,TOPK] with EXPERT and 1 behind them, [M,TOPK+1]; grid (M,)."""
    row, i = tl.program_id(0), tl.arange(0, BE)
    known = i < TOPK
    expert = tl.load(ids + row * TOPK + i, mask=known, other=EXPERT)
    weight = tl.load(weights + row * TOPK + i, mask=known, other=1.0)
    tl.store(more_ids + row * (TOPK + 1) + i, expert, mask=i <= TOPK)
    tl.store(more_weights + row * (TOPK + 1) + i, weight, mask=i <= TOPK)
