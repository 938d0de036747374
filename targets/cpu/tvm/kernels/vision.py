"""Kernels of the image encoder, and of how its rows enter the text (specification of V4.1, section 9)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, exp, ramp, splat, zeros

KEYS = 12
"""Keys met at a time: their logits are below the kilobyte up to which buffers live in registers."""


def grid_angles(quarter: int):
    """places [B,N,2] i32, frequencies [quarter] -> cos, sin [B,N,2*quarter], rows before columns."""

    @T.prim_func(s_tir=True)
    def func(p: T.handle, f: T.handle, c: T.handle, s: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        N = T.int64()
        P = T.match_buffer(p, (B, N, 2), "int32")
        F = T.match_buffer(f, (quarter,), "float32")
        C = T.match_buffer(c, (B, N, 2 * quarter), "float32")
        Sn = T.match_buffer(s, (B, N, 2 * quarter), "float32")
        for b, i, a, j in T.grid(B, N, 2, quarter):
            C[b, i, a * quarter + j] = T.cos(T.cast(P[b, i, a], "float32") * F[j])
            Sn[b, i, a * quarter + j] = T.sin(T.cast(P[b, i, a], "float32") * F[j])

    return func


def full_attention(heads: int, d: int, scale: float):
    """q, k, v [B,N,heads,d] -> softmax(scale q k^T) v [B,N,heads,d], one online softmax.

    LANES queries of a head lie side by side and meet KEYS keys at a time, so no sum runs across lanes.
    """

    @T.prim_func(s_tir=True)
    def func(q: T.handle, k: T.handle, v: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        N = T.int64()
        Q = T.match_buffer(q, (B, N, heads, d), "float32")
        K = T.match_buffer(k, (B, N, heads, d), "float32")
        V = T.match_buffer(v, (B, N, heads, d), "float32")
        Y = T.match_buffer(y, (B, N, heads, d), "float32")
        for m in T.parallel(B * heads * ((N + (LANES - 1)) // LANES)):
            b = T.meta_var(m // ((N + (LANES - 1)) // LANES) // heads)
            h = T.meta_var(m // ((N + (LANES - 1)) // LANES) % heads)
            first = T.meta_var(m % ((N + (LANES - 1)) // LANES) * LANES)
            qt = T.alloc_buffer((d * LANES,), "float32")
            out = T.alloc_buffer((d * LANES,), "float32")
            logit = T.alloc_buffer((KEYS * LANES,), "float32")
            top = T.alloc_buffer((LANES,), "float32")
            new_top = T.alloc_buffer((LANES,), "float32")
            total = T.alloc_buffer((LANES,), "float32")
            for c in T.serial(d):
                for j in T.serial(LANES):
                    qt[c * LANES + j] = Q[b, T.min(first + j, N - 1), h, c] * T.float32(scale)
                out[ramp(c * LANES)] = zeros()
            top[ramp(0)] = splat(T.min_value("float32"))
            total[ramp(0)] = zeros()
            for blk in T.serial((N + (KEYS - 1)) // KEYS):
                for i in T.unroll(KEYS):
                    logit[ramp(i * LANES)] = zeros()
                for c in T.serial(d):
                    for i in T.unroll(KEYS):
                        logit[ramp(i * LANES)] = logit[ramp(i * LANES)] + qt[ramp(c * LANES)] * splat(
                            K[b, T.min(blk * KEYS + i, N - 1), h, c]
                        )
                new_top[ramp(0)] = top[ramp(0)]
                for i in T.unroll(KEYS):
                    if blk * KEYS + i < N:
                        new_top[ramp(0)] = T.max(new_top[ramp(0)], logit[ramp(i * LANES)])
                top[ramp(0)] = exp(top[ramp(0)] - new_top[ramp(0)])
                total[ramp(0)] = total[ramp(0)] * top[ramp(0)]
                for i in T.unroll(KEYS):
                    if blk * KEYS + i < N:
                        logit[ramp(i * LANES)] = exp(logit[ramp(i * LANES)] - new_top[ramp(0)])
                    else:
                        logit[ramp(i * LANES)] = zeros()
                    total[ramp(0)] = total[ramp(0)] + logit[ramp(i * LANES)]
                for c in T.serial(d):
                    acc = T.alloc_buffer((LANES,), "float32")
                    acc[ramp(0)] = out[ramp(c * LANES)] * top[ramp(0)]
                    for i in T.unroll(KEYS):
                        acc[ramp(0)] = acc[ramp(0)] + logit[ramp(i * LANES)] * splat(
                            V[b, T.min(blk * KEYS + i, N - 1), h, c]
                        )
                    out[ramp(c * LANES)] = acc[ramp(0)]
                top[ramp(0)] = new_top[ramp(0)]
            for j in T.serial(T.min(T.int64(LANES), N - first)):
                for c in T.serial(d):
                    Y[b, first + j, h, c] = out[c * LANES + j] / total[j]

    return func


def gelu(width: int):
    """x (1 + erf(x / sqrt 2)) / 2 over [B,S,width]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, width), "float32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        for b, t, j in T.grid(B, S, width):
            Y[b, t, j] = (
                X[b, t, j] * (T.float32(1) + T.erf(X[b, t, j] * T.float32(0.5**0.5))) * T.float32(0.5)
            )

    return func


