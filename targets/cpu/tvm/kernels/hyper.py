"""Hyper-connection kernels (section 4 of the specification)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, exp, ramp, sigmoid, splat, zeros


def projection_width(rows: int) -> int:
    """Padded rows of the mixing projection."""
    return -(-rows // LANES) * LANES


def hc_mix(n: int, d: int, eps: float, norm_eps: float, iters: int):
    """X [B,S,n,d], fn packed [1,n*d,width] -> pre [B,S,n], post [B,S,n], comb [B,S,n,n]."""
    rows, k = n * (2 + n), n * d
    width = projection_width(rows)
    vecs = width // LANES

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, bs: T.handle, sc: T.handle, a: T.handle, o: T.handle, c: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        W = T.match_buffer(w, (1, k, width), "float32")
        Base = T.match_buffer(bs, (rows,), "float32")
        Scale = T.match_buffer(sc, (3,), "float32")
        Pre = T.match_buffer(a, (B, S, n), "float32")
        Post = T.match_buffer(o, (B, S, n), "float32")
        Comb = T.match_buffer(c, (B, S, n, n), "float32")
        Xf = T.decl_buffer((B * S * k,), "float32", data=X.data)
        Wf = T.decl_buffer((k * width,), "float32", data=W.data)
        Pref = T.decl_buffer((B * S * n,), "float32", data=Pre.data)
        Postf = T.decl_buffer((B * S * n,), "float32", data=Post.data)
        Combf = T.decl_buffer((B * S * n * n,), "float32", data=Comb.data)
        for m in T.parallel(B * S):
            acc = T.alloc_buffer((width,), "float32")
            part = T.alloc_buffer((LANES,), "float32")
            rho = T.alloc_buffer((1,), "float32")
            mat = T.alloc_buffer((n * n,), "float32")
            for v in T.unroll(vecs):
                acc[ramp(v * LANES)] = zeros()
            for kk in T.serial(k):
                for v in T.unroll(vecs):
                    acc[ramp(v * LANES)] = acc[ramp(v * LANES)] + Wf[ramp(kk * width + v * LANES)] * splat(
                        Xf[m * k + kk]
                    )
            part[ramp(0)] = zeros()
            for j in T.serial(k // LANES):
                part[ramp(0)] = part[ramp(0)] + Xf[ramp(m * k + j * LANES)] * Xf[ramp(m * k + j * LANES)]
            rho[0] = T.float32(0)
            for j in T.serial(k % LANES):
                rho[0] = rho[0] + Xf[m * k + k // LANES * LANES + j] * Xf[m * k + k // LANES * LANES + j]
            for j in T.serial(LANES):
                rho[0] = rho[0] + part[j]
            rho[0] = T.float32(1) / T.sqrt(rho[0] / T.float32(k) + T.float32(norm_eps))
            for i in T.serial(n):
                Pref[m * n + i] = sigmoid(acc[i] * rho[0] * Scale[0] + Base[i]) + T.float32(eps)
                Postf[m * n + i] = T.float32(2) * sigmoid(acc[n + i] * rho[0] * Scale[1] + Base[n + i])
            for i in T.serial(n):
                top = T.alloc_buffer((1,), "float32")
                total = T.alloc_buffer((1,), "float32")
                top[0] = T.min_value("float32")
                for j in T.serial(n):
                    mat[i * n + j] = acc[2 * n + i * n + j] * rho[0] * Scale[2] + Base[2 * n + i * n + j]
                    top[0] = T.max(top[0], mat[i * n + j])
                total[0] = T.float32(0)
                for j in T.serial(n):
                    mat[i * n + j] = exp(mat[i * n + j] - top[0])
                    total[0] = total[0] + mat[i * n + j]
                for j in T.serial(n):
                    mat[i * n + j] = mat[i * n + j] / total[0] + T.float32(eps)
            for half in T.serial(2 * iters - 1):
                # even halves divide columns, odd halves rows; the last is a column half
                for i in T.serial(n):
                    line = T.alloc_buffer((1,), "float32")
                    line[0] = T.float32(0)
                    for j in T.serial(n):
                        line[0] = line[0] + mat[T.if_then_else(half % 2 == 0, j * n + i, i * n + j)]
                    line[0] = T.float32(1) / (line[0] + T.float32(eps))
                    for j in T.serial(n):
                        mat[T.if_then_else(half % 2 == 0, j * n + i, i * n + j)] = (
                            mat[T.if_then_else(half % 2 == 0, j * n + i, i * n + j)] * line[0]
                        )
            for i in T.serial(n * n):
                Combf[m * n * n + i] = mat[i]

    return func


def hc_head_mix(n: int, d: int, eps: float, norm_eps: float):
    """X [B,S,n,d], fn packed [1,n*d,width] -> [B,S,n]."""
    k, width = n * d, projection_width(n)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, bs: T.handle, sc: T.handle, a: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        W = T.match_buffer(w, (1, k, width), "float32")
        Base = T.match_buffer(bs, (n,), "float32")
        Scale = T.match_buffer(sc, (1,), "float32")
        A = T.match_buffer(a, (B, S, n), "float32")
        Xf = T.decl_buffer((B * S * k,), "float32", data=X.data)
        Wf = T.decl_buffer((k * width,), "float32", data=W.data)
        Af = T.decl_buffer((B * S * n,), "float32", data=A.data)
        for m in T.parallel(B * S):
            acc = T.alloc_buffer((width,), "float32")
            rho = T.alloc_buffer((1,), "float32")
            for v in T.serial(width // LANES):
                acc[ramp(v * LANES)] = zeros()
            rho[0] = T.float32(0)
            for kk in T.serial(k):
                rho[0] = rho[0] + Xf[m * k + kk] * Xf[m * k + kk]
                for v in T.serial(width // LANES):
                    acc[ramp(v * LANES)] = acc[ramp(v * LANES)] + Wf[ramp(kk * width + v * LANES)] * splat(
                        Xf[m * k + kk]
                    )
            rho[0] = T.float32(1) / T.sqrt(rho[0] / T.float32(k) + T.float32(norm_eps))
            for i in T.serial(n):
                Af[m * n + i] = sigmoid(acc[i] * rho[0] * Scale[0] + Base[i]) + T.float32(eps)

    return func


def hc_collapse(n: int, d: int):
    """X [B,S,n,d], pre [B,S,n] -> [B,S,d]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, a: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        A = T.match_buffer(a, (B, S, n), "float32")
        Y = T.match_buffer(y, (B, S, d), "float32")
        for m in T.parallel(B * S):
            for j in T.serial(d):
                Y[m // S, m % S, j] = X[m // S, m % S, 0, j] * A[m // S, m % S, 0]
            for i in T.serial(n - 1):
                for j in T.serial(d):
                    Y[m // S, m % S, j] = (
                        Y[m // S, m % S, j] + X[m // S, m % S, i + 1, j] * A[m // S, m % S, i + 1]
                    )

    return func


def hc_expand(n: int, d: int):
    """X [B,S,n,d], y [B,S,d], post [B,S,n], comb [B,S,n,n] -> [B,S,n,d]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, f: T.handle, o: T.handle, c: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        F = T.match_buffer(f, (B, S, d), "float32")
        Post = T.match_buffer(o, (B, S, n), "float32")
        Comb = T.match_buffer(c, (B, S, n, n), "float32")
        Y = T.match_buffer(y, (B, S, n, d), "float32")
        for m in T.parallel(B * S):
            for k in T.serial(n):
                for j in T.serial(d):
                    Y[m // S, m % S, k, j] = F[m // S, m % S, j] * Post[m // S, m % S, k]
                for i in T.serial(n):
                    for j in T.serial(d):
                        Y[m // S, m % S, k, j] = (
                            Y[m // S, m % S, k, j] + X[m // S, m % S, i, j] * Comb[m // S, m % S, i, k]
                        )

    return func
