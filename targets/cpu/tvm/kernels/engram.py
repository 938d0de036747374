"""Engram kernels: compressed ids, n-gram row ids, table rows, the gate, and the short convolution.

Integers are exact in int64: a compressed id times its multiplier stays below 2^63 by construction.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, load_scalar, ramp, sigmoid, weight_dtype, zeros


def compress_tokens(vocab: int, dead: bool, dead_token: int):
    """tokens [B,S], map [vocab] -> [B,S] i32; negative tokens become -1 when `dead`, else they pass."""

    def negative(token):
        return T.int32(-1) if dead else token

    @T.prim_func(s_tir=True)
    def func(i: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Ids = T.match_buffer(i, (B, S), "int32")
        W = T.match_buffer(w, (vocab,), "int32")
        Y = T.match_buffer(y, (B, S), "int32")
        for b, t in T.grid(B, S):
            if Ids[b, t] < 0:
                Y[b, t] = negative(Ids[b, t])
            else:
                Y[b, t] = -1
                if Ids[b, t] < vocab and Ids[b, t] != dead_token:
                    Y[b, t] = W[Ids[b, t]]

    return func


def ngram_rows(orders: int, heads: int, slots: int, pad: int, dead: bool):
    """ids [B,S], history [B,slots], pos, n_valid, multipliers, primes, offsets i64 -> [B,S,columns] i32.

    Column (n-2) heads + a is head a of order n; the hash of order n goes on from that of order n-1.
    """
    columns = orders * heads

    def blocks(value):
        return value < 0 if dead else T.bool(False)

    @T.prim_func(s_tir=True)
    def func(
        i: T.handle, h: T.handle, p: T.handle, v: T.handle, mu: T.handle, pr: T.handle, of: T.handle,
        y: T.handle,
    ):  # fmt: skip
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Ids = T.match_buffer(i, (B, S), "int32")
        H = T.match_buffer(h, (B, slots), "int32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        M = T.match_buffer(mu, (orders + 1,), "int64")
        Prime = T.match_buffer(pr, (columns,), "int64")
        Offset = T.match_buffer(of, (columns,), "int64")
        Y = T.match_buffer(y, (B, S, columns), "int32")
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(T.cast(m % S, "int32"))
            look = T.alloc_buffer((1,), "int32", scope="local")
            blocked = T.alloc_buffer((1,), "int32", scope="local")
            mix = T.alloc_buffer((1,), "int64", scope="local")
            if t < V[b]:
                blocked[0] = 0
                mix[0] = T.int64(0)
                for n in T.serial(orders + 1):
                    look[0] = pad
                    if P[b] + t - n >= 0:
                        if t - n >= 0:
                            look[0] = Ids[b, t - n]
                        else:
                            look[0] = H[b, (P[b] + t - n) % slots]
                    if blocks(look[0]):
                        blocked[0] = 1
                    if blocked[0] != 0:
                        look[0] = pad
                    mix[0] = T.bitwise_xor(mix[0], T.cast(look[0], "int64") * M[n])
                    if n > 0:
                        for a in T.serial(heads):
                            Y[b, t, (n - 1) * heads + a] = T.cast(
                                T.floormod(mix[0], Prime[(n - 1) * heads + a]) + Offset[(n - 1) * heads + a],
                                "int32",
                            )
            else:
                for c in T.serial(columns):
                    Y[b, t, c] = -1

    return func


def ngram_history(slots: int):
    """Compressed id t of ids [B,S] into slot (pos + t) mod slots of history [B,slots]; later ones win."""

    @T.prim_func(s_tir=True)
    def func(h: T.handle, i: T.handle, p: T.handle, v: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        H = T.match_buffer(h, (B, slots), "int32")
        Ids = T.match_buffer(i, (B, S), "int32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        for b in T.serial(B):
            for n in T.serial(T.min(V[b], slots)):
                H[b, (P[b] + V[b] - 1 - n) % slots] = Ids[b, V[b] - 1 - n]

    return func


def engram_rows_plain(entries: int, width: int, columns: int, bf16: bool):
    """rows [B,S,columns], table [entries,width] of F32 or BF16 -> [B,S,columns*width]; zeros for row -1."""
    dtype = weight_dtype(bf16)

    @T.prim_func(s_tir=True)
    def func(r: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        R = T.match_buffer(r, (B, S, columns), "int32")
        W = T.match_buffer(w, (entries, width), dtype)
        Y = T.match_buffer(y, (B, S, columns * width), "float32")
        Wf = T.decl_buffer((entries * width,), dtype, data=W.data)
        for m in T.parallel(B * S):
            for c in T.serial(columns):
                if R[m // S, m % S, c] >= 0:
                    for j in T.serial(width):
                        Y[m // S, m % S, c * width + j] = load_scalar(
                            Wf, T.cast(R[m // S, m % S, c], "int64") * width + j, bf16
                        )
                else:
                    for j in T.serial(width):
                        Y[m // S, m % S, c * width + j] = T.float32(0)

    return func


def engram_rows_scaled(entries: int, width: int, groups: int, columns: int):
    """rows [B,S,columns], codes [entries,width] and scales [entries,groups] u8, the value of every code and
    of every scale [256] -> [B,S,columns*width]; zeros for row -1. Only the rows asked for are read.
    """
    group = width // groups

    @T.prim_func(s_tir=True)
    def func(r: T.handle, w: T.handle, s: T.handle, cv: T.handle, sv: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        R = T.match_buffer(r, (B, S, columns), "int32")
        W = T.match_buffer(w, (entries, width), "uint8")
        Sc = T.match_buffer(s, (entries, groups), "uint8")
        CodeValue = T.match_buffer(cv, (256,), "float32")
        ScaleValue = T.match_buffer(sv, (256,), "float32")
        Y = T.match_buffer(y, (B, S, columns * width), "float32")
        Wf = T.decl_buffer((entries * width,), "uint8", data=W.data)
        Sf = T.decl_buffer((entries * groups,), "uint8", data=Sc.data)
        for m in T.parallel(B * S):
            scale = T.alloc_buffer((1,), "float32", scope="local")
            for c in T.serial(columns):
                if R[m // S, m % S, c] >= 0:
                    for g in T.serial(groups):
                        scale[0] = ScaleValue[
                            T.cast(Sf[T.cast(R[m // S, m % S, c], "int64") * groups + g], "int32")
                        ]
                        for j in T.serial(group):
                            Y[m // S, m % S, c * width + g * group + j] = (
                                CodeValue[
                                    T.cast(
                                        Wf[T.cast(R[m // S, m % S, c], "int64") * width + g * group + j],
                                        "int32",
                                    )
                                ]
                                * scale[0]
                            )
                else:
                    for j in T.serial(width):
                        Y[m // S, m % S, c * width + j] = T.float32(0)

    return func


def unmarked(width: int):
    """x [B,S,width] -> [B,S] i32 zeros: the ids of a gate that no id closes."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        T.match_buffer(x, (B, S, width), "float32")
        Y = T.match_buffer(y, (B, S), "int32")
        for b, t in T.grid(B, S):
            Y[b, t] = 0

    return func