def gather_cells(d: int, k: int):
    """X [B,N,d], cells [B,M,k] i32 -> [B,M,d*k], channel by channel; row -1 is zero."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, c: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        N = T.int64()
        M = T.int64()
        X = T.match_buffer(x, (B, N, d), "float32")
        C = T.match_buffer(c, (B, M, k), "int32")
        Y = T.match_buffer(y, (B, M, d * k), "float32")
        for b, m in T.grid(B, M):
            for i in T.serial(k):
                if C[b, m, i] >= 0:
                    for j in T.serial(d):
                        Y[b, m, j * k + i] = X[b, T.cast(C[b, m, i], "int64"), j]
                else:
                    for j in T.serial(d):
                        Y[b, m, j * k + i] = T.float32(0)

    return func


def image_span(d: int):
    """rows [B,M,d], layout [B,S] i32, start, newline, end [d] -> [B,S,d]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, la: T.handle, st: T.handle, nl: T.handle, en: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        M = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, M, d), "float32")
        La = T.match_buffer(la, (B, S), "int32")
        Start = T.match_buffer(st, (d,), "float32")
        Newline = T.match_buffer(nl, (d,), "float32")
        End = T.match_buffer(en, (d,), "float32")
        Y = T.match_buffer(y, (B, S, d), "float32")
        for b, i in T.grid(B, S):
            if La[b, i] >= 0:
                for j in T.serial(d):
                    Y[b, i, j] = X[b, T.cast(La[b, i], "int64"), j]
            else:
                for j in T.serial(d):
                    Y[b, i, j] = T.if_then_else(
                        La[b, i] == -1, Start[j], T.if_then_else(La[b, i] == -2, Newline[j], End[j])
                    )

    return func


def merge_images(d: int, image_token: int):
    """x [B,S,d], tokens [B,S] i32, images [B,I,d], n_images [B] -> x with image rows at image tokens."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, k: T.handle, im: T.handle, n: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        I = T.int64()  # noqa: E741
        X = T.match_buffer(x, (B, S, d), "float32")
        Tok = T.match_buffer(k, (B, S), "int32")
        Im = T.match_buffer(im, (B, I, d), "float32")
        Count = T.match_buffer(n, (B,), "int32")
        Y = T.match_buffer(y, (B, S, d), "float32")
        for b in T.serial(B):
            used = T.alloc_buffer((1,), "int32")
            used[0] = 0
            for t in T.serial(S):
                if Tok[b, t] == image_token and used[0] < T.min(Count[b], T.cast(I, "int32")):
                    for j in T.serial(d):
                        Y[b, t, j] = Im[b, T.cast(used[0], "int64"), j]
                    used[0] = used[0] + 1
                else:
                    for j in T.serial(d):
                        Y[b, t, j] = X[b, t, j]

    return func
