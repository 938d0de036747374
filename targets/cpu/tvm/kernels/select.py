"""Index selection: scores of visible entries and the k best of them (section 4.3)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, ramp, splat, zeros

KEYS = 8
"""Keys scored at a time."""


def index_select(heads: int, d: int, ratio: int, k: int):
    """q [B,S,H,d], weights [B,S,H], keys [B,cap,d], pos, n_valid -> ids [B,S,k] i32, ascending, then -1.

    With k or fewer visible entries all are taken and nothing is scored. Otherwise the k-th best score is
    found by radix selection on the scores' ordered bits, and ties at it go to the lower ids.
    """
    groups = -(-heads // LANES)

    def ordered(bits):
        """Bits of a float32 as uint32 that compare like the float."""
        flip = T.if_then_else(bits >= T.uint32(0x80000000), T.uint32(0xFFFFFFFF), T.uint32(0x80000000))
        return T.bitwise_xor(bits, flip)

    @T.prim_func(s_tir=True)
    def func(q: T.handle, w: T.handle, ks: T.handle, p: T.handle, v: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        Q = T.match_buffer(q, (B, S, heads, d), "float32")
        W = T.match_buffer(w, (B, S, heads), "float32")
        K = T.match_buffer(ks, (B, C, d), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        Y = T.match_buffer(y, (B, S, k), "int32")
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            n = T.alloc_buffer((1,), "int32")
            for j in T.serial(k):
                Y[b, t, j] = -1
            if T.cast(t, "int32") < V[b]:
                n[0] = (P[b] + T.cast(t, "int32") + 1) // ratio
                if n[0] <= k:
                    for j in T.serial(n[0]):
                        Y[b, t, j] = j
                else:
                    qt = T.alloc_buffer((groups * d * LANES,), "float32")
                    score = T.alloc_buffer((C,), "uint32")
                    acc = T.alloc_buffer((KEYS * LANES,), "float32")
                    total = T.alloc_buffer((KEYS,), "float32")
                    count = T.alloc_buffer((256,), "int32")
                    state = T.alloc_buffer((3,), "int32")  # still needed, bucket, written
                    prefix = T.alloc_buffer((1,), "uint32")
                    for g in T.serial(groups):
                        for c in T.serial(d):
                            for j in T.serial(LANES):
                                qt[(g * d + c) * LANES + j] = T.if_then_else(
                                    g * LANES + j < heads,
                                    Q[b, t, T.min(g * LANES + j, heads - 1), c],
                                    T.float32(0),
                                )
                    for blk in T.serial((n[0] + (KEYS - 1)) // KEYS):
                        for i in T.unroll(KEYS):
                            total[i] = T.float32(0)
                        for g in T.serial(groups):
                            for i in T.unroll(KEYS):
                                acc[ramp(i * LANES)] = zeros()
                            for c in T.serial(d):
                                for i in T.unroll(KEYS):
                                    acc[ramp(i * LANES)] = acc[ramp(i * LANES)] + qt[
                                        ramp((g * d + c) * LANES)
                                    ] * splat(K[b, T.min(blk * KEYS + i, n[0] - 1), c])
                            for i in T.unroll(KEYS):
                                for j in T.serial(T.min(LANES, heads - g * LANES)):
                                    total[i] = (
                                        total[i]
                                        + T.max(acc[i * LANES + j], T.float32(0)) * W[b, t, g * LANES + j]
                                    )
                        for i in T.serial(T.min(KEYS, n[0] - blk * KEYS)):
                            # a sum that starts at 0.0 is never -0.0, so both zeros tie
                            score[blk * KEYS + i] = ordered(T.reinterpret("uint32", total[i]))
                    state[0] = k
                    prefix[0] = T.uint32(0)
                    for step in T.serial(4):
                        for i in T.serial(256):
                            count[i] = 0
                        for i in T.serial(n[0]):
                            # higher digits must match; (x >> 8) >> (24 - 8 step) never shifts by 32
                            if step == 0 or T.shift_right(
                                T.shift_right(score[i], T.uint32(8)), T.cast(24 - 8 * step, "uint32")
                            ) == T.shift_right(
                                T.shift_right(prefix[0], T.uint32(8)), T.cast(24 - 8 * step, "uint32")
                            ):
                                digit = T.meta_var(
                                    T.cast(
                                        T.bitwise_and(
                                            T.shift_right(score[i], T.cast(24 - 8 * step, "uint32")),
                                            T.uint32(255),
                                        ),
                                        "int32",
                                    )
                                )
                                count[digit] = count[digit] + 1
                        state[1] = 255
                        while count[state[1]] < state[0]:
                            state[0] = state[0] - count[state[1]]
                            state[1] = state[1] - 1
                        prefix[0] = T.bitwise_or(
                            prefix[0],
                            T.shift_left(T.cast(state[1], "uint32"), T.cast(24 - 8 * step, "uint32")),
                        )
                    state[2] = 0
                    for i in T.serial(n[0]):
                        if score[i] > prefix[0]:
                            Y[b, t, state[2]] = i
                            state[2] = state[2] + 1
                        else:
                            if score[i] == prefix[0] and state[0] > 0:
                                Y[b, t, state[2]] = i
                                state[2] = state[2] + 1
                                state[0] = state[0] - 1

    return func
