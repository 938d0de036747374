"""Index selection: scores of visible entries, the k best of them, and the best blocks (4.3; V4.1 4.5)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, ramp, splat, zeros

KEYS = 8
"""Keys scored at a time."""
PARTS = 16
"""Pieces that the keys of a single token are cut into, for several threads."""
WORTH_A_THREAD = 1 << 20
"""Numbers of keys from which a single token's scores are spread over threads."""


def _ordered(bits):
    """Bits of a float32 as uint32 that compare like the float."""
    flip = T.if_then_else(bits >= T.uint32(0x80000000), T.uint32(0xFFFFFFFF), T.uint32(0x80000000))
    return T.bitwise_xor(bits, flip)


def _transpose(heads: int, d: int):
    """An inline `transpose(b, t, Q, qt)`: q [H,d] of a token in groups of LANES heads, channel by channel."""
    groups = -(-heads // LANES)

    @T.inline
    def transpose(b, t, Q, qt):
        for g in T.serial(groups):
            for c in T.serial(d):
                for j in T.serial(LANES):
                    qt[(g * d + c) * LANES + j] = T.if_then_else(
                        g * LANES + j < heads, Q[b, t, T.min(g * LANES + j, heads - 1), c], T.float32(0)
                    )

    return transpose


def _measure(heads: int, d: int, at):
    """An inline `measure(b, t, low, n, qt, W, K, spots, score)`: the ordered scores low .. n-1.

    `at(spots, i)` is the key behind the i-th score.
    """
    groups = -(-heads // LANES)

    @T.inline
    def measure(b, t, low, n, qt, W, K, spots, score):
        acc = T.alloc_buffer((KEYS * LANES,), "float32")
        total = T.alloc_buffer((KEYS,), "float32")
        for blk in T.serial((n - low + (KEYS - 1)) // KEYS):
            for i in T.unroll(KEYS):
                total[i] = T.float32(0)
            for g in T.serial(groups):
                for i in T.unroll(KEYS):
                    acc[ramp(i * LANES)] = zeros()
                for c in T.serial(d):
                    for i in T.unroll(KEYS):
                        acc[ramp(i * LANES)] = acc[ramp(i * LANES)] + qt[ramp((g * d + c) * LANES)] * splat(
                            K[b, at(spots, T.min(low + blk * KEYS + i, n - 1)), c]
                        )
                for i in T.unroll(KEYS):
                    for j in T.serial(T.min(LANES, heads - g * LANES)):
                        total[i] = total[i] + T.max(acc[i * LANES + j], T.float32(0)) * W[b, t, g * LANES + j]
            for i in T.serial(T.min(KEYS, n - low - blk * KEYS)):
                # a sum that starts at 0.0 is never -0.0, so both zeros tie
                score[low + blk * KEYS + i] = _ordered(T.reinterpret("uint32", total[i]))

    return measure


def _spread(heads: int, d: int, at):
    """As `_measure` with low = 0, many scores in pieces on several threads; for a token alone in its call."""
    measure = _measure(heads, d, at)

    @T.inline
    def spread(b, t, low, n, qt, W, K, spots, score):
        if T.cast(n, "int64") * (heads * d) >= WORTH_A_THREAD:
            for part in T.parallel(PARTS):
                measure(
                    b, t, T.min(part * ((n + (PARTS - 1)) // PARTS), n),
                    T.min((part + 1) * ((n + (PARTS - 1)) // PARTS), n), qt, W, K, spots, score,
                )  # fmt: skip
        else:
            measure(b, t, low, n, qt, W, K, spots, score)

    return spread


def _radix(k: int, at):
    """An inline `radix(b, t, n, score, spots, Y)`: at(spots, i) of the k highest of n ordered scores, n > k,
    in the order of i. The k-th best is found digit by digit; ties at it go to the lower i.
    """

    @T.inline
    def radix(b, t, n, score, spots, Y):
        count = T.alloc_buffer((256,), "int32")
        state = T.alloc_buffer((3,), "int32")  # still needed, bucket, written
        prefix = T.alloc_buffer((1,), "uint32")
        state[0] = k
        prefix[0] = T.uint32(0)
        for step in T.serial(4):
            for i in T.serial(256):
                count[i] = 0
            for i in T.serial(n):
                # higher digits must match; (x >> 8) >> (24 - 8 step) never shifts by 32
                if step == 0 or T.shift_right(
                    T.shift_right(score[i], T.uint32(8)), T.cast(24 - 8 * step, "uint32")
                ) == T.shift_right(T.shift_right(prefix[0], T.uint32(8)), T.cast(24 - 8 * step, "uint32")):
                    digit = T.meta_var(
                        T.cast(
                            T.bitwise_and(
                                T.shift_right(score[i], T.cast(24 - 8 * step, "uint32")), T.uint32(255)
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
                prefix[0], T.shift_left(T.cast(state[1], "uint32"), T.cast(24 - 8 * step, "uint32"))
            )
        state[2] = 0
        for i in T.serial(n):
            if score[i] > prefix[0]:
                Y[b, t, state[2]] = at(spots, i)
                state[2] = state[2] + 1
            else:
                if score[i] == prefix[0] and state[0] > 0:
                    Y[b, t, state[2]] = at(spots, i)
                    state[2] = state[2] + 1
                    state[0] = state[0] - 1

    return radix


def _itself(spots, i):
    return i


def _listed(spots, i):
    return spots[i]


def index_select(heads: int, d: int, ratio: int, k: int):
    """q [B,S,H,d], weights [B,S,H], keys [B,cap,d], pos, n_valid -> ids [B,S,k] i32, ascending, then -1.

    With k or fewer visible entries all are taken and nothing is scored.
    """
    groups = -(-heads // LANES)
    transpose, radix = _transpose(heads, d), _radix(k, _itself)
    measure, spread = _measure(heads, d, _itself), _spread(heads, d, _itself)

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

        @T.inline
        def one(m, measure):
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
                    transpose(b, t, Q, qt)
                    measure(b, t, 0, n[0], qt, W, K, score, score)
                    radix(b, t, n[0], score, score, Y)

        if B * S == 1:
            one(T.int64(0), spread)
        else:
            for m in T.parallel(B * S):
                one(m, measure)

    return func


def index_select_in_blocks(heads: int, d: int, ratio: int, k: int, size: int, count: int):
    """As `index_select`, among the entries of blocks [B,S,count] i32 of `size`: ids ascending, then -1."""
    groups, room = -(-heads // LANES), size * count
    transpose, radix = _transpose(heads, d), _radix(k, _listed)
    measure, spread = _measure(heads, d, _listed), _spread(heads, d, _listed)

    @T.prim_func(s_tir=True)
    def func(
        q: T.handle, w: T.handle, ks: T.handle, p: T.handle, v: T.handle, bl: T.handle, y: T.handle
    ):  # fmt: skip
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        Q = T.match_buffer(q, (B, S, heads, d), "float32")
        W = T.match_buffer(w, (B, S, heads), "float32")
        K = T.match_buffer(ks, (B, C, d), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        Blocks = T.match_buffer(bl, (B, S, count), "int32")
        Y = T.match_buffer(y, (B, S, k), "int32")

        @T.inline
        def one(m, measure):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            n = T.alloc_buffer((2,), "int32")  # visible, listed
            for j in T.serial(k):
                Y[b, t, j] = -1
            if T.cast(t, "int32") < V[b]:
                spots = T.alloc_buffer((room,), "int32")
                n[0] = (P[b] + T.cast(t, "int32") + 1) // ratio
                n[1] = 0
                for j in T.serial(count):
                    if Blocks[b, t, j] >= 0:
                        for i in T.serial(T.max(T.min(size, n[0] - Blocks[b, t, j] * size), 0)):
                            spots[n[1]] = Blocks[b, t, j] * size + i
                            n[1] = n[1] + 1
                if n[1] <= k:
                    for j in T.serial(n[1]):
                        Y[b, t, j] = spots[j]
                else:
                    qt = T.alloc_buffer((groups * d * LANES,), "float32")
                    score = T.alloc_buffer((room,), "uint32")
                    transpose(b, t, Q, qt)
                    measure(b, t, 0, n[1], qt, W, K, spots, score)
                    radix(b, t, n[1], score, spots, Y)

        if B * S == 1:
            one(T.int64(0), spread)
        else:
            for m in T.parallel(B * S):
                one(m, measure)

    return func


def index_candidates(heads: int, d: int, ratio: int, k: int, size: int, count: int):
    """As `index_select`, and of the same scores the best blocks [B,S,count] i32, ascending, then -1.

    The newest visible entry's block is always among them.
    """
    groups = -(-heads // LANES)
    transpose, radix = _transpose(heads, d), _radix(k, _itself)
    measure, spread = _measure(heads, d, _itself), _spread(heads, d, _itself)
    radix_blocks = _radix(count, _itself)

    @T.prim_func(s_tir=True)
    def func(
        q: T.handle, w: T.handle, ks: T.handle, p: T.handle, v: T.handle, y: T.handle, bl: T.handle
    ):  # fmt: skip
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
        Blocks = T.match_buffer(bl, (B, S, count), "int32")

        @T.inline
        def one(m, measure):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            n = T.alloc_buffer((2,), "int32")  # entries, blocks
            for j in T.serial(k):
                Y[b, t, j] = -1
            for j in T.serial(count):
                Blocks[b, t, j] = -1
            if T.cast(t, "int32") < V[b]:
                n[0] = (P[b] + T.cast(t, "int32") + 1) // ratio
                n[1] = (n[0] + (size - 1)) // size
                if n[0] <= k:
                    for j in T.serial(n[0]):
                        Y[b, t, j] = j
                if n[1] <= count:
                    for j in T.serial(n[1]):
                        Blocks[b, t, j] = j
                if n[0] > k or n[1] > count:
                    qt = T.alloc_buffer((groups * d * LANES,), "float32")
                    score = T.alloc_buffer((C,), "uint32")
                    best = T.alloc_buffer(((C + (size - 1)) // size,), "uint32")
                    transpose(b, t, Q, qt)
                    measure(b, t, 0, n[0], qt, W, K, score, score)
                    if n[0] > k:
                        radix(b, t, n[0], score, score, Y)
                    if n[1] > count:
                        for j in T.serial(n[1]):
                            best[j] = T.uint32(0)
                            for i in T.serial(T.min(size, n[0] - j * size)):
                                best[j] = T.max(best[j], score[j * size + i])
                        best[n[1] - 1] = T.uint32(0xFFFFFFFF)
                        radix_blocks(b, t, n[1], best, best, Blocks)

        if B * S == 1:
            one(T.int64(0), spread)
        else:
            for m in T.parallel(B * S):
                one(m, measure)

    return func
