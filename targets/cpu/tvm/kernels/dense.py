"""Matrix products over packed panels: `linear`, `grouped_linear`, and the two halves of `expert_mlp`.

A panel holds `width` output rows k-major, so that one broadcast input value meets `width` weights at a
time. Every output accumulates over k in ascending order whatever the row tile, so a result does not
depend on how tokens were cut into calls. Accumulators are read at constant places only, or LLVM would keep
them in memory; `done` is their copy for the ragged epilogue.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from .vec import LANES, load_weight, ramp, sigmoid, splat, weight_dtype, zeros

ROWS = 6
"""Rows of a register tile: 6 rows x 4 vectors of accumulators leave room in 32 registers."""


def panel_width(rows: int) -> int:
    """Output rows per panel: 64 where there are that many, else the next multiple of 16."""
    return min(64, -(-rows // LANES) * LANES)


def linear(k: int, n: int, bf16: bool):
    """X [B,S,k] f32, W [panels,k,width] -> Y [B,S,n] f32."""
    width = panel_width(n)
    panels, vecs = -(-n // width), width // LANES
    dtype = weight_dtype(bf16)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, k), "float32")
        W = T.match_buffer(w, (panels, k, width), dtype)
        Y = T.match_buffer(y, (B, S, n), "float32")
        Xf = T.decl_buffer((B * S * k,), "float32", data=X.data)
        Wf = T.decl_buffer((panels * k * width,), dtype, data=W.data)
        Yf = T.decl_buffer((B * S * n,), "float32", data=Y.data)
        for p in T.parallel(panels):
            for tile in T.serial(B * S // ROWS):
                acc = T.alloc_buffer((ROWS * width,), "float32", scope="local")
                for i in T.unroll(ROWS * vecs):
                    acc[ramp(i * LANES)] = zeros()
                for kk in T.serial(k):
                    for v in T.unroll(vecs):
                        for r in T.unroll(ROWS):
                            acc[ramp((r * vecs + v) * LANES)] = acc[
                                ramp((r * vecs + v) * LANES)
                            ] + load_weight(Wf, (p * k + kk) * width + v * LANES, bf16) * splat(
                                Xf[(tile * ROWS + r) * k + kk]
                            )
                done = T.alloc_buffer((ROWS * width,), "float32")
                for i in T.unroll(ROWS * vecs):
                    done[ramp(i * LANES)] = acc[ramp(i * LANES)]
                for r in T.serial(ROWS):
                    for j in T.serial(T.min(width, n - p * width)):
                        Yf[(tile * ROWS + r) * n + p * width + j] = done[r * width + j]
            for tail in T.serial(B * S % ROWS):
                one = T.alloc_buffer((width,), "float32", scope="local")
                for v in T.unroll(vecs):
                    one[ramp(v * LANES)] = zeros()
                for kk in T.serial(k):
                    for v in T.unroll(vecs):
                        one[ramp(v * LANES)] = one[ramp(v * LANES)] + load_weight(
                            Wf, (p * k + kk) * width + v * LANES, bf16
                        ) * splat(Xf[(B * S // ROWS * ROWS + tail) * k + kk])
                last = T.alloc_buffer((width,), "float32")
                for v in T.unroll(vecs):
                    last[ramp(v * LANES)] = one[ramp(v * LANES)]
                for j in T.serial(T.min(width, n - p * width)):
                    Yf[(B * S // ROWS * ROWS + tail) * n + p * width + j] = last[j]

    return func


def grouped_linear(groups: int, k: int, n: int, bf16: bool):
    """X [B,S,groups*k] seen as rows, W [groups*panels,k,width] (n rows a group) -> Y [B,S,groups*n]."""
    width = panel_width(n)
    panels, vecs = -(-n // width), width // LANES
    dtype = weight_dtype(bf16)

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        H = T.int64()
        D = T.int64()
        X = T.match_buffer(x, (B, S, H, D), "float32")
        W = T.match_buffer(w, (groups * panels, k, width), dtype)
        Y = T.match_buffer(y, (B, S, groups * n), "float32")
        Xf = T.decl_buffer((B * S * H * D,), "float32", data=X.data)
        Wf = T.decl_buffer((groups * panels * k * width,), dtype, data=W.data)
        Yf = T.decl_buffer((B * S * groups * n,), "float32", data=Y.data)
        for gp in T.parallel(groups * panels):
            for m in T.serial(B * S):
                one = T.alloc_buffer((width,), "float32", scope="local")
                for v in T.unroll(vecs):
                    one[ramp(v * LANES)] = zeros()
                for kk in T.serial(k):
                    for v in T.unroll(vecs):
                        one[ramp(v * LANES)] = one[ramp(v * LANES)] + load_weight(
                            Wf, (gp * k + kk) * width + v * LANES, bf16
                        ) * splat(Xf[(m * groups + gp // panels) * k + kk])
                done = T.alloc_buffer((width,), "float32")
                for v in T.unroll(vecs):
                    done[ramp(v * LANES)] = one[ramp(v * LANES)]
                for j in T.serial(T.min(width, n - gp % panels * width)):
                    Yf[(m * groups + gp // panels) * n + gp % panels * width + j] = done[j]

    return func


def expert_gather(experts: int, k: int, topk: int):
    """X [B,S,k] -> [B*S*topk + ROWS, k]: the row of every route, sorted by expert.

    The tail is left alone: a tile may read up to ROWS rows past its expert's last, and drops what it gets.
    """

    @T.prim_func(s_tir=True)
    def func(x: T.handle, o: T.handle, s: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, k), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        Y = T.match_buffer(y, (B * S * topk + ROWS, k), "float32")
        Xf = T.decl_buffer((B * S * k,), "float32", data=X.data)
        for i in T.serial(Starts[experts]):
            for j in T.serial(k):
                Y[i, j] = Xf[T.cast(Order[i] // topk, "int64") * k + j]

    return func


PAIR = 32
"""Rows of w1 and of w3 in one panel of the experts' first product."""


