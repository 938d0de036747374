"""Kernels of the small fused ops: columns taken apart, norm with rotation, closing entries, one more route.

A single row is done on the calling thread: waking a second one costs more than half of the work.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, exp, ramp, shape, zeros


def columns(total: int, first: int, width: int):
    """X [B,S,total] -> its columns first to first + width - 1, [B,S,width]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, total), "float32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        if B * S == 1:  # a single token is not worth waking a second thread
            for j in T.serial(width):
                Y[0, 0, j] = X[0, 0, first + j]
        else:
            for m in T.parallel(B * S):
                for j in T.serial(width):
                    Y[m // S, m % S, j] = X[m // S, m % S, first + j]

    return func


def _row(d: int, half: int, eps: float, weighted: bool):
    """An inline `row(X, x, W, C, S, c, Y, y)`: d channels from X[x], normalised, times W, the last 2*half
    rotated by C, S from c, into Y[y]. The sum of squares runs over 16 interleaved partial sums, as in `norm`.
    """
    start = d - 2 * half

    def scaled(x, rho, w, j):
        return x * rho * w[j] if weighted else x * rho

    @T.inline
    def row(X, x, W, C, S, c, Y, y):
        part = T.alloc_buffer((LANES,), "float32")
        rho = T.alloc_buffer((1,), "float32")
        pair = T.alloc_buffer((2,), "float32")
        part[ramp(0)] = zeros()
        for j in T.serial(d // LANES):
            part[ramp(0)] = part[ramp(0)] + X[ramp(x + j * LANES)] * X[ramp(x + j * LANES)]
        rho[0] = T.float32(0)
        for j in T.serial(d % LANES):
            rho[0] = rho[0] + X[x + d // LANES * LANES + j] * X[x + d // LANES * LANES + j]
        for j in T.unroll(LANES):
            rho[0] = rho[0] + part[j]
        rho[0] = T.float32(1) / T.sqrt(rho[0] / T.float32(d) + T.float32(eps))
        for j in T.serial(start):
            Y[y + j] = scaled(X[x + j], rho[0], W, j)
        for j in T.serial(half):
            pair[0] = scaled(X[x + start + 2 * j], rho[0], W, start + 2 * j)
            pair[1] = scaled(X[x + start + 2 * j + 1], rho[0], W, start + 2 * j + 1)
            Y[y + start + 2 * j] = pair[0] * C[c + j] - pair[1] * S[c + j]
            Y[y + start + 2 * j + 1] = pair[0] * S[c + j] + pair[1] * C[c + j]

    return row


def norm_rotary(heads: int | None, d: int, half: int, eps: float, weighted: bool):
    """X [B,N,(heads,)d], cos, sin [B,N,half], w [d] -> normalised rows, the last 2*half channels rotated."""
    inner = heads or 1
    row = _row(d, half, eps, weighted)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, c: T.handle, s: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        N = T.int64()
        X = T.match_buffer(x, shape(B, N, heads, d), "float32")
        C = T.match_buffer(c, (B, N, half), "float32")
        Sn = T.match_buffer(s, (B, N, half), "float32")
        W = T.match_buffer(w, (d,), "float32")
        Y = T.match_buffer(y, shape(B, N, heads, d), "float32")
        Xf = T.decl_buffer((B * N * inner * d,), "float32", data=X.data)
        Cf = T.decl_buffer((B * N * half,), "float32", data=C.data)
        Sf = T.decl_buffer((B * N * half,), "float32", data=Sn.data)
        Yf = T.decl_buffer((B * N * inner * d,), "float32", data=Y.data)
        if B * N == 1:
            for h in T.serial(inner):
                row(Xf, h * d, W, Cf, Sf, 0, Yf, h * d)
        else:
            for m in T.parallel(B * N):
                for h in T.serial(inner):
                    row(Xf, (m * inner + h) * d, W, Cf, Sf, m * half, Yf, (m * inner + h) * d)

    return func


def entries_close(ratio: int, width: int, overlap: bool, half: int, eps: float):
    """Entries [B,cap,width] get, from slot pos // ratio, the groups that this call closes: pooled from kv and
    gate [B,S,C] and their rings [B,c*ratio,C], normalised, times w [width], rotated by cos, sin [B,E,half].

    C = 2 width with overlap (previous group by its first half, current by its second), else width. Nothing
    is computed for groups that stay open.
    """
    halves = 2 if overlap else 1
    channels, rows = halves * width, halves * ratio
    row = _row(width, half, eps, True)

    @T.prim_func(s_tir=True)
    def func(
        e: T.handle, kv: T.handle, g: T.handle, kr: T.handle, gr: T.handle, w: T.handle, c: T.handle,
        s: T.handle, p: T.handle, v: T.handle,
    ):  # fmt: skip
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Cap = T.int64()
        E = T.match_buffer(e, (B, Cap, width), "float32")
        KV = T.match_buffer(kv, (B, S, channels), "float32")
        G = T.match_buffer(g, (B, S, channels), "float32")
        KR = T.match_buffer(kr, (B, rows, channels), "float32")
        GR = T.match_buffer(gr, (B, rows, channels), "float32")
        W = T.match_buffer(w, (width,), "float32")
        C = T.match_buffer(c, (B, (S + (ratio - 1)) // ratio, half), "float32")
        Sn = T.match_buffer(s, (B, (S + (ratio - 1)) // ratio, half), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        Ef = T.decl_buffer((B * Cap * width,), "float32", data=E.data)
        Cf = T.decl_buffer((B * ((S + (ratio - 1)) // ratio) * half,), "float32", data=C.data)
        Sf = T.decl_buffer((B * ((S + (ratio - 1)) // ratio) * half,), "float32", data=Sn.data)

        @T.inline
        def pool(b, first, pooled):
            """The closed group whose rows begin at token `first`; before the sequence's start are none."""
            top = T.alloc_buffer((width,), "float32")
            total = T.alloc_buffer((width,), "float32")
            weight = T.alloc_buffer((1,), "float32")
            for ch in T.serial(width):
                pooled[ch] = T.float32(0)
                top[ch] = T.min_value("float32")
                total[ch] = T.float32(0)
            for r in T.serial(rows):
                if first + r >= P[b]:
                    for ch in T.serial(width):
                        top[ch] = T.max(top[ch], G[b, first + r - P[b], r // ratio * width + ch])
                else:
                    if first + r >= 0:
                        for ch in T.serial(width):
                            top[ch] = T.max(top[ch], GR[b, (first + r) % rows, r // ratio * width + ch])
            for r in T.serial(rows):
                if first + r >= P[b]:
                    for ch in T.serial(width):
                        weight[0] = exp(G[b, first + r - P[b], r // ratio * width + ch] - top[ch])
                        total[ch] = total[ch] + weight[0]
                        pooled[ch] = pooled[ch] + weight[0] * KV[b, first + r - P[b], r // ratio * width + ch]
                else:
                    if first + r >= 0:
                        for ch in T.serial(width):
                            weight[0] = exp(GR[b, (first + r) % rows, r // ratio * width + ch] - top[ch])
                            total[ch] = total[ch] + weight[0]
                            pooled[ch] = (
                                pooled[ch] + weight[0] * KR[b, (first + r) % rows, r // ratio * width + ch]
                            )
            for ch in T.serial(width):
                pooled[ch] = pooled[ch] / total[ch]

        @T.inline
        def close(b, i):
            pooled = T.alloc_buffer((width,), "float32")
            slot: T.let[T.int64] = T.cast(P[b] // ratio + T.cast(i, "int32"), "int64")
            if slot < T.cast((P[b] + V[b]) // ratio, "int64"):
                pool(b, (T.cast(slot, "int32") + 1 - halves) * ratio, pooled)
                row(
                    pooled, 0, W, Cf, Sf, (b * ((S + (ratio - 1)) // ratio) + i) * half,
                    Ef, (b * Cap + slot) * width,
                )  # fmt: skip

        if B * ((S + (ratio - 1)) // ratio) == 1:
            close(T.int64(0), T.int64(0))
        else:
            for be in T.parallel(B * ((S + (ratio - 1)) // ratio)):
                close(be // ((S + (ratio - 1)) // ratio), be % ((S + (ratio - 1)) // ratio))

    return func


def add_route(topk: int, expert: int):
    """ids, weights [B,S,topk] -> the same with one more route: to `expert`, with weight 1."""

    @T.prim_func(s_tir=True)
    def func(i: T.handle, w: T.handle, j: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Ids = T.match_buffer(i, (B, S, topk), "int32")
        W = T.match_buffer(w, (B, S, topk), "float32")
        More = T.match_buffer(j, (B, S, topk + 1), "int32")
        Y = T.match_buffer(y, (B, S, topk + 1), "float32")
        for b, t in T.grid(B, S):
            for c in T.serial(topk):
                More[b, t, c] = Ids[b, t, c]
                Y[b, t, c] = W[b, t, c]
            More[b, t, topk] = expert
            Y[b, t, topk] = T.float32(1)

    return func
