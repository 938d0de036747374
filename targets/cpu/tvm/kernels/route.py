"""Router kernels: choose experts and weigh them (section 4.4)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T


def _take_best(experts: int, topk: int):
    """An inline `take_best(b, t, left, Ids)`: ids of the topk largest, best first, ties to the lower id."""

    @T.inline
    def take_best(b, t, left, Ids):
        best = T.alloc_buffer((1,), "int32", scope="local")
        taken = T.alloc_buffer((experts,), "int32")
        for e in T.serial(experts):
            taken[e] = 0
        for j in T.serial(topk):
            best[0] = -1
            for e in T.serial(experts):
                if taken[e] == 0:
                    if best[0] < 0:
                        best[0] = T.cast(e, "int32")
                    else:
                        if left[e] > left[best[0]]:
                            best[0] = T.cast(e, "int32")
            taken[best[0]] = 1
            Ids[b, t, j] = best[0]

    return take_best


def route_topk(experts: int, topk: int):
    """scores [B,S,experts], bias [experts] -> ids [B,S,topk] i32, best first, ties to the lower id."""
    take_best = _take_best(experts, topk)

    @T.prim_func(s_tir=True)
    def func(s: T.handle, bias: T.handle, i: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(s, (B, S, experts), "float32")
        Bias = T.match_buffer(bias, (experts,), "float32")
        Ids = T.match_buffer(i, (B, S, topk), "int32")
        for m in T.parallel(B * S):
            left = T.alloc_buffer((experts,), "float32")
            for e in T.serial(experts):
                left[e] = X[m // S, m % S, e] + Bias[e]
            take_best(m // S, m % S, left, Ids)

    return func


def route_topk_of_images(experts: int, topk: int, image_token: int):
    """As `route_topk`, with image_bias [experts] where tokens [B,S] is `image_token`."""
    take_best = _take_best(experts, topk)

    @T.prim_func(s_tir=True)
    def func(s: T.handle, bias: T.handle, k: T.handle, image: T.handle, i: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(s, (B, S, experts), "float32")
        Bias = T.match_buffer(bias, (experts,), "float32")
        Tok = T.match_buffer(k, (B, S), "int32")
        Image = T.match_buffer(image, (experts,), "float32")
        Ids = T.match_buffer(i, (B, S, topk), "int32")
        for b, t in T.grid(B, S):
            left = T.alloc_buffer((experts,), "float32")
            for e in T.serial(experts):
                left[e] = X[b, t, e] + T.if_then_else(Tok[b, t] == image_token, Image[e], Bias[e])
            take_best(b, t, left, Ids)

    return func


def route_hash(vocab: int, topk: int):
    """tokens [B,S], table [vocab,topk] i32 -> ids [B,S,topk]."""

    @T.prim_func(s_tir=True)
    def func(k: T.handle, w: T.handle, i: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Tok = T.match_buffer(k, (B, S), "int32")
        W = T.match_buffer(w, (vocab, topk), "int32")
        Ids = T.match_buffer(i, (B, S, topk), "int32")
        for b, t, j in T.grid(B, S, topk):
            Ids[b, t, j] = W[T.cast(Tok[b, t], "int64"), j]

    return func


def route_weights(experts: int, topk: int, factor: float, eps: float):
    """scores [B,S,experts], ids [B,S,topk] -> [B,S,topk]."""

    @T.prim_func(s_tir=True)
    def func(s: T.handle, i: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(s, (B, S, experts), "float32")
        Ids = T.match_buffer(i, (B, S, topk), "int32")
        Y = T.match_buffer(y, (B, S, topk), "float32")
        for b, t in T.grid(B, S):
            total = T.alloc_buffer((1,), "float32", scope="local")
            total[0] = T.float32(0)
            for j in T.serial(topk):
                total[0] = total[0] + X[b, t, Ids[b, t, j]]
            for j in T.serial(topk):
                Y[b, t, j] = X[b, t, Ids[b, t, j]] / (total[0] + T.float32(eps)) * T.float32(factor)

    return func
