"""Compressor kernels: position bias and the gated pooling of closed groups (section 4.2)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import exp


def position_bias(ratio: int, width: int):
    """x [B,S,width] + bias [ratio,width] at row (pos + t) mod ratio."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, a: T.handle, p: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, width), "float32")
        A = T.match_buffer(a, (ratio, width), "float32")
        P = T.match_buffer(p, (B,), "int32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        for b, t, j in T.grid(B, S, width):
            Y[b, t, j] = X[b, t, j] + A[(P[b] + T.cast(t, "int32")) % ratio, j]

    return func


def compress(ratio: int, width: int, overlap: bool):
    """kv, gate [B,S,C], their rings [B,c*ratio,C], pos, n_valid -> entries [B,ceil(S/ratio),width].

    C = 2 width with overlap (previous group by its first half, current by its second), else width.
    """
    halves = 2 if overlap else 1
    channels, rows = halves * width, halves * ratio

    @T.prim_func(s_tir=True)
    def func(kv: T.handle, g: T.handle, kr: T.handle, gr: T.handle, p: T.handle, v: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        KV = T.match_buffer(kv, (B, S, channels), "float32")
        G = T.match_buffer(g, (B, S, channels), "float32")
        KR = T.match_buffer(kr, (B, rows, channels), "float32")
        GR = T.match_buffer(gr, (B, rows, channels), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        Y = T.match_buffer(y, (B, (S + (ratio - 1)) // ratio, width), "float32")
        for be in T.parallel(B * ((S + (ratio - 1)) // ratio)):
            b = T.meta_var(be // ((S + (ratio - 1)) // ratio))
            i = T.meta_var(be % ((S + (ratio - 1)) // ratio))
            top = T.alloc_buffer((width,), "float32")
            total = T.alloc_buffer((width,), "float32")
            first = T.alloc_buffer((2,), "int32", scope="local")
            for c in T.serial(width):
                Y[b, i, c] = T.float32(0)
            # first token of the pooled rows; before the sequence's start there is no previous group
            first[0] = (P[b] // ratio + T.cast(i, "int32") + 1 - halves) * ratio
            if P[b] // ratio + T.cast(i, "int32") < (P[b] + V[b]) // ratio:
                for c in T.serial(width):
                    top[c] = T.min_value("float32")
                    total[c] = T.float32(0)
                for r in T.serial(rows):
                    first[1] = first[0] + r
                    if first[1] >= 0:
                        if first[1] >= P[b]:
                            for c in T.serial(width):
                                top[c] = T.max(top[c], G[b, first[1] - P[b], r // ratio * width + c])
                        else:
                            for c in T.serial(width):
                                top[c] = T.max(top[c], GR[b, first[1] % rows, r // ratio * width + c])
                for r in T.serial(rows):
                    first[1] = first[0] + r
                    if first[1] >= 0:
                        if first[1] >= P[b]:
                            for c in T.serial(width):
                                w1 = T.alloc_buffer((1,), "float32", scope="local")
                                w1[0] = exp(G[b, first[1] - P[b], r // ratio * width + c] - top[c])
                                total[c] = total[c] + w1[0]
                                Y[b, i, c] = (
                                    Y[b, i, c] + w1[0] * KV[b, first[1] - P[b], r // ratio * width + c]
                                )
                        else:
                            for c in T.serial(width):
                                w2 = T.alloc_buffer((1,), "float32", scope="local")
                                w2[0] = exp(GR[b, first[1] % rows, r // ratio * width + c] - top[c])
                                total[c] = total[c] + w2[0]
                                Y[b, i, c] = (
                                    Y[b, i, c] + w2[0] * KR[b, first[1] % rows, r // ratio * width + c]
                                )
                for c in T.serial(width):
                    Y[b, i, c] = Y[b, i, c] / total[c]

    return func
