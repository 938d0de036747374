"""Kernels that count: the norm of every routed row per expert, the squares of inputs per column."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, ramp, zeros


def route_rows(topk: int):
    """ids [B,S,topk] -> [B*S*topk] i32, each its own index: every route is a row of its own."""

    @T.prim_func(s_tir=True)
    def func(i: T.handle, o: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        T.match_buffer(i, (B, S, topk), "int32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        for r in T.serial(B * S * topk):
            Order[r] = T.cast(r, "int32")

    return func


def expert_usage(experts: int, k: int, topk: int):
    """counts [experts,3] += tokens, gates and norms of the routes of each expert.

    gates [B,S,topk]; order [B*S*topk] i32 and starts [experts+1] i32 from `dispatch.expert_order`; Y
    [1,B*S*topk,k] the weighted output of every route, sorted by expert. Sums of a call are float64, then
    added to float32.
    """

    @T.prim_func(s_tir=True)
    def func(c: T.handle, y: T.handle, g: T.handle, o: T.handle, s: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Counts = T.match_buffer(c, (experts, 3), "float32")
        Y = T.match_buffer(y, (1, B * S * topk, k), "float32")
        G = T.match_buffer(g, (B, S, topk), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        Yf = T.decl_buffer((B * S * topk * k,), "float32", data=Y.data)
        Gf = T.decl_buffer((B * S * topk,), "float32", data=G.data)
        for e in T.parallel(experts):
            sums = T.alloc_buffer((2,), "float64")
            sums[0] = T.float64(0)
            sums[1] = T.float64(0)
            for i in T.serial(Starts[e + 1] - Starts[e]):
                row: T.let[T.int64] = T.cast(Starts[e] + i, "int64") * k
                acc = T.alloc_buffer((LANES,), "float32")
                acc[ramp(0)] = zeros()
                for v in T.serial(k // LANES):
                    acc[ramp(0)] = acc[ramp(0)] + Yf[ramp(row + v * LANES)] * Yf[ramp(row + v * LANES)]
                total = T.alloc_buffer((1,), "float64")
                total[0] = T.float64(0)
                for j in T.serial(LANES):
                    total[0] = total[0] + T.cast(acc[j], "float64")
                for j in T.serial(k % LANES):
                    at: T.let[T.int64] = row + k // LANES * LANES + j
                    total[0] = total[0] + T.cast(Yf[at] * Yf[at], "float64")
                sums[0] = sums[0] + T.cast(Gf[Order[Starts[e] + i]], "float64")
                sums[1] = sums[1] + T.sqrt(total[0])
            Counts[e, 0] = Counts[e, 0] + T.cast(Starts[e + 1] - Starts[e], "float32")
            Counts[e, 1] = T.cast(T.cast(Counts[e, 1], "float64") + sums[0], "float32")
            Counts[e, 2] = T.cast(T.cast(Counts[e, 2], "float64") + sums[1], "float32")

    return func


def column_squares(k: int):
    """sums [k] += squares of x [B,S,k] over the first n_valid [B] rows; a column is summed in row order."""
    tail = k % LANES

    @T.prim_func(s_tir=True)
    def func(s: T.handle, x: T.handle, n: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Sums = T.match_buffer(s, (k,), "float32")
        X = T.match_buffer(x, (B, S, k), "float32")
        Valid = T.match_buffer(n, (B,), "int32")
        Xf = T.decl_buffer((B * S * k,), "float32", data=X.data)
        for v in T.parallel(k // LANES):
            acc = T.alloc_buffer((LANES,), "float32")
            acc[ramp(0)] = zeros()
            for b in T.serial(B):
                for t in T.serial(T.cast(Valid[b], "int64")):
                    at: T.let[T.int64] = (b * S + t) * k + v * LANES
                    acc[ramp(0)] = acc[ramp(0)] + Xf[ramp(at)] * Xf[ramp(at)]
            Sums[ramp(v * LANES)] = Sums[ramp(v * LANES)] + acc[ramp(0)]
        for j in T.serial(tail):
            one = T.alloc_buffer((1,), "float32")
            one[0] = T.float32(0)
            for b in T.serial(B):
                for t in T.serial(T.cast(Valid[b], "int64")):
                    last: T.let[T.int64] = (b * S + t) * k + (k - tail) + j
                    one[0] = one[0] + Xf[last] * Xf[last]
            Sums[k - tail + j] = Sums[k - tail + j] + one[0]

    return func
