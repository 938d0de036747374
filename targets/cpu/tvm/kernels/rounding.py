"""Kernels of the reference's numerics: rounding to BF16, codes of 8 and 4 bits; Hadamard, norm, experts.

Written to be right and not to be fast: `numerics=reference` is for comparing with the published code. BF16
values are held as float32. Rounding is by bits or by the machine's round-to-nearest-even. Scales are powers
of two, so dividing by them is exact, or E4M3 numbers; code times scale is a BF16 number under both.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .rows import BLOCK, CodedRow, block_of, store_codes
from .vec import (
    LANES,
    by_vectors,
    lanes_from,
    load_weight,
    of_lanes,
    ramp,
    shape,
    sigmoid,
    splat,
    splat_u32,
    weight_dtype,
    zeros,
)

LIMITS = {
    "e4m3": (448.0, 0x3B124925, 1e-4, 3, -6), "e2m1": (6.0, 0x3E2AAAAB, 6 * 2.0**-126, 1, 0),
    "e2m1_e4m3": (6.0, 0, 6 * 2.0**-9, 1, 0),
}  # fmt: skip
"""By rule: largest code, bits of its FP32 reciprocal, least amax, mantissa bits, least exponent."""


def bf16(x):
    """A float32 to the nearest BF16, ties to even; NaN stays NaN. One or any number of lanes."""
    lanes = x.ty.dtype.lanes
    u = T.reinterpret(of_lanes("uint32", lanes), x)
    odd = u >> splat_u32(16, lanes) & splat_u32(1, lanes)
    up = u + splat_u32(0x7FFF, lanes) + odd & splat_u32(0xFFFF0000, lanes)
    return T.Select(x != x, x, T.reinterpret(of_lanes("float32", lanes), up))


def bf16_bits(x):
    """The bits of the nearest BF16 number as uint16, ties to even; NaN stays NaN."""
    lanes = x.ty.dtype.lanes
    bits = T.reinterpret(of_lanes("uint32", lanes), bf16(x)) >> splat_u32(16, lanes)
    return T.cast(bits, of_lanes("uint16", lanes))


def power_of_two(y):
    """2^ceil(log2 y) of a positive normal float32."""
    u = T.reinterpret("uint32", y)
    rest = T.bitwise_and(u, T.uint32(0x7FFFFF))
    up = T.if_then_else(rest != T.uint32(0), T.uint32(0x800000), T.uint32(0))
    return T.reinterpret("float32", T.bitwise_and(u, T.uint32(0x7F800000)) + up)


def nearest(v, mantissa: int, least: int):
    """v to `mantissa` bits after the leading one, exponents from `least` up; ties to even."""
    exponent = T.bitwise_and(T.reinterpret("uint32", v), T.uint32(0x7F800000))
    bits = T.max(exponent, T.uint32((127 + least) << 23)) - T.uint32(mantissa << 23)
    step = T.reinterpret("float32", bits)
    return T.nearbyint(v / step) * step


def block_scale(amax, rule: str):
    """The scale of a block by its largest magnitude."""
    if rule == "int8":
        return amax / T.float32(127)
    _, reciprocal, least, _, _ = LIMITS[rule]
    if rule == "e2m1_e4m3":
        return nearest(T.min(T.max(amax, T.float32(least)) / T.float32(6), T.float32(448)), 3, -6)
    return power_of_two(T.max(amax, T.float32(least)) * T.reinterpret("float32", T.uint32(reciprocal)))


def code_value(x, scale, rule: str):
    """x as the nearest code of its block times the scale, ties to even."""
    if rule == "int8":
        return T.nearbyint(x / T.if_then_else(scale == T.float32(0), T.float32(1), scale)) * scale
    limit, _, _, mantissa, least = LIMITS[rule]
    v = T.max(T.min(x / scale, T.float32(limit)), T.float32(-limit))
    return nearest(v, mantissa, least) * scale


def round_bf16(heads: int | None, d: int, channels: int):
    """X [B,S,(heads,)d] with the first `channels` of each row rounded to BF16."""
    inner = heads or 1

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, shape(B, S, heads, d), "float32")
        Y = T.match_buffer(y, shape(B, S, heads, d), "float32")
        Xf = T.decl_buffer((B * S * inner * d,), "float32", data=X.data)
        Yf = T.decl_buffer((B * S * inner * d,), "float32", data=Y.data)
        for m in T.parallel(B * S * inner):
            for j in T.serial(channels):
                Yf[m * d + j] = bf16(Xf[m * d + j])
            for j in T.serial(d - channels):
                Yf[m * d + channels + j] = Xf[m * d + channels + j]

    return func


def store_pieces(buffer, at, apart, x, pieces: int) -> None:
    """Write x as the bits of BF16 numbers, each the nearest to what is left, `apart` from one another.

    x is one number or a vector, and `at` the place of the first.

    Three of them give a float32 whole, but for numbers below 2^-110, whose last ones vanish.
    """
    for i in range(pieces):
        T.buffer_store(buffer, bf16_bits(x), [lanes_from(at + i * apart, x.ty.dtype.lanes)])
        x = x - bf16(x)


def bf16_rows(heads: int | None, d: int, pieces: int, length: int):
    """X [B,S,(heads,)d] f32 -> [pieces,B,S,length], see `store_pieces`, for products of pairs.

    A row of X fills the first numbers of a row; the others are never read.
    """
    each = (heads or 1) * d

    def put(i, lanes, Xf, Yf, m, rows):
        store_pieces(Yf, m * length + i, rows * length, Xf[lanes_from(m * each + i, lanes)], pieces)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, shape(B, S, heads, d), "float32")
        Y = T.match_buffer(y, (pieces, B, S, length), "uint16")
        Xf = T.decl_buffer((B * S * each,), "float32", data=X.data)
        Yf = T.decl_buffer((pieces * B * S * length,), "uint16", data=Y.data)
        if B * S == 1:  # waking a second thread would cost more
            by_vectors(each, put, Xf, Yf, T.int64(0), B * S)
        else:
            for m in T.parallel(B * S):
                by_vectors(each, put, Xf, Yf, m, B * S)

    return func


def coded_rows(heads: int | None, d: int, groups: int, row: CodedRow):
    """X [B,S,(heads,)d] f32, seen as `groups` rows of row.k, -> uint32 [1,B,S,groups * row.words]."""
    inner, k = heads or 1, row.k

    def put(Xf, Yf, i):
        """Row i of all groups' rows."""

        def one(first, columns):
            low, high = block_of(Xf, i * k + first, columns)
            store_codes(Yf, i * row.words, first, T.bind(low), T.bind(high), row)

        if k >= BLOCK:
            with T.serial(0, k // BLOCK) as b:
                one(b * BLOCK, BLOCK)
        if k % BLOCK:
            one(k // BLOCK * BLOCK, k % BLOCK)

    shape = (inner, d) if heads else (d,)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, *shape), "float32")
        Y = T.match_buffer(y, (1, B, S, groups * row.words), "uint32")
        Xf = T.decl_buffer((B * S * inner * d,), "float32", data=X.data)
        Yf = T.decl_buffer((B * S * groups * row.words,), "uint32", data=Y.data)
        if B * S == 1:  # waking a second thread would cost more
            for i in T.serial(groups):
                put(Xf, Yf, i)
        else:
            for m in T.parallel(B * S * groups):
                put(Xf, Yf, m)

    return func


