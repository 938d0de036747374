"""Plain kernels for ops that passes usually fuse away, so that pipelines without those passes compile."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from math import isinf

from tvm.script import tirx as T

from .rounding import bf16
from .vec import sigmoid


def clamp(width: int, low: float, high: float):
    """min(max(x, low), high) over [B,S,width]."""

    def bounded(x):
        x = x if isinf(low) else T.max(x, T.float32(low))
        return x if isinf(high) else T.min(x, T.float32(high))

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, width), "float32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        for b, t, j in T.grid(B, S, width):
            Y[b, t, j] = bounded(X[b, t, j])

    return func


def swiglu(width: int):
    """gate sigmoid(gate) up over [B,S,width]."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, z: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, width), "float32")
        Z = T.match_buffer(z, (B, S, width), "float32")
        Y = T.match_buffer(y, (B, S, width), "float32")
        for b, t, j in T.grid(B, S, width):
            Y[b, t, j] = X[b, t, j] * sigmoid(X[b, t, j]) * Z[b, t, j]

    return func


def index_scores(heads: int, d: int, ratio: int, rounded: bool = False):
    """q [B,S,H,d], weights [B,S,H], keys [B,cap,d], pos, n_valid -> [B,S,cap]; -inf where not visible.

    `rounded` takes dot products, weighted products and their sum to BF16.
    """

    def narrow(x):
        return bf16(x) if rounded else x

    @T.prim_func(s_tir=True)
    def func(q: T.handle, w: T.handle, k: T.handle, p: T.handle, v: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        Q = T.match_buffer(q, (B, S, heads, d), "float32")
        W = T.match_buffer(w, (B, S, heads), "float32")
        K = T.match_buffer(k, (B, C, d), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        Y = T.match_buffer(y, (B, S, C), "float32")
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            for c in T.serial(C):
                Y[b, t, c] = T.float32(float("-inf"))
            if T.cast(t, "int32") < V[b]:
                for c in T.serial(T.cast((P[b] + T.cast(t, "int32") + 1) // ratio, "int64")):
                    dot = T.alloc_buffer((2,), "float32")
                    dot[1] = T.float32(0)
                    for h in T.serial(heads):
                        dot[0] = T.float32(0)
                        for j in T.serial(d):
                            dot[0] = dot[0] + Q[b, t, h, j] * K[b, c, j]
                        dot[1] = dot[1] + narrow(T.max(narrow(dot[0]), T.float32(0)) * W[b, t, h])
                    Y[b, t, c] = narrow(dot[1])

    return func


def index_topk(k: int, ascending: bool = False):
    """scores [B,S,cap] -> ids [B,S,k] i32 of the highest finite ones, best first or `ascending`, then -1.

    Ties go to the lower id. By insertion into the k best so far.
    """

    @T.prim_func(s_tir=True)
    def func(x: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        X = T.match_buffer(x, (B, S, C), "float32")
        Y = T.match_buffer(y, (B, S, k), "int32")
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            best = T.alloc_buffer((k + 1,), "float32")
            ids = T.alloc_buffer((k + 1,), "int32")
            at = T.alloc_buffer((3,), "int32")
            at[0] = 0  # how many are kept
            for c in T.serial(C):
                if X[b, t, c] >= T.min_value("float32"):
                    at[1] = at[0]
                    while T.if_then_else(at[1] > 0, best[T.max(at[1] - 1, 0)] < X[b, t, c], False):
                        best[at[1]] = best[at[1] - 1]
                        ids[at[1]] = ids[at[1] - 1]
                        at[1] = at[1] - 1
                    best[at[1]] = X[b, t, c]
                    ids[at[1]] = T.cast(c, "int32")
                    at[0] = T.min(at[0] + 1, T.int32(k))
            for i in T.serial(k):
                Y[b, t, i] = T.if_then_else(i < at[0], ids[i], -1)
            if ascending:
                for i in T.serial(at[0]):
                    at[2] = 0  # how many ids are lower
                    for j in T.serial(at[0]):
                        if ids[j] < ids[i]:
                            at[2] = at[2] + 1
                    Y[b, t, at[2]] = ids[i]

    return func


def candidate_blocks(ratio: int, size: int, count: int):
    """scores [B,S,cap], pos, n_valid -> ids [B,S,count] i32 of the best blocks, ascending, then -1.

    A block is kept when fewer than `count` others are better, or as good with a lower id; the newest always,
    and none whose scores are all -inf.
    """

    @T.prim_func(s_tir=True)
    def func(x: T.handle, p: T.handle, v: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        X = T.match_buffer(x, (B, S, C), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        Y = T.match_buffer(y, (B, S, count), "int32")
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            best = T.alloc_buffer(((C + (size - 1)) // size + 1,), "float32")
            n = T.alloc_buffer((4,), "int32")  # entries, blocks, better ones, written
            for j in T.serial(count):
                Y[b, t, j] = -1
            if T.cast(t, "int32") < V[b]:
                n[0] = (P[b] + T.cast(t, "int32") + 1) // ratio
                n[1] = (n[0] + (size - 1)) // size
                n[3] = 0
                for j in T.serial(n[1]):
                    best[j] = X[b, t, j * size]
                    for i in T.serial(T.min(size, n[0] - j * size)):
                        best[j] = T.max(best[j], X[b, t, j * size + i])
                if n[1] > 0:
                    best[n[1] - 1] = T.float32(float("inf"))
                for j in T.serial(n[1]):
                    n[2] = 0
                    for i in T.serial(n[1]):
                        if best[i] > best[j] or (best[i] == best[j] and i < j):
                            n[2] = n[2] + 1
                    if n[2] < count and best[j] >= T.min_value("float32"):
                        Y[b, t, n[3]] = j
                        n[3] = n[3] + 1

    return func


def index_restrict(size: int, count: int):
    """scores [B,S,cap], blocks [B,S,count] i32 -> scores, -inf outside the blocks."""

    @T.prim_func(s_tir=True)
    def func(x: T.handle, bl: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        X = T.match_buffer(x, (B, S, C), "float32")
        Blocks = T.match_buffer(bl, (B, S, count), "int32")
        Y = T.match_buffer(y, (B, S, C), "float32")
        for b, t in T.grid(B, S):
            for c in T.serial(C):
                Y[b, t, c] = T.float32(float("-inf"))
            for j in T.serial(count):
                if Blocks[b, t, j] >= 0:
                    for i in T.serial(size):
                        if Blocks[b, t, j] * size + i < T.cast(C, "int32"):
                            Y[b, t, Blocks[b, t, j] * size + i] = X[b, t, Blocks[b, t, j] * size + i]

    return func
