"""Kernels that work on one token row at a time: norms, element-wise maps, rotary."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, exp, ramp, shape, sigmoid, zeros


def repeat_streams(n: int, d: int):
    """[B,S,d] -> [B,S,n,d]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, d), "float32")
        Y = T.match_buffer(y, (B, S, n, d), "float32")
        for b, t, i, j in T.grid(B, S, n, d):
            Y[b, t, i, j] = X[b, t, j]

    return func


def norm(heads: int | None, d: int, eps: float, weighted: bool):
    """Rows of d channels of X [B,S,(heads,)d] -> X (mean(x^2) + eps)^-1/2 w; w [d], ones when not `weighted`.

    The sum of squares runs over 16 interleaved partial sums, then over those in order.
    """
    inner = heads or 1

    def scaled(x, rho, w, j):
        return x * rho * w[j] if weighted else x * rho

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, shape(B, S, heads, d), "float32")
        W = T.match_buffer(w, (d,), "float32")
        Y = T.match_buffer(y, shape(B, S, heads, d), "float32")
        Xf = T.decl_buffer((B * S * inner * d,), "float32", data=X.data)
        Yf = T.decl_buffer((B * S * inner * d,), "float32", data=Y.data)

        @T.inline
        def row(m):
            part = T.alloc_buffer((LANES,), "float32")
            total = T.alloc_buffer((1,), "float32")
            part[ramp(0)] = zeros()
            for j in T.serial(d // LANES):
                part[ramp(0)] = part[ramp(0)] + Xf[ramp(m * d + j * LANES)] * Xf[ramp(m * d + j * LANES)]
            total[0] = T.float32(0)
            for j in T.serial(d % LANES):
                total[0] = total[0] + Xf[m * d + d // LANES * LANES + j] * Xf[m * d + d // LANES * LANES + j]
            for j in T.serial(LANES):
                total[0] = total[0] + part[j]
            total[0] = T.float32(1) / T.sqrt(total[0] / T.float32(d) + T.float32(eps))
            for j in T.serial(d):
                Yf[m * d + j] = scaled(Xf[m * d + j], total[0], W, j)

        if B * S == 1:  # a single token is not worth waking a second thread
            for m in T.serial(inner):
                row(m)
        else:
            for m in T.parallel(B * S * inner):
                row(m)

    return func


def unary(width: int, name: str, constant: float = 0.0):
    """Element-wise over [B,S,width]: `scale` by a constant, or `sqrt_softplus`."""

    def f(x):
        if name == "scale":
            return x * T.float32(constant)
        # log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), which neither overflows nor cancels
        return T.sqrt(T.max(x, T.float32(0)) + T.log1p(exp(T.float32(0) - T.abs(x))))

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, width), "float32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        if B * S == 1:  # a single token is not worth waking a second thread
            for j in T.serial(width):
                Y[0, 0, j] = f(X[0, 0, j])
        else:
            for m in T.parallel(B * S):
                for j in T.serial(width):
                    Y[m // S, m % S, j] = f(X[m // S, m % S, j])

    return func


def add_bias(width: int):
    """x [B,S,width] + bias [width]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, a: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, width), "float32")
        A = T.match_buffer(a, (width,), "float32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        for b, t, j in T.grid(B, S, width):
            Y[b, t, j] = X[b, t, j] + A[j]

    return func


def add_streams(n: int, d: int):
    """Element-wise sum over [B,S,n,d]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, z: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, n, d), "float32")
        Z = T.match_buffer(z, (B, S, n, d), "float32")
        Y = T.match_buffer(y, (B, S, n, d), "float32")
        for b, t, i, j in T.grid(B, S, n, d):
            Y[b, t, i, j] = X[b, t, i, j] + Z[b, t, i, j]

    return func


def binary(width: int, name: str, limit: float = 0.0):
    """Element-wise over [B,S,width]: `add`, or `clamped_swiglu` with its limit."""

    def f(a, b):
        if name == "add":
            return a + b
        gate = T.min(a, T.float32(limit))
        return gate * sigmoid(gate) * T.max(T.min(b, T.float32(limit)), T.float32(-limit))

    @T.prim_func(s_tir=True)
    def func(x: T.handle, z: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, width), "float32")
        Z = T.match_buffer(z, (B, S, width), "float32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        for b, t, j in T.grid(B, S, width):
            Y[b, t, j] = f(X[b, t, j], Z[b, t, j])

    return func


def gather_rows(d: int):
    """X [B,S,d], rows [B,L] i32 -> [B,L,d]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, r: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        N = T.int64()
        X = T.match_buffer(x, (B, S, d), "float32")
        R = T.match_buffer(r, (B, N), "int32")
        Y = T.match_buffer(y, (B, N, d), "float32")
        for b, t, j in T.grid(B, N, d):
            Y[b, t, j] = X[b, T.cast(R[b, t], "int64"), j]

    return func


def rope_angles(half: int):
    """positions [B,N] i32, frequencies [half] -> cos, sin [B,N,half]."""

    @T.prim_func(s_tir=True)
    def func(p: T.handle, f: T.handle, c: T.handle, s: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        N = T.int64()
        P = T.match_buffer(p, (B, N), "int32")
        F = T.match_buffer(f, (half,), "float32")
        C = T.match_buffer(c, (B, N, half), "float32")
        Sn = T.match_buffer(s, (B, N, half), "float32")
        for b, t, j in T.grid(B, N, half):
            C[b, t, j] = T.cos(T.cast(P[b, t], "float32") * F[j])
            Sn[b, t, j] = T.sin(T.cast(P[b, t], "float32") * F[j])

    return func


def rotary(heads: int | None, d: int, half: int, inverse: bool, halves: bool = False):
    """X [B,N,(heads,)d] with its last 2*half channels rotated by cos, sin [B,N,half].

    Adjacent channels are a pair; with `halves` channel i and channel i + half.
    """
    sign, start, inner = (-1.0 if inverse else 1.0), d - 2 * half, heads or 1
    step, apart = (1, half) if halves else (2, 1)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, c: T.handle, s: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        N = T.int64()
        X = T.match_buffer(x, shape(B, N, heads, d), "float32")
        C = T.match_buffer(c, (B, N, half), "float32")
        Sn = T.match_buffer(s, (B, N, half), "float32")
        Y = T.match_buffer(y, shape(B, N, heads, d), "float32")
        Xf = T.decl_buffer((B * N * inner * d,), "float32", data=X.data)
        Cf = T.decl_buffer((B * N * half,), "float32", data=C.data)
        Sf = T.decl_buffer((B * N * half,), "float32", data=Sn.data)
        Yf = T.decl_buffer((B * N * inner * d,), "float32", data=Y.data)

        @T.inline
        def pair(first, second, angle):
            Yf[first] = Xf[first] * Cf[angle] - Xf[second] * Sf[angle] * T.float32(sign)
            Yf[second] = Xf[first] * Sf[angle] * T.float32(sign) + Xf[second] * Cf[angle]

        @T.inline
        def turn(m):
            for h in T.serial(inner):
                for j in T.serial(start):
                    Yf[(m * inner + h) * d + j] = Xf[(m * inner + h) * d + j]
                for j in T.serial(half):
                    pair(
                        (m * inner + h) * d + start + step * j,
                        (m * inner + h) * d + start + step * j + apart,
                        m * half + j,
                    )

        if B * N == 1:
            turn(T.int64(0))
        else:
            for m in T.parallel(B * N):
                turn(m)

    return func
