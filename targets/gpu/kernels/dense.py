"""Linear maps and the embedding, over weights as they are stored (section 3.4).

Knows Triton and nothing of dsv4c. One kernel serves every storage: `decode` turns codes into BF16 numbers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .decode import E2M1, NO_SCALE, code_value, finish, nibble_value, scale_value, step


@triton.jit
def linear(
    x, w, scale, tensor_scale, y,
    M, XS, N, K, SCOLS, SROWS, BAND,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TENSOR: tl.constexpr,
    GROUPS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y f32 [M,GROUPS N] = x w^T by groups: group g maps columns g K.. of x by rows g N.. of w.

    x f32 rows of stride XS, w [GROUPS N,K] as FORM says, scale [SROWS,SCOLS]; grid (ceil(N/BN), ceil(M/BM),
    GROUPS). Summed in FP32 over steps of BK columns, in one order.
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    group = tl.program_id(2)
    live, inside = m < M, n < N
    rows = group * N + n
    base = x + m.to(tl.int64)[:, None] * XS + group * K
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(base + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        acc = step(
            a,
            w,
            scale,
            rows,
            inside,
            k0,
            K,
            SCOLS,
            acc,
            FORM,
            SCALE,
            HIGH,
            WIDE,
            PIECES,
            PRECISION,
            BM,
            BN,
            BK,
        )
    acc = finish(acc, scale, tensor_scale, rows, inside, SCOLS, BAND, SCALE, HIGH, WIDE, TENSOR)
    out = y + m.to(tl.int64)[:, None] * (GROUPS * N) + rows[None, :]
    tl.store(out, acc, mask=live[:, None] & inside[None, :])


@triton.jit
def embed(
    tokens, w, scale, tensor_scale, y,
    M, V, N, SCOLS, SROWS, BAND,
    FORM: tl.constexpr, SCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TENSOR: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """y f32 [M,N] = row tokens[m] of w [V,N], decoded; grid (M, ceil(N/BN)). tokens int32 [M]."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < N
    row = tl.load(tokens + m).to(tl.int64)
    if FORM >= E2M1:
        both = tl.load(w + row * (N // 2) + n // 2, mask=inside, other=0).to(tl.int32)
        value = nibble_value((both >> (n % 2 * 4)) & 15, FORM)
    else:
        value = code_value(tl.load(w + row * N + n, mask=inside, other=0), FORM)
    if SCALE != NO_SCALE:
        line = (row // HIGH if HIGH > 0 else row * 0) * SCOLS
        column = n // WIDE if WIDE > 0 else n * 0
        value = value * scale_value(tl.load(scale + line + column, mask=inside, other=0), SCALE)
    if TENSOR:
        value = value * tl.load(tensor_scale + row // BAND)
    tl.store(y + m.to(tl.int64) * N + n, value, mask=inside)