def engram_gate(n: int, d: int, eps: float, floor: float, copysign: bool, residual: bool):
    """X [B,S,n,d], kv [B,S,(n+1)*d], q, k weights [n,d], ids [B,S] -> [B,S,n,d].

    The three sums over a row run over 16 interleaved partial sums, then over those in order, then over the
    rest of the row. A stream whose id is negative keeps X, or is zero without `residual`.
    """
    whole = d // LANES * LANES

    def sign(delta, root):
        if copysign:
            return T.if_then_else(delta < T.float32(0), T.float32(0) - root, root)
        back = T.if_then_else(delta < T.float32(0), T.float32(0) - root, root)
        return T.if_then_else(delta == T.float32(0), T.float32(0), back)

    def onto(x, value):
        return x + value if residual else value

    @T.prim_func(s_tir=True)
    def func(x: T.handle, kv: T.handle, qw: T.handle, kw: T.handle, i: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        KV = T.match_buffer(kv, (B, S, (n + 1) * d), "float32")
        QW = T.match_buffer(qw, (n, d), "float32")
        KW = T.match_buffer(kw, (n, d), "float32")
        Ids = T.match_buffer(i, (B, S), "int32")
        Y = T.match_buffer(y, (B, S, n, d), "float32")
        Xf = T.decl_buffer((B * S * n * d,), "float32", data=X.data)
        Kf = T.decl_buffer((B * S * (n + 1) * d,), "float32", data=KV.data)
        Qf = T.decl_buffer((n * d,), "float32", data=QW.data)
        Wf = T.decl_buffer((n * d,), "float32", data=KW.data)
        Yf = T.decl_buffer((B * S * n * d,), "float32", data=Y.data)
        for ms in T.parallel(B * S * n):
            m = T.meta_var(ms // n)
            s = T.meta_var(ms % n)
            xs = T.meta_var(ms * d)
            ks = T.meta_var(m * (n + 1) * d + s * d)
            dots = T.alloc_buffer((LANES,), "float32", scope="local")
            xx = T.alloc_buffer((LANES,), "float32", scope="local")
            kk = T.alloc_buffer((LANES,), "float32", scope="local")
            total = T.alloc_buffer((3,), "float32", scope="local")
            delta = T.alloc_buffer((2,), "float32", scope="local")
            if Ids[m // S, m % S] >= 0:
                dots[ramp(0)] = zeros()
                xx[ramp(0)] = zeros()
                kk[ramp(0)] = zeros()
                for j in T.serial(whole // LANES):
                    dots[ramp(0)] = (
                        dots[ramp(0)]
                        + Xf[ramp(xs + j * LANES)]
                        * (Qf[ramp(s * d + j * LANES)] * Wf[ramp(s * d + j * LANES)])
                        * Kf[ramp(ks + j * LANES)]
                    )
                    xx[ramp(0)] = xx[ramp(0)] + Xf[ramp(xs + j * LANES)] * Xf[ramp(xs + j * LANES)]
                    kk[ramp(0)] = kk[ramp(0)] + Kf[ramp(ks + j * LANES)] * Kf[ramp(ks + j * LANES)]
                total[0] = T.float32(0)
                total[1] = T.float32(0)
                total[2] = T.float32(0)
                for j in T.serial(LANES):
                    total[0] = total[0] + dots[j]
                    total[1] = total[1] + xx[j]
                    total[2] = total[2] + kk[j]
                for j in T.serial(d - whole):
                    total[0] = (
                        total[0]
                        + Xf[xs + whole + j]
                        * (Qf[s * d + whole + j] * Wf[s * d + whole + j])
                        * Kf[ks + whole + j]
                    )
                    total[1] = total[1] + Xf[xs + whole + j] * Xf[xs + whole + j]
                    total[2] = total[2] + Kf[ks + whole + j] * Kf[ks + whole + j]
                delta[0] = (
                    total[0]
                    / T.float32(d**0.5)
                    / T.sqrt(total[1] / T.float32(d) + T.float32(eps))
                    / T.sqrt(total[2] / T.float32(d) + T.float32(eps))
                )
                delta[1] = T.sqrt(T.max(T.abs(delta[0]), T.float32(floor)))
                delta[1] = sigmoid(sign(delta[0], delta[1]))
                for j in T.serial(d):
                    Yf[xs + j] = onto(Xf[xs + j], delta[1] * Kf[m * (n + 1) * d + n * d + j])
            else:
                for j in T.serial(d):
                    Yf[xs + j] = onto(Xf[xs + j], T.float32(0))

    return func


def stream_norm(n: int, d: int, eps: float):
    """X [B,S,n,d], w [n,d] -> [B,S,n*d]: every stream's row by its own mean square and weight."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        W = T.match_buffer(w, (n, d), "float32")
        Y = T.match_buffer(y, (B, S, n * d), "float32")
        Xf = T.decl_buffer((B * S * n * d,), "float32", data=X.data)
        Yf = T.decl_buffer((B * S * n * d,), "float32", data=Y.data)
        for m in T.parallel(B * S * n):
            part = T.alloc_buffer((LANES,), "float32", scope="local")
            total = T.alloc_buffer((1,), "float32", scope="local")
            part[ramp(0)] = zeros()
            for j in T.serial(d // LANES):
                part[ramp(0)] = part[ramp(0)] + Xf[ramp(m * d + j * LANES)] * Xf[ramp(m * d + j * LANES)]
            total[0] = T.float32(0)
            for j in T.serial(LANES):
                total[0] = total[0] + part[j]
            for j in T.serial(d % LANES):
                total[0] = total[0] + Xf[m * d + d // LANES * LANES + j] * Xf[m * d + d // LANES * LANES + j]
            total[0] = T.float32(1) / T.sqrt(total[0] / T.float32(d) + T.float32(eps))
            for j in T.serial(d):
                Yf[m * d + j] = Xf[m * d + j] * total[0] * W[m % n, j]

    return func


def short_conv(channels: int, taps: int, dilation: int, slots: int):
    """rows [B,S,channels], ring [B,slots,channels], w [taps,channels], pos -> silu of the dilated taps.

    Taps are added oldest first, whether a row comes from the ring or from this call.
    """

    @T.prim_func(s_tir=True)
    def func(x: T.handle, r: T.handle, w: T.handle, p: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, channels), "float32")
        R = T.match_buffer(r, (B, slots, channels), "float32")
        W = T.match_buffer(w, (taps, channels), "float32")
        P = T.match_buffer(p, (B,), "int32")
        Y = T.match_buffer(y, (B, S, channels), "float32")
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            first = T.alloc_buffer((1,), "int32", scope="local")
            for c in T.serial(channels):
                Y[b, t, c] = T.float32(0)
            for i in T.serial(taps):
                first[0] = T.cast(t, "int32") - dilation * (taps - 1 - i)
                if first[0] >= 0:
                    for c in T.serial(channels):
                        Y[b, t, c] = Y[b, t, c] + W[i, c] * X[b, first[0], c]
                else:
                    if P[b] + first[0] >= 0:
                        for c in T.serial(channels):
                            Y[b, t, c] = Y[b, t, c] + W[i, c] * R[b, (P[b] + first[0]) % slots, c]
            for c in T.serial(channels):
                Y[b, t, c] = Y[b, t, c] * sigmoid(Y[b, t, c])

    return func
