"""Kernels over positions and persistent state; writes work in place on the caller's buffers."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T


def positions():
    """tokens [B,S], pos [B] -> [B,S] i32."""

    @T.prim_func(s_tir=True)
    def func(i: T.handle, p: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        T.match_buffer(i, (B, S), "int32")
        P = T.match_buffer(p, (B,), "int32")
        Y = T.match_buffer(y, (B, S), "int32")
        for b, t in T.grid(B, S):
            Y[b, t] = P[b] + T.cast(t, "int32")

    return func


def entry_positions(ratio: int):
    """tokens [B,S], pos [B] -> [B, ceil(S/ratio)] i32."""

    @T.prim_func(s_tir=True)
    def func(i: T.handle, p: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        T.match_buffer(i, (B, S), "int32")
        P = T.match_buffer(p, (B,), "int32")
        Y = T.match_buffer(y, (B, (S + (ratio - 1)) // ratio), "int32")
        for b in T.serial(B):
            for t in T.serial((S + (ratio - 1)) // ratio):
                Y[b, t] = (P[b] // ratio + T.cast(t, "int32")) * ratio

    return func


def no_selection():
    """tokens [B,S] -> [B,S,1] i32 zeros: stands in where an attention has no selection."""

    @T.prim_func(s_tir=True)
    def func(i: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        T.match_buffer(i, (B, S), "int32")
        Y = T.match_buffer(y, (B, S, 1), "int32")
        for b, t in T.grid(B, S):
            Y[b, t, 0] = 0

    return func


def advance():
    """pos [B] += n_valid [B]."""

    @T.prim_func(s_tir=True)
    def func(p: T.handle, v: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        for b in T.serial(B):
            P[b] = P[b] + V[b]

    return func


def ring_write(window: int, d: int):
    """Row t of rows [B,S,d] into slot (pos + t) mod window of ring [B,window,d]; the last ones suffice."""

    @T.prim_func(s_tir=True)
    def func(r: T.handle, x: T.handle, p: T.handle, v: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        R = T.match_buffer(r, (B, window, d), "float32")
        X = T.match_buffer(x, (B, S, d), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        for b in T.serial(B):
            for i in T.serial(T.min(V[b], window)):
                for j in T.serial(d):
                    R[b, (P[b] + V[b] - 1 - i) % window, j] = X[b, V[b] - 1 - i, j]

    return func


def entries_append(ratio: int, d: int):
    """The closed rows of rows [B,E,d] into entries [B,cap,d] from slot pos // ratio."""

    @T.prim_func(s_tir=True)
    def func(e: T.handle, x: T.handle, p: T.handle, v: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        N = T.int64()
        C = T.int64()
        E = T.match_buffer(e, (B, C, d), "float32")
        X = T.match_buffer(x, (B, N, d), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        for b in T.serial(B):
            for i in T.serial((P[b] + V[b]) // ratio - P[b] // ratio):
                for j in T.serial(d):
                    E[b, P[b] // ratio + i, j] = X[b, i, j]

    return func
