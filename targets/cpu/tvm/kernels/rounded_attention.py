"""Attention and index selection with the rounding points of the reference (sections 4.1 step 4 and 4.3).

Written to be right and not to be fast. Slots come in blocks of 64: first those of the window, oldest key
first, whether the window is full or not, then the entries; a block's maximum is known before its
probabilities are rounded to BF16.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .attend import AttentionShape
from .rounding import bf16

BLOCK = 64
"""Slots of one step of the online softmax."""


def attention_in_blocks(a: AttentionShape):
    """As `attend.attention`, heads one at a time: -> [B,S,H,d], not yet rounded."""
    heads, d, window, ratio, k = a.heads, a.d, a.window, a.ratio, a.k

    def entry_count(visible):
        if not ratio:
            return T.int32(0)
        return T.min(visible, T.int32(k)) if k else visible

    def entry_id(selected, m, i):
        return selected[T.cast(m, "int64") * k + i] if k else i

    def visible(position):
        return (position + 1) // ratio if ratio else T.int32(0)

    @T.prim_func(s_tir=True)
    def func(
        q: T.handle, kv: T.handle, rg: T.handle, sk: T.handle, ps: T.handle, nv: T.handle, en: T.handle,
        sl: T.handle, y: T.handle,
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
        Y = T.match_buffer(y, (B, S, heads, d), "float32")
        Self = T.decl_buffer((B * S * N,), "int32", data=Sel.data)
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            keys = T.alloc_buffer((BLOCK * d,), "float32")
            out = T.alloc_buffer((heads * d,), "float32")
            top = T.alloc_buffer((heads,), "float32")
            total = T.alloc_buffer((heads,), "float32")
            p = T.alloc_buffer((BLOCK,), "float32")
            n = T.alloc_buffer((5,), "int32")  # position, window keys, entries, keys of the block, id
            f = T.alloc_buffer((2,), "float32")  # new maximum, what the old sums shrink by
            for h in T.serial(heads):
                for c in T.serial(d):
                    Y[b, t, h, c] = T.float32(0)
            if T.cast(t, "int32") < V[b]:
                n[0] = P[b] + T.cast(t, "int32")
                n[1] = T.min(T.int32(window), n[0] + 1)
                n[2] = entry_count(visible(n[0]))
                for h in T.serial(heads):
                    top[h] = T.float32(0)
                    total[h] = T.float32(0)
                    for c in T.serial(d):
                        out[h * d + c] = T.float32(0)
                for blk in T.serial((T.int32(window) + n[2] + (BLOCK - 1)) // BLOCK):
                    n[3] = 0
                    for i in T.serial(BLOCK):
                        slot = T.meta_var(blk * BLOCK + i)
                        if slot < n[1]:
                            n[4] = n[0] - n[1] + 1 + slot
                            if n[4] >= P[b]:
                                for c in T.serial(d):
                                    keys[n[3] * d + c] = KV[b, n[4] - P[b], c]
                            else:
                                for c in T.serial(d):
                                    keys[n[3] * d + c] = Ring[b, n[4] % window, c]
                            n[3] = n[3] + 1
                        else:
                            if slot >= window and slot < window + n[2]:
                                n[4] = entry_id(Self, m, slot - window)
                                for c in T.serial(d):
                                    keys[n[3] * d + c] = E[b, n[4], c]
                                n[3] = n[3] + 1
                    if n[3] > 0:
                        for h in T.serial(heads):
                            for i in T.serial(n[3]):
                                p[i] = T.float32(0)
                                for c in T.serial(d):
                                    p[i] = p[i] + Q[b, t, h, c] * keys[i * d + c]
                                p[i] = p[i] * T.float32(a.scale)
                            # the first block is never empty, so `top` becomes real there
                            f[0] = T.if_then_else(blk == 0, p[0], top[h])
                            for i in T.serial(n[3]):
                                f[0] = T.max(f[0], p[i])
                            f[1] = T.if_then_else(blk == 0, T.float32(0), T.exp(top[h] - f[0]))
                            top[h] = f[0]
                            total[h] = total[h] * f[1]
                            for c in T.serial(d):
                                out[h * d + c] = out[h * d + c] * f[1]
                            for i in T.serial(n[3]):
                                p[i] = T.exp(p[i] - f[0])
                                total[h] = total[h] + p[i]
                                p[i] = bf16(p[i])
                                for c in T.serial(d):
                                    out[h * d + c] = out[h * d + c] + p[i] * keys[i * d + c]
                for h in T.serial(heads):
                    f[0] = total[h] + T.exp(Sinks[h] - top[h])
                    for c in T.serial(d):
                        Y[b, t, h, c] = out[h * d + c] / f[0]

    return func


def index_select_in_order(heads: int, d: int, ratio: int, k: int, ascending: bool):
    """As `select.index_select`, with scores in BF16: ids by descending score, ties to the lower, or
    `ascending`, then -1.
    """

    @T.prim_func(s_tir=True)
    def func(q: T.handle, w: T.handle, ks: T.handle, p: T.handle, v: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        C = T.int64()
        Q = T.match_buffer(q, (B, S, heads, d), "float32")
        W = T.match_buffer(w, (B, S, heads), "float32")
        K = T.match_buffer(ks, (B, C, d), "float32")
        P = T.match_buffer(p, (B,), "int32")
        V = T.match_buffer(v, (B,), "int32")
        Y = T.match_buffer(y, (B, S, k), "int32")
        for m in T.parallel(B * S):
            b = T.meta_var(m // S)
            t = T.meta_var(m % S)
            n = T.alloc_buffer((2,), "int32")  # visible entries, best
            for j in T.serial(k):
                Y[b, t, j] = -1
            if T.cast(t, "int32") < V[b]:
                score = T.alloc_buffer((C + 1,), "float32")
                dot = T.alloc_buffer((1,), "float32")
                n[0] = (P[b] + T.cast(t, "int32") + 1) // ratio
                for j in T.serial(n[0]):
                    score[j] = T.float32(0)
                    for h in T.serial(heads):
                        dot[0] = T.float32(0)
                        for c in T.serial(d):
                            dot[0] = dot[0] + Q[b, t, h, c] * K[b, j, c]
                        score[j] = score[j] + bf16(T.max(bf16(dot[0]), T.float32(0)) * W[b, t, h])
                    score[j] = bf16(score[j])
                for i in T.serial(T.min(n[0], k)):
                    n[1] = 0
                    for j in T.serial(n[0]):
                        if score[j] > score[n[1]]:
                            n[1] = j
                    Y[b, t, i] = n[1]
                    score[n[1]] = T.float32(float("-inf"))
                if ascending:
                    n[1] = 0
                    for j in T.serial(n[0]):
                        if score[j] < T.min_value("float32"):  # taken
                            Y[b, t, n[1]] = j
                            n[1] = n[1] + 1

    return func
