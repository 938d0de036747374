"""Sparse attention with sink over window and entries (section 4.1), one online softmax.

Heads lie across vector lanes: all heads share one key, so a key's channel is a broadcast and no sum ever
runs across lanes. Keys are staged 16 at a time from ring, this call's rows, or entries.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from .vec import exp

KEYS = 12
"""Keys staged at a time: their logits are below the kilobyte up to which buffers live in registers."""


@dataclass(frozen=True)
class AttentionShape:
    """Static facts of an attention: `ratio` 0 is window only; `k` 0 attends to every visible entry; with
    `start` windows are cut.
    """

    heads: int
    d: int
    window: int
    scale: float
    ratio: int = 0
    k: int = 0
    start: bool = False


def attention(a: AttentionShape):
    """q [B,S,H,d], kv [B,S,d], ring [B,window,d], sinks [H], pos, n_valid [B], entries [B,cap,d],
    selected [B,S,k], start [B] i32 -> [B,S,H,d]. The lowering hands in dummies for unused operands.
    """
    heads, d, window, ratio, k = a.heads, a.d, a.window, a.ratio, a.k
    lanes = 8 if heads <= 8 else 16  # heads side by side; half-empty vectors cost as much as full ones
    groups = -(-heads // lanes)

    def ramp(start):
        return T.ramp(start, 1, lanes)

    def splat(x):
        return T.broadcast(x, lanes)

    def zeros():
        return splat(T.float32(0))

    def entry_count(visible):
        if not ratio:
            return T.int32(0)
        return T.min(visible, T.int32(k)) if k else visible

    def entry_id(selected, m, i):
        return selected[T.cast(m, "int64") * k + i] if k else i

    def visible(position):
        return (position + 1) // ratio if ratio else T.int32(0)

    def first(start, b):
        return start[b] if a.start else T.int32(0)

    def scaled(Q, b, t, h, c):
        """A number of a query; 0 beyond the last head."""
        x = Q[b, t, T.min(h, heads - 1), c] * T.float32(a.scale)
        return x if heads % lanes == 0 else T.if_then_else(h < heads, x, T.float32(0))

    @T.prim_func(s_tir=True)
    def func(
        q: T.handle, kv: T.handle, rg: T.handle, sk: T.handle, ps: T.handle, nv: T.handle, en: T.handle,
        sl: T.handle, st: T.handle, y: T.handle,
    ):  # fmt: skip
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        N = T.int64()
        Q = T.match_buffer(q, (B, S, heads, d), "float32")
        KV = T.match_buffer(kv, (B, S, d), "float32")
        Ring = T.match_buffer(rg, (B, window, d), "float32")
        Sinks = T.match_buffer(sk, (heads,), "float32")
        P = T.match_buffer(ps, (B,), "int32")
        V = T.match_buffer(nv, (B,), "int32")
        E = T.match_buffer(en, (B, C, d), "float32")
        Sel = T.match_buffer(sl, (B, S, N), "int32")
        Start = T.match_buffer(st, (B,), "int32")
        Y = T.match_buffer(y, (B, S, heads, d), "float32")
        Self = T.decl_buffer((B * S * N,), "int32", data=Sel.data)

        @T.inline
        def attend(mg):
            qt = T.alloc_buffer((d * lanes,), "float32")
            out = T.alloc_buffer((d * lanes,), "float32")
            keys = T.alloc_buffer((KEYS * d,), "float32")
            logit = T.alloc_buffer((KEYS * lanes,), "float32")
            top = T.alloc_buffer((lanes,), "float32")
            new_top = T.alloc_buffer((lanes,), "float32")
            total = T.alloc_buffer((lanes,), "float32")
            span = T.alloc_buffer((4,), "int32")
            m = T.meta_var(mg // groups)
            b = T.meta_var(mg // groups // S)
            t = T.meta_var(mg // groups % S)
            h0 = T.meta_var(mg % groups * lanes)
            for j in T.serial(T.min(lanes, heads - h0)):
                for c in T.serial(d):
                    Y[b, t, h0 + j, c] = T.float32(0)
            if T.cast(t, "int32") < V[b]:
                span[0] = P[b] + T.cast(t, "int32")  # position of the query
                span[1] = T.min(T.int32(window), span[0] + 1 - first(Start, b))  # keys of the window
                span[2] = span[1] + entry_count(visible(span[0]))  # all keys
                for j in T.serial(lanes):
                    for c in T.serial(d):
                        qt[c * lanes + j] = scaled(Q, b, t, h0 + j, c)
                for c in T.serial(d):
                    out[ramp(c * lanes)] = zeros()
                for j in T.serial(lanes):
                    top[j] = Sinks[T.min(h0 + j, heads - 1)]
                    total[j] = T.float32(1)
                for blk in T.serial((span[2] + (KEYS - 1)) // KEYS):
                    for i in T.serial(KEYS):
                        span[3] = T.min(blk * KEYS + i, span[2] - 1)
                        if span[3] < span[1]:
                            span[3] = span[0] - span[1] + 1 + span[3]
                            if span[3] >= P[b]:
                                for c in T.serial(d):
                                    keys[i * d + c] = KV[b, span[3] - P[b], c]
                            else:
                                for c in T.serial(d):
                                    keys[i * d + c] = Ring[b, span[3] % window, c]
                        else:
                            span[3] = entry_id(Self, m, span[3] - span[1])
                            for c in T.serial(d):
                                keys[i * d + c] = E[b, span[3], c]
                    for i in T.unroll(KEYS):
                        logit[ramp(i * lanes)] = zeros()
                    for c in T.serial(d):
                        for i in T.unroll(KEYS):
                            logit[ramp(i * lanes)] = logit[ramp(i * lanes)] + qt[ramp(c * lanes)] * splat(
                                keys[i * d + c]
                            )
                    new_top[ramp(0)] = top[ramp(0)]
                    for i in T.unroll(KEYS):
                        if blk * KEYS + i < span[2]:
                            new_top[ramp(0)] = T.max(new_top[ramp(0)], logit[ramp(i * lanes)])
                    top[ramp(0)] = exp(top[ramp(0)] - new_top[ramp(0)])
                    total[ramp(0)] = total[ramp(0)] * top[ramp(0)]
                    for i in T.unroll(KEYS):
                        if blk * KEYS + i < span[2]:
                            logit[ramp(i * lanes)] = exp(logit[ramp(i * lanes)] - new_top[ramp(0)])
                        else:
                            logit[ramp(i * lanes)] = zeros()
                        total[ramp(0)] = total[ramp(0)] + logit[ramp(i * lanes)]
                    for c in T.serial(d):
                        acc = T.alloc_buffer((lanes,), "float32")
                        acc[ramp(0)] = out[ramp(c * lanes)] * top[ramp(0)]
                        for i in T.unroll(KEYS):
                            acc[ramp(0)] = acc[ramp(0)] + logit[ramp(i * lanes)] * splat(keys[i * d + c])
                        out[ramp(c * lanes)] = acc[ramp(0)]
                    top[ramp(0)] = new_top[ramp(0)]
                for c in T.serial(d):
                    out[ramp(c * lanes)] = out[ramp(c * lanes)] / total[ramp(0)]
                for j in T.serial(T.min(lanes, heads - h0)):
                    for c in T.serial(d):
                        Y[b, t, h0 + j, c] = out[c * lanes + j]

        if B * S * groups == 1:  # waking a second thread for nothing costs time
            attend(T.int64(0))
        else:
            for mg in T.parallel(B * S * groups):
                attend(mg)

    return func