def round_blocks(heads: int | None, d: int, rule: str, block: int, channels: int):
    """X [B,S,(heads,)d] with blocks of the first `channels` of each row through codes of `rule` and back."""
    inner = heads or 1

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, shape(B, S, heads, d), "float32")
        Y = T.match_buffer(y, shape(B, S, heads, d), "float32")
        Xf = T.decl_buffer((B * S * inner * d,), "float32", data=X.data)
        Yf = T.decl_buffer((B * S * inner * d,), "float32", data=Y.data)
        for m in T.parallel(B * S * inner):
            scale = T.alloc_buffer((1,), "float32", scope="local")
            for g in T.serial((channels + block - 1) // block):
                scale[0] = T.float32(0)
                for j in T.serial(T.min(block, channels - g * block)):
                    scale[0] = T.max(scale[0], T.abs(Xf[m * d + g * block + j]))
                scale[0] = block_scale(scale[0], rule)
                for j in T.serial(T.min(block, channels - g * block)):
                    Yf[m * d + g * block + j] = code_value(Xf[m * d + g * block + j], scale[0], rule)
            for j in T.serial(d - channels):
                Yf[m * d + channels + j] = Xf[m * d + channels + j]

    return func


def hadamard(heads: int | None, d: int):
    """X [B,S,(heads,)d] -> H X d^-1/2 with Sylvester's H, in log2(d) passes of sums and differences."""
    inner, steps = heads or 1, d.bit_length() - 1

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, shape(B, S, heads, d), "float32")
        Y = T.match_buffer(y, shape(B, S, heads, d), "float32")
        Xf = T.decl_buffer((B * S * inner * d,), "float32", data=X.data)
        Yf = T.decl_buffer((B * S * inner * d,), "float32", data=Y.data)
        for m in T.parallel(B * S * inner):
            a = T.alloc_buffer((d,), "float32")
            both = T.alloc_buffer((2,), "float32", scope="local")
            for j in T.serial(d):
                a[j] = Xf[m * d + j]
            for s in T.serial(steps):
                for j in T.serial(d):
                    if T.bitwise_and(T.shift_right(j, s), 1) == 0:
                        both[0] = a[j]
                        both[1] = a[j + T.shift_left(1, s)]
                        a[j] = both[0] + both[1]
                        a[j + T.shift_left(1, s)] = both[0] - both[1]
            for j in T.serial(d):
                Yf[m * d + j] = a[j] * T.float32(d**-0.5)

    return func


