"""Routes in order of their experts: which tokens an expert sees, and their rows one after the other."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .packing import Packing
from .rows import Rows
from .vec import by_vectors, move


def expert_rows(k: int, topk: int, p: Packing):
    """X [planes,B,S,length], order [B*S*topk], starts [experts+1] -> each route's row, in order.

    Rows and their length are those of `Rows` for p.
    """
    rows = Rows(p, k)
    planes, length = rows.planes, rows.length
    used = length if p.coded else k

    @T.inline
    def copy(Xf, Yf, Order, i, tokens):
        for q in T.serial(planes):
            x_at: T.let[T.int64] = (q * tokens + T.cast(Order[i] // topk, "int64")) * length
            y_at: T.let[T.int64] = (q * tokens * topk + i) * length
            by_vectors(used, move, Yf, y_at, Xf, x_at)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, o: T.handle, s: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        E = T.int64()
        X = T.match_buffer(x, rows.shape(B, S), rows.dtype)
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (E,), "int32")
        Y = T.match_buffer(y, rows.shape(B * S * topk), rows.dtype)
        Xf = T.decl_buffer((planes * B * S * length,), rows.dtype, data=X.data)
        Yf = T.decl_buffer((planes * B * S * topk * length,), rows.dtype, data=Y.data)
        if B * S == 1:  # waking a second thread would cost more
            for i in T.serial(T.cast(Starts[E - 1], "int64")):
                copy(Xf, Yf, Order, i, B * S)
        else:
            for i in T.parallel(T.cast(Starts[E - 1], "int64")):
                copy(Xf, Yf, Order, i, B * S)

    return func


def expert_order(experts: int, topk: int):
    """Sorts the routing by expert: ids [B,S,topk], n_valid [B] -> order [B*S*topk], starts [experts+1].

    `order` lists flat routing positions by expert, then token; padding is left out, so the tail of
    `order` is unused.
    """

    @T.prim_func(s_tir=True)
    def func(i: T.handle, v: T.handle, o: T.handle, s: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Ids = T.match_buffer(i, (B, S, topk), "int32")
        Valid = T.match_buffer(v, (B,), "int32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        for e in T.serial(experts + 1):
            Starts[e] = 0
        for b in T.serial(B):
            for t in T.serial(T.cast(Valid[b], "int64")):
                for j in T.serial(topk):
                    Starts[Ids[b, t, j] + 1] = Starts[Ids[b, t, j] + 1] + 1
        for e in T.serial(experts):
            Starts[e + 1] = Starts[e + 1] + Starts[e]
        next_ = T.alloc_buffer((experts,), "int32")
        for e in T.serial(experts):
            next_[e] = Starts[e]
        for b in T.serial(B):
            for t in T.serial(T.cast(Valid[b], "int64")):
                for j in T.serial(topk):
                    Order[next_[Ids[b, t, j]]] = T.cast((b * S + t) * topk + j, "int32")
                    next_[Ids[b, t, j]] = next_[Ids[b, t, j]] + 1

    return func
