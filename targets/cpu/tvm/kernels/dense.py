"""Matrix products over stored panels: `linear`, `grouped_linear`, the two halves of `expert_mlp`; `embed`.

A panel holds `width` output rows k-major, so that one broadcast input value meets `width` weights at a
time. How codes are stored and summed is the business of `packing` and `product`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from math import prod

from tvm.script import tirx as T

from .dot import dot_product
from .packing import Packing, number, scale_number
from .product import CHUNK, panel_product, panel_width
from .rounding import bf16, bf16_bits
from .vec import LANES, ramp, shape, sigmoid, splat

PAIR = 32
"""Rows of w1 and of w3 in one panel of the experts' first product."""


def _products(p: Packing, k: int, width: int):
    """What multiplies rows by a panel, and how many columns of X an element of its view holds."""
    return (dot_product(p, k, width), 2) if p.dot else (panel_product(p, k, width), 1)


def _rows_dtype(p: Packing) -> str:
    """BF16 bits where pairs are multiplied."""
    return "uint16" if p.dot else "float32"


def _view_dtype(p: Packing) -> str:
    return "uint32" if p.dot else "float32"


def grouped_linear(heads: tuple[int, int] | None, groups: int, k: int, n: int, p: Packing):
    """X [B,S,*heads] seen as `groups` rows of k, n output rows a group -> Y [B,S,groups*n] f32.

    X is f32, or BF16 bits where `p.dot`.

    A plain `linear` is one group of X [B,S,k], heads None. W, S, R are the codes, block scales and row
    scales of groups * ceil(n/width) panels, as `Packing` says.
    """
    width = panel_width(n)
    panels = -(-n // width)
    product, per = _products(p, k, width)
    codes, scales, rows_ = (
        p.code_shape(groups * panels, k, width), p.scale_shape(groups * panels, k, width),
        p.row_shape(groups * panels, width),
    )  # fmt: skip
    inner = (groups * k,) if heads is None else heads

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, s: T.handle, r: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, shape(B, S, *inner), _rows_dtype(p))
        W = T.match_buffer(w, codes, p.dtype)
        Scale = T.match_buffer(s, scales, p.scale_dtype)
        Row = T.match_buffer(r, rows_, "float32")
        Y = T.match_buffer(y, (B, S, groups * n), "float32")
        Xf = T.decl_buffer((B * S * groups * k // per,), _view_dtype(p), data=X.data)
        Wf = T.decl_buffer((prod(codes),), p.dtype, data=W.data)
        Sf = T.decl_buffer((prod(scales),), p.scale_dtype, data=Scale.data)
        Rf = T.decl_buffer((prod(rows_),), "float32", data=Row.data)
        Yf = T.decl_buffer((B * S * groups * n,), "float32", data=Y.data)
        for gp in T.parallel(groups * panels):
            for chunk in T.serial((B * S + CHUNK - 1) // CHUNK):
                out = T.alloc_buffer((CHUNK * width,), "float32")
                rows: T.let[T.int64] = T.min(B * S - chunk * CHUNK, T.int64(CHUNK))
                product(
                    out, Xf, Wf, Sf, Rf,
                    _every(groups * k // per, (chunk * CHUNK * groups + gp // panels) * (k // per)),
                    rows,
                    T.cast(gp, "int64"),
                )  # fmt: skip
                for i in T.serial(rows):
                    for j in T.serial(T.min(width, n - gp % panels * width)):
                        Yf[((chunk * CHUNK + i) * groups + gp // panels) * n + gp % panels * width + j] = out[
                            i * width + j
                        ]

    return func


def embed(vocab: int, d: int, p: Packing):
    """tokens [B,S] i32 and a table [vocab,d] -> [B,S,d] f32.

    W [vocab, d codes], S [vocab, blocks] and R [vocab, 1] are row-major, codes as they are stored.
    """
    per_byte = p.per_byte
    blocks, columns = p.blocks(d), -(-d // per_byte)
    scales, rows_ = (vocab, blocks) if p.scale else (1,), (vocab, 1) if p.rows else (1,)

    def value(W, S, R, row, j):
        word = W[row * columns + j // per_byte]
        if not p.plain:
            word = T.cast(T.reinterpret("uint8", word) if p.dtype == "int8" else word, "uint32")
        found = number(p.code, word, j % per_byte, 1)
        if p.scale:
            found = found * scale_number(p.scale, S[row * blocks + j // p.block], 1)
        return found * R[row] if p.rows else found

    @T.prim_func(s_tir=True)
    def func(i: T.handle, w: T.handle, s: T.handle, r: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Ids = T.match_buffer(i, (B, S), "int32")
        W = T.match_buffer(w, (vocab, columns), p.dtype)
        Scale = T.match_buffer(s, scales, p.scale_dtype)
        Row = T.match_buffer(r, rows_, "float32")
        Y = T.match_buffer(y, (B, S, d), "float32")
        Wf = T.decl_buffer((vocab * columns,), p.dtype, data=W.data)
        Sf = T.decl_buffer((prod(scales),), p.scale_dtype, data=Scale.data)
        Rf = T.decl_buffer((prod(rows_),), "float32", data=Row.data)
        for b in T.serial(B):
            for t in T.serial(S):
                for j in T.serial(d):
                    Y[b, t, j] = value(Wf, Sf, Rf, T.cast(Ids[b, t], "int64"), j)

    return func


def _every(stride, start):
    """Rows one after the other: where row r starts."""
    return lambda r: start + r * stride


def _routed(Order, first, topk: int, k: int):
    """The rows of tokens whose routes are `first` and those behind it in order of experts."""
    return lambda r: T.cast(Order[first + r] // topk, "int64") * k


def expert_hidden(
    experts: int, k: int, inner: int, topk: int, limit: float, p: Packing, rounded: bool = False
):
    """First half of the expert MLP, on routes sorted by expert.

    X [B,S,k]; gates [B,S,topk]; order [B*S*topk] i32 (sorted row -> position in
    the flat routing); starts [experts+1] i32; W, S, R: `experts` times ceil(inner/32) panels of 64 rows, 32
    of w1, then 32 of w3, of the same channels
    -> H [B*S*topk, inner] = silu(min(g, L)) clamp(u, -L, L) gate, `rounded` to BF16; bits of it where
    `p.dot`, else f32.
    """
    panels, width = -(-inner // PAIR), 2 * PAIR
    product, per = _products(p, k, width)
    codes, scales = p.code_shape(experts * panels, k, width), p.scale_shape(experts * panels, k, width)
    rows_ = p.row_shape(experts * panels, width)

    def hidden(gate, up, weight):
        gate = T.min(gate, splat(T.float32(limit)))
        up = T.max(T.min(up, splat(T.float32(limit))), splat(T.float32(-limit)))
        return gate * sigmoid(gate) * up * splat(weight)

    def kept(x):
        return (bf16_bits(x) if p.dot else bf16(x)) if rounded else x

    @T.prim_func(s_tir=True)
    def func(
        x: T.handle, g: T.handle, o: T.handle, s: T.handle, w: T.handle, c: T.handle, r: T.handle, h: T.handle
    ):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, (B, S, k), _rows_dtype(p))
        G = T.match_buffer(g, (B, S, topk), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        W = T.match_buffer(w, codes, p.dtype)
        Scale = T.match_buffer(c, scales, p.scale_dtype)
        Row = T.match_buffer(r, rows_, "float32")
        Hid = T.match_buffer(h, (B * S * topk, inner), _rows_dtype(p))
        Xf = T.decl_buffer((B * S * k // per,), _view_dtype(p), data=X.data)
        Gf = T.decl_buffer((B * S * topk,), "float32", data=G.data)
        Wf = T.decl_buffer((prod(codes),), p.dtype, data=W.data)
        Sf = T.decl_buffer((prod(scales),), p.scale_dtype, data=Scale.data)
        Rf = T.decl_buffer((prod(rows_),), "float32", data=Row.data)
        for pn in T.parallel(panels):
            for e in T.serial(experts):
                for chunk in T.serial((Starts[e + 1] - Starts[e] + (CHUNK - 1)) // CHUNK):
                    out = T.alloc_buffer((CHUNK * width,), "float32")
                    first: T.let[T.int64] = T.cast(Starts[e] + chunk * CHUNK, "int64")
                    rows: T.let[T.int64] = T.cast(
                        T.min(Starts[e + 1] - Starts[e] - chunk * CHUNK, CHUNK), "int64"
                    )
                    product(
                        out, Xf, Wf, Sf, Rf, _routed(Order, first, topk, k // per), rows,
                        T.cast(e, "int64") * panels + pn,
                    )  # fmt: skip
                    for i in T.serial(rows):
                        for q in T.unroll(PAIR // LANES):
                            out[ramp(i * width + q * LANES)] = hidden(
                                out[ramp(i * width + q * LANES)],
                                out[ramp(i * width + PAIR + q * LANES)],
                                Gf[Order[first + i]],
                            )
                        for j in T.serial(T.min(PAIR, inner - pn * PAIR)):
                            Hid[first + i, pn * PAIR + j] = kept(out[i * width + j])

    return func


def expert_output(experts: int, k: int, inner: int, topk: int, p: Packing):
    """Second half: H [B*S*topk, inner] by `experts` times ceil(k/width) panels W, S, R into Y [B,S,k].

    H is f32, or BF16 bits where `p.dot`.
    A token's experts are added in ascending order. Tokens without a route (padding) get 0.
    """
    width = panel_width(k)
    panels = -(-k // width)
    product, per = _products(p, inner, width)
    codes, rows_ = p.code_shape(experts * panels, inner, width), p.row_shape(experts * panels, width)
    scales = p.scale_shape(experts * panels, inner, width)

    @T.prim_func(s_tir=True)
    def func(h: T.handle, o: T.handle, s: T.handle, w: T.handle, c: T.handle, r: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Hid = T.match_buffer(h, (B * S * topk, inner), _rows_dtype(p))
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        W = T.match_buffer(w, codes, p.dtype)
        Scale = T.match_buffer(c, scales, p.scale_dtype)
        Row = T.match_buffer(r, rows_, "float32")
        Y = T.match_buffer(y, (B, S, k), "float32")
        Hf = T.decl_buffer((B * S * topk * inner // per,), _view_dtype(p), data=Hid.data)
        Wf = T.decl_buffer((prod(codes),), p.dtype, data=W.data)
        Sf = T.decl_buffer((prod(scales),), p.scale_dtype, data=Scale.data)
        Rf = T.decl_buffer((prod(rows_),), "float32", data=Row.data)
        Yf = T.decl_buffer((B * S * k,), "float32", data=Y.data)
        for pn in T.parallel(panels):
            for m in T.serial(B * S):
                for j in T.serial(T.min(width, k - pn * width)):
                    Yf[m * k + pn * width + j] = T.float32(0)
            for e in T.serial(experts):
                for chunk in T.serial((Starts[e + 1] - Starts[e] + (CHUNK - 1)) // CHUNK):
                    out = T.alloc_buffer((CHUNK * width,), "float32")
                    first: T.let[T.int64] = T.cast(Starts[e] + chunk * CHUNK, "int64")
                    rows: T.let[T.int64] = T.cast(
                        T.min(Starts[e + 1] - Starts[e] - chunk * CHUNK, CHUNK), "int64"
                    )
                    product(
                        out, Hf, Wf, Sf, Rf, _every(inner // per, first * (inner // per)), rows,
                        T.cast(e, "int64") * panels + pn,
                    )  # fmt: skip
                    for i in T.serial(rows):
                        token: T.let[T.int64] = T.cast(Order[first + i] // topk, "int64")
                        for j in T.serial(T.min(width, k - pn * width)):
                            Yf[token * k + pn * width + j] = (
                                Yf[token * k + pn * width + j] + out[i * width + j]
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