def norm_in_steps(heads: int | None, d: int, eps: float):
    """X [B,S,(heads,)d] -> X (mean(X^2) + eps)^-1/2 with every step rounded to BF16; the sum is FP32."""
    inner = heads or 1

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, shape(B, S, heads, d), "float32")
        Y = T.match_buffer(y, shape(B, S, heads, d), "float32")
        Xf = T.decl_buffer((B * S * inner * d,), "float32", data=X.data)
        Yf = T.decl_buffer((B * S * inner * d,), "float32", data=Y.data)
        for m in T.parallel(B * S * inner):
            total = T.alloc_buffer((1,), "float32", scope="local")
            total[0] = T.float32(0)
            for j in T.serial(d):
                total[0] = total[0] + bf16(Xf[m * d + j] * Xf[m * d + j])
            total[0] = bf16(total[0] / T.float32(d))
            total[0] = bf16(total[0] + T.float32(eps))
            total[0] = bf16(T.float32(1) / T.sqrt(total[0]))
            for j in T.serial(d):
                Yf[m * d + j] = bf16(Xf[m * d + j] * total[0])

    return func


def expert_product(experts: int, k: int, n: int, topk: int, bf16_weights: bool, gather: bool):
    """X [P,Q,k], order [R], starts [experts+1], W [experts,panels,k,16] -> [1,R,n], rounded to BF16.

    Row i of the result belongs to the i-th route in the order of experts; it reads the token of that route
    (`gather`) or row i.
    """
    panels, dtype = -(-n // LANES), weight_dtype(bf16_weights)

    def row(order, i):
        return T.cast(order[i] // topk if gather else i, "int64")

    @T.prim_func(s_tir=True)
    def func(x: T.handle, o: T.handle, s: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        P = T.int64()
        Q = T.int64()
        R = T.int64()
        X = T.match_buffer(x, (P, Q, k), "float32")
        Order = T.match_buffer(o, (R,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        W = T.match_buffer(w, (experts, panels, k, LANES), dtype)
        Y = T.match_buffer(y, (1, R, n), "float32")
        Xf = T.decl_buffer((P * Q * k,), "float32", data=X.data)
        Wf = T.decl_buffer((experts * panels * k * LANES,), dtype, data=W.data)
        for ep in T.parallel(experts * panels):
            for i in T.serial(Starts[ep // panels + 1] - Starts[ep // panels]):
                acc = T.alloc_buffer((LANES,), "float32", scope="local")
                done = T.alloc_buffer((LANES,), "float32")
                at = T.meta_var(Starts[ep // panels] + i)
                acc[ramp(0)] = zeros()
                for kk in T.serial(k):
                    acc[ramp(0)] = acc[ramp(0)] + load_weight(
                        Wf, (T.cast(ep, "int64") * k + kk) * LANES, bf16_weights
                    ) * splat(Xf[row(Order, at) * k + kk])
                done[ramp(0)] = acc[ramp(0)]
                for j in T.serial(T.min(LANES, n - ep % panels * LANES)):
                    Y[0, at, ep % panels * LANES + j] = bf16(done[j])

    return func


def expert_gated(experts: int, inner: int, topk: int, limit: float):
    """Both [1,R,2*inner], weights [B,S,topk], order [R], starts -> [1,R,inner]: SwiGLU x weight, BF16."""

    def gated(gate, up, weight):
        g = T.min(gate, T.float32(limit))
        up = T.max(T.min(up, T.float32(limit)), T.float32(-limit))
        return bf16(T.bind(g * sigmoid(g) * up * weight))  # bound, because it is looked at more than once

    @T.prim_func(s_tir=True)
    def func(h: T.handle, g: T.handle, o: T.handle, s: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        H = T.match_buffer(h, (1, B * S * topk, 2 * inner), "float32")
        G = T.match_buffer(g, (B, S, topk), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        Y = T.match_buffer(y, (1, B * S * topk, inner), "float32")
        Gf = T.decl_buffer((B * S * topk,), "float32", data=G.data)
        for i in T.serial(Starts[experts]):
            for j in T.serial(inner):
                Y[0, i, j] = gated(H[0, i, j], H[0, i, inner + j], Gf[Order[i]])

    return func


def expert_sum(experts: int, d: int, topk: int):
    """Rows [1,R,d] in the order of experts, order [R], starts -> [B,S,d]: each token's sum, ascending."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, o: T.handle, s: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (1, B * S * topk, d), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        Y = T.match_buffer(y, (B, S, d), "float32")
        Yf = T.decl_buffer((B * S * d,), "float32", data=Y.data)
        for i in T.serial(B * S * d):
            Yf[i] = T.float32(0)
        for i in T.serial(Starts[experts]):
            for j in T.serial(d):
                at = T.meta_var(T.cast(Order[i] // topk, "int64") * d + j)
                Yf[at] = Yf[at] + X[0, i, j]

    return func