def expert_hidden(experts: int, k: int, inner: int, topk: int, limit: float, bf16: bool):
    """First half of the expert MLP, on rows sorted by expert.

    X [B*S*topk+ROWS,k] from `expert_gather`; gates [B,S,topk]; order [B*S*topk] i32 (sorted row -> position
    in the flat routing); starts [experts+1] i32; W [experts,panels,k,64], 32 rows of w1, then 32 of w3,
    of the same channels -> H [B*S*topk+ROWS, inner] = silu(min(g, L)) clamp(u, -L, L) gate.
    """
    panels, width, dtype = -(-inner // PAIR), 2 * PAIR, weight_dtype(bf16)
    vecs = width // LANES

    @T.prim_func(s_tir=True)
    def func(x: T.handle, g: T.handle, o: T.handle, s: T.handle, w: T.handle, h: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B * S * topk + ROWS, k), "float32")
        G = T.match_buffer(g, (B, S, topk), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        W = T.match_buffer(w, (experts, panels, k, width), dtype)
        Hid = T.match_buffer(h, (B * S * topk + ROWS, inner), "float32")
        Xf = T.decl_buffer(((B * S * topk + ROWS) * k,), "float32", data=X.data)
        Gf = T.decl_buffer((B * S * topk,), "float32", data=G.data)
        Wf = T.decl_buffer((experts * panels * k * width,), dtype, data=W.data)
        for p in T.parallel(panels):
            for e in T.serial(experts):
                for tile in T.serial((Starts[e + 1] - Starts[e] + (ROWS - 1)) // ROWS):
                    acc = T.alloc_buffer((ROWS * width,), "float32", scope="local")
                    for i in T.unroll(ROWS * vecs):
                        acc[ramp(i * LANES)] = zeros()
                    base: T.let[T.int64] = T.cast(Starts[e] + tile * ROWS, "int64")
                    at = T.meta_var((T.cast(e, "int64") * panels + p) * k)
                    if Starts[e + 1] - Starts[e] - tile * ROWS > 1:
                        for kk in T.serial(k):
                            for v in T.unroll(vecs):
                                for r in T.unroll(ROWS):
                                    acc[ramp(r * width + v * LANES)] = acc[
                                        ramp(r * width + v * LANES)
                                    ] + load_weight(Wf, (at + kk) * width + v * LANES, bf16) * splat(
                                        Xf[(base + r) * k + kk]
                                    )
                    else:
                        for kk in T.serial(k):
                            for v in T.unroll(vecs):
                                acc[ramp(v * LANES)] = acc[ramp(v * LANES)] + load_weight(
                                    Wf, (at + kk) * width + v * LANES, bf16
                                ) * splat(Xf[base * k + kk])
                    done = T.alloc_buffer((ROWS * width,), "float32")
                    for i in T.unroll(ROWS * vecs):
                        done[ramp(i * LANES)] = acc[ramp(i * LANES)]
                    for r in T.serial(T.min(ROWS, Starts[e + 1] - Starts[e] - tile * ROWS)):
                        for j in T.serial(T.min(PAIR, inner - p * PAIR)):
                            gate = T.alloc_buffer((1,), "float32", scope="local")
                            gate[0] = T.min(done[r * width + j], T.float32(limit))
                            Hid[Starts[e] + tile * ROWS + r, p * PAIR + j] = (
                                gate[0]
                                * sigmoid(gate[0])
                                * T.max(
                                    T.min(done[r * width + PAIR + j], T.float32(limit)), T.float32(-limit)
                                )
                                * Gf[Order[Starts[e] + tile * ROWS + r]]
                            )

    return func


def expert_output(experts: int, k: int, inner: int, topk: int, bf16: bool):
    """Second half: H [B*S*topk+ROWS, inner] by W [experts,panels,inner,width] into Y [B,S,k].

    A token's experts are added in ascending order. Tokens without a route (padding) get 0.
    """
    width = panel_width(k)
    panels, vecs, dtype = -(-k // width), width // LANES, weight_dtype(bf16)

    @T.prim_func(s_tir=True)
    def func(h: T.handle, o: T.handle, s: T.handle, w: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Hid = T.match_buffer(h, (B * S * topk + ROWS, inner), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        W = T.match_buffer(w, (experts, panels, inner, width), dtype)
        Y = T.match_buffer(y, (B, S, k), "float32")
        Hf = T.decl_buffer(((B * S * topk + ROWS) * inner,), "float32", data=Hid.data)
        Wf = T.decl_buffer((experts * panels * inner * width,), dtype, data=W.data)
        Yf = T.decl_buffer((B * S * k,), "float32", data=Y.data)
        for p in T.parallel(panels):
            for m in T.serial(B * S):
                for j in T.serial(T.min(width, k - p * width)):
                    Yf[m * k + p * width + j] = T.float32(0)
            for e in T.serial(experts):
                for tile in T.serial((Starts[e + 1] - Starts[e] + (ROWS - 1)) // ROWS):
                    acc = T.alloc_buffer((ROWS * width,), "float32", scope="local")
                    for i in T.unroll(ROWS * vecs):
                        acc[ramp(i * LANES)] = zeros()
                    base: T.let[T.int64] = T.cast(Starts[e] + tile * ROWS, "int64")
                    at = T.meta_var((T.cast(e, "int64") * panels + p) * inner)
                    if Starts[e + 1] - Starts[e] - tile * ROWS > 1:
                        for kk in T.serial(inner):
                            for v in T.unroll(vecs):
                                for r in T.unroll(ROWS):
                                    acc[ramp(r * width + v * LANES)] = acc[
                                        ramp(r * width + v * LANES)
                                    ] + load_weight(Wf, (at + kk) * width + v * LANES, bf16) * splat(
                                        Hf[(base + r) * inner + kk]
                                    )
                    else:
                        for kk in T.serial(inner):
                            for v in T.unroll(vecs):
                                acc[ramp(v * LANES)] = acc[ramp(v * LANES)] + load_weight(
                                    Wf, (at + kk) * width + v * LANES, bf16
                                ) * splat(Hf[base * inner + kk])
                    done = T.alloc_buffer((ROWS * width,), "float32")
                    for i in T.unroll(ROWS * vecs):
                        done[ramp(i * LANES)] = acc[ramp(i * LANES)]
                    for r in T.serial(T.min(ROWS, Starts[e + 1] - Starts[e] - tile * ROWS)):
                        for j in T.serial(T.min(width, k - p * width)):
                            token = T.meta_var(T.cast(Order[Starts[e] + tile * ROWS + r] // topk, "int64"))
                            Yf[token * k + p * width + j] = (
                                Yf[token * k + p * width + j] + done[r * width + j]
                            )

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
