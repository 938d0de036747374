"""Matrix products over stored panels: `linear`, `grouped_linear`, the two halves of `expert_mlp`; `embed`.

A panel holds `width` output rows k-major, so that one broadcast input value meets `width` weights at a
time. How codes are stored and summed is the business of `packing` and `product`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from math import prod

from tvm.script import tirx as T

from . import coded, tiles
from .coded import coded_product
from .dot import dot_product
from .packing import Packing, number, scale_number
from .product import CHUNK, panel_product, panel_width
from .rounding import bf16, store_pieces
from .rows import CodedRow, Rows, codes_of, store_codes
from .tiles import by_tiles, tile_product
from .vec import LANES, by_vectors, lanes_from, move, ramp, sigmoid, splat

PAIR = 32
"""Rows of w1 and of w3 in one panel of the experts' first product."""


def _product(p: Packing, k: int, width: int):
    """What multiplies rows by a panel, and most rows."""
    if p.coded:
        return coded_product(p, k, width), coded.CHUNK
    if not p.pieces:
        return panel_product(p, k, width), CHUNK
    if by_tiles(p):
        return tile_product(p, k, width), tiles.CHUNK
    return dot_product(p, k, width), CHUNK


def grouped_linear(heads: tuple[int, int] | None, groups: int, k: int, n: int, p: Packing):
    """X [B,S,*heads] seen as `groups` rows of k, n output rows a group -> Y [B,S,groups*n] f32.

    X is f32, or rows as `Rows` has them for p: bits of BF16 pieces, or codes.

    A plain `linear` is one group of X [B,S,k], heads None. W, S, R are the codes, block scales and row
    scales of groups * ceil(n/width) panels, as `Packing` says.
    """
    width = panel_width(n)
    panels = -(-n // width)
    product, most = _product(p, k, width)
    rows_of = Rows(p, k, groups)
    codes, scales, rows_ = (
        p.code_shape(groups * panels, k, width), p.scale_shape(groups * panels, k, width),
        p.row_shape(groups * panels, width),
    )  # fmt: skip
    length = rows_of.words

    @T.prim_func(s_tir=True)
    def func(x: T.handle, w: T.handle, s: T.handle, r: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(
            x, rows_of.shape(B, S) if heads is None or rows_of.stored else (B, S, *heads), rows_of.dtype
        )
        W = T.match_buffer(w, codes, p.dtype)
        Scale = T.match_buffer(s, scales, p.scale_dtype)
        Row = T.match_buffer(r, rows_, "float32")
        Y = T.match_buffer(y, (B, S, groups * n), "float32")
        Xf = T.decl_buffer((rows_of.planes * B * S * length,), rows_of.view, data=X.data)
        Wf = T.decl_buffer((prod(codes),), p.dtype, data=W.data)
        Sf = T.decl_buffer((prod(scales),), p.scale_dtype, data=Scale.data)
        Rf = T.decl_buffer((prod(rows_),), "float32", data=Row.data)
        Yf = T.decl_buffer((B * S * groups * n,), "float32", data=Y.data)
        for gp in T.parallel(groups * panels):
            for chunk in T.serial((B * S + most - 1) // most):
                out = T.alloc_buffer((most * width,), "float32")
                rows: T.let[T.int64] = T.min(B * S - chunk * most, T.int64(most))
                product(
                    out, Xf, Wf, Sf, Rf,
                    _every(length, chunk * most * length + gp // panels * rows_of.group),
                    rows, T.cast(gp, "int64"), B * S * length,
                    T.min(T.cast(gp, "int64") + 1, groups * panels - 1),
                )  # fmt: skip
                for i in T.serial(rows):
                    y_at: T.let[T.int64] = (
                        ((chunk * most + i) * groups + gp // panels) * n + gp % panels * width
                    )
                    _columns(n, width, gp % panels, move, Yf, y_at, out, i * width)

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


def _next_expert(Starts, e, experts: int):
    """The next one that has rows, or the same."""
    found = T.alloc_buffer((1,), "int32")
    T.buffer_store(found, e + 1, [0])
    with T.While(T.And(found[0] < experts, Starts[T.min(found[0] + 1, experts)] == Starts[found[0]])):
        T.buffer_store(found, found[0] + 1, [0])
    return T.bind(T.if_then_else(found[0] < experts, found[0], e))


def _columns(n: int, width: int, panel, body, *args) -> None:
    """`by_vectors` for the columns of a panel of n in panels of `width`; the last one may be short."""
    if n % width == 0:
        by_vectors(width, body, *args)
        return
    with T.If(panel < n // width):
        with T.Then():
            by_vectors(width, body, *args)
        with T.Else():
            by_vectors(n % width, body, *args)


def _add(j, lanes: int, y, y_at, x, x_at) -> None:
    place = lanes_from(y_at + j, lanes)
    T.buffer_store(y, y[place] + x[lanes_from(x_at + j, lanes)], [place])


def _clear(j, lanes: int, y, y_at) -> None:
    nothing = T.float32(0) if lanes == 1 else T.broadcast(T.float32(0), lanes)
    T.buffer_store(y, nothing, [lanes_from(y_at + j, lanes)])


def _every(stride, start):
    """Rows one after the other: where row r starts."""
    return lambda r: start + r * stride


def _routed(Order, first, topk: int, k: int):
    """The rows of tokens whose routes are `first` and those behind it in order of experts."""
    return lambda r: T.cast(Order[first + r] // topk, "int64") * k


def expert_hidden(
    experts: int, k: int, inner: int, topk: int, limit: float, p: Packing, second: Packing,
    rounded: str = "",
):  # fmt: skip
    """First half of the expert MLP, on routes sorted by expert.

    X [B,S,k], where products are by tiles [B*S*topk, k] of `dispatch.expert_rows`; gates [B,S,topk]; order
    [B*S*topk] i32 (sorted row -> position in the flat routing); starts [experts+1] i32; W, S, R: `experts`
    times ceil(inner/32) panels of 64 rows, 32 of w1, then 32 of w3, of the same channels
    -> H [B*S*topk, inner] = silu(min(g, L)) clamp(u, -L, L) gate, as rows for products of `second`; those of
    float32 are `rounded` to BF16 or, in blocks of 32, to INT8.
    """
    panels, width = -(-inner // PAIR), 2 * PAIR
    product, most = _product(p, k, width)
    x_rows, h_rows = Rows(p, k), Rows(second, inner)
    codes, scales = p.code_shape(experts * panels, k, width), p.scale_shape(experts * panels, k, width)
    rows_ = p.row_shape(experts * panels, width)
    in_order = by_tiles(p)
    length, h_length = x_rows.words, h_rows.length

    def hidden(gate, up, weight):
        gate = T.min(gate, splat(T.float32(limit)))
        up = T.max(T.min(up, splat(T.float32(limit))), splat(T.float32(-limit)))
        return gate * sigmoid(gate) * up * splat(weight)

    def keep(j, lanes, Hid, at, apart, out, start):
        x = out[lanes_from(start + j, lanes)]
        if second.pieces:
            store_pieces(Hid, at + j, apart, x, second.pieces)
        else:
            T.buffer_store(Hid, bf16(x) if rounded == "bf16" else x, [lanes_from(at + j, lanes)])

    def block(panel, out, start):
        """A panel's channels, which share a scale; zeros behind the last one."""
        channel = panel * PAIR + T.ramp(T.int64(0), 1, LANES)
        for q in range(PAIR // LANES):
            x = out[ramp(start + q * LANES)]
            real = channel + q * LANES < T.broadcast(T.int64(inner), LANES)
            yield T.bind(x if inner % PAIR == 0 else T.Select(real, x, splat(T.float32(0))))

    def keep_row(Hid, row, panel, rows, out, start):
        """A panel's channels of one of `rows` rows."""
        if second.coded:
            low, high = block(panel, out, start)
            store_codes(Hid, row * h_length, panel * PAIR, low, high, CodedRow.of(second, inner))
            return
        if rounded == "int8":
            codes, scale = codes_of(*block(panel, out, start))
            for q, c in enumerate(codes):
                T.buffer_store(out, T.cast(c, "float32x16") * splat(scale), [ramp(start + q * LANES)])
        at = T.bind(row * h_length + panel * PAIR)
        _columns(inner, PAIR, panel, keep, Hid, at, rows * h_length, out, start)

    @T.prim_func(s_tir=True)
    def func(
        x: T.handle, g: T.handle, o: T.handle, s: T.handle, w: T.handle, c: T.handle, r: T.handle, h: T.handle
    ):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(x, x_rows.shape(*((B * S * topk,) if in_order else (B, S))), x_rows.dtype)
        G = T.match_buffer(g, (B, S, topk), "float32")
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        W = T.match_buffer(w, codes, p.dtype)
        Scale = T.match_buffer(c, scales, p.scale_dtype)
        Row = T.match_buffer(r, rows_, "float32")
        Hid = T.match_buffer(h, h_rows.shape(B * S * topk), h_rows.dtype)
        Hf = T.decl_buffer((h_rows.planes * B * S * topk * h_length,), h_rows.dtype, data=Hid.data)
        each = T.meta_var(B * S * (topk if in_order else 1) * length)
        Xf = T.decl_buffer((x_rows.planes * each,), x_rows.view, data=X.data)
        Gf = T.decl_buffer((B * S * topk,), "float32", data=G.data)
        Wf = T.decl_buffer((prod(codes),), p.dtype, data=W.data)
        Sf = T.decl_buffer((prod(scales),), p.scale_dtype, data=Scale.data)
        Rf = T.decl_buffer((prod(rows_),), "float32", data=Row.data)
        for pn in T.parallel(panels):
            for e in T.serial(experts):
                for chunk in T.serial((Starts[e + 1] - Starts[e] + (most - 1)) // most):
                    out = T.alloc_buffer((most * width,), "float32")
                    first: T.let[T.int64] = T.cast(Starts[e] + chunk * most, "int64")
                    rows: T.let[T.int64] = T.cast(
                        T.min(Starts[e + 1] - Starts[e] - chunk * most, most), "int64"
                    )
                    product(
                        out, Xf, Wf, Sf, Rf,
                        _every(length, first * length) if in_order
                        else _routed(Order, first, topk, length),
                        rows, T.cast(e, "int64") * panels + pn, each,
                        T.cast(_next_expert(Starts, e, experts), "int64") * panels + pn,
                    )  # fmt: skip
                    for i in T.serial(rows):
                        for q in T.unroll(PAIR // LANES):
                            out[ramp(i * width + q * LANES)] = hidden(
                                out[ramp(i * width + q * LANES)],
                                out[ramp(i * width + PAIR + q * LANES)],
                                Gf[Order[first + i]],
                            )
                        keep_row(Hf, first + i, T.cast(pn, "int64"), B * S * topk, out, i * width)

    return func


def expert_output(experts: int, k: int, inner: int, topk: int, p: Packing):
    """Second half: H [B*S*topk, inner] by `experts` times ceil(k/width) panels W, S, R into Y [B,S,k].

    H is f32, or rows as `Rows` has them for p.
    A token's experts are added in ascending order. Tokens without a route (padding) get 0.
    """
    width = panel_width(k)
    panels = -(-k // width)
    product, most = _product(p, inner, width)
    rows_of = Rows(p, inner)
    length = rows_of.words
    codes, rows_ = p.code_shape(experts * panels, inner, width), p.row_shape(experts * panels, width)
    scales = p.scale_shape(experts * panels, inner, width)

    @T.prim_func(s_tir=True)
    def func(h: T.handle, o: T.handle, s: T.handle, w: T.handle, c: T.handle, r: T.handle, y: T.handle):
        T.func_attr({"tir.noalias": True})
        B = T.int64()
        S = T.int64()
        Hid = T.match_buffer(h, rows_of.shape(B * S * topk), rows_of.dtype)
        Order = T.match_buffer(o, (B * S * topk,), "int32")
        Starts = T.match_buffer(s, (experts + 1,), "int32")
        W = T.match_buffer(w, codes, p.dtype)
        Scale = T.match_buffer(c, scales, p.scale_dtype)
        Row = T.match_buffer(r, rows_, "float32")
        Y = T.match_buffer(y, (B, S, k), "float32")
        Hf = T.decl_buffer((rows_of.planes * B * S * topk * length,), rows_of.view, data=Hid.data)
        Wf = T.decl_buffer((prod(codes),), p.dtype, data=W.data)
        Sf = T.decl_buffer((prod(scales),), p.scale_dtype, data=Scale.data)
        Rf = T.decl_buffer((prod(rows_),), "float32", data=Row.data)
        Yf = T.decl_buffer((B * S * k,), "float32", data=Y.data)
        for pn in T.parallel(panels):
            for m in T.serial(B * S):
                _columns(k, width, pn, _clear, Yf, m * k + pn * width)
            for e in T.serial(experts):
                for chunk in T.serial((Starts[e + 1] - Starts[e] + (most - 1)) // most):
                    out = T.alloc_buffer((most * width,), "float32")
                    first: T.let[T.int64] = T.cast(Starts[e] + chunk * most, "int64")
                    rows: T.let[T.int64] = T.cast(
                        T.min(Starts[e + 1] - Starts[e] - chunk * most, most), "int64"
                    )
                    product(
                        out, Hf, Wf, Sf, Rf, _every(length, first * length), rows,
                        T.cast(e, "int64") * panels + pn, B * S * topk * length,
                        T.cast(_next_expert(Starts, e, experts), "int64") * panels + pn,
                    )  # fmt: skip
                    for i in T.serial(rows):
                        y_at: T.let[T.int64] = (
                            T.cast(Order[first + i] // topk, "int64") * k + pn * width
                        )
                        _columns(k, width, pn, _add, Yf, y_at, out, i * width)

    return func
