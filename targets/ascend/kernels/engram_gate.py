"""The gate of Engram: how much of the value each stream takes (Engram specification, section 6).

Knows Triton and nothing of dsv4c: it is compiled and interpreted in an environment of its own.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def engram_gate(
    x, kv, q_weight, k_weight, ids, out,
    eps, floor,
    N: tl.constexpr, D: tl.constexpr, COPYSIGN: tl.constexpr, RESIDUAL: tl.constexpr, DEAD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out [R,N,D] = gamma_j value, plus X_j with RESIDUAL; grid (R, N).

    x [R,N,D], kv [R,(N+1) D] (the keys and the value), q_weight and k_weight [N,D]; with DEAD ids int32 [R],
    and gamma is 0 where the id is negative. Sums over D are FP32 in steps of BN columns; out is rounded once.
    """
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mine, key, value = x + (row * N + j) * D, kv + (row * (N + 1) + j) * D, kv + (row * (N + 1) + N) * D
    dot = tl.zeros((BN,), tl.float32)
    own = tl.zeros((BN,), tl.float32)
    other = tl.zeros((BN,), tl.float32)
    for d0 in range(0, D, BN):
        d = d0 + tl.arange(0, BN)
        inside = d < D
        a = tl.load(mine + d, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(key + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(q_weight + j * D + d, mask=inside, other=0.0).to(tl.float32)
        w *= tl.load(k_weight + j * D + d, mask=inside, other=0.0).to(tl.float32)
        dot += a * w * b
        own += a * a
        other += b * b
    spread = tl.sqrt(tl.sum(own, 0) / D + eps) * tl.sqrt(tl.sum(other, 0) / D + eps)
    delta = tl.sum(dot, 0) / tl.sqrt(D * 1.0) / spread
    root = tl.sqrt(tl.maximum(tl.abs(delta), floor))
    if COPYSIGN:
        signed = tl.where(delta < 0, -root, root)
    else:
        signed = tl.where(delta < 0, -root, tl.where(delta > 0, root, 0.0))
    gamma = 1.0 / (1.0 + tl.exp(-signed))
    if DEAD:
        gamma = tl.where(tl.load(ids + row) < 0, 0.0, gamma)
    for d0 in range(0, D, BN):
        d = d0 + tl.arange(0, BN)
        inside = d < D
        result = gamma * tl.load(value + d, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            result += tl.load(mine + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + (row * N + j) * D + d, result.to(out.dtype.element_ty), mask=inside)
