"""The inner part of products of BF16 numbers, where one instruction multiplies pairs of them.

For machines with AVX-512 BF16. Rows of X come as BF16, weights become pairs of neighbouring columns in
registers. The instruction adds a pair's two products to an FP32 sum one after the other, rounding to nearest
even, and takes subnormal BF16 numbers for zero (Intel SDM, VDPBF16PS). Pairs are summed in ascending order;
where a scale cannot be multiplied into BF16 numbers exactly, its block has a sum of its own that is scaled
and added. One row decodes straight into its sums, more rows share pairs that are decoded once into the
first-level cache; both give the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from dsv4c.ir.dtypes import DType

from .ahead import asking, load_asking
from .packing import Packing
from .pairs import fold, folds, pairs
from .product import ROWS, by_row_scales, load, parts_of, store, sums
from .vec import LANES, ramp, splat, zeros

STRIP = 128
"""Most columns of a panel that are decoded at a time: 16 KiB for 64 rows."""
FEW = 2
"""Rows of a last tile that are not worth a whole one."""

DOT = """
define <16 x float> @dsv4c_dot(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""
"""TVM's own vectors of BF16 do not reach an intrinsic (0.27); what a kernel imports is inlined."""


def dot(total, weights, x):
    """16 sums plus the products of 16 words of pairs by one; where `DOT` is imported."""
    return T.call_extern("float32x16", "dsv4c_dot", total, weights, splat(x))


def dot_product(p: Packing, k: int, width: int):
    """A function like `product.panel_product`'s; X is uint32, a pair of columns to a word, in one piece.

    k is even.
    """
    vecs, group = width // LANES, p.per_word
    words, blocks = p.words(k), p.blocks(k)
    folded = p.scale is None or folds(p)  # one sum for all columns
    block = p.block if p.scale else k  # columns that share scales
    in_place = p.code is DType.BF16
    strip = k if in_place else STRIP if folded and block < STRIP else min(block, STRIP)

    def scale_at(panel, column, v):
        return (panel * blocks + column // block) * width + v * LANES

    def pairs_of(W, S, panel, first, columns, take):
        """`take(i, vec, weights)` for the pairs of columns from `first` on, which share their scales."""
        scales = [None] * vecs
        if folds(p):
            scales = [T.bind(fold(p, S, scale_at(panel, first, v))) for v in range(vecs)]

        def of_word(word, count):
            for v in range(vecs):
                lanes = T.bind(load_asking(p, W, panel * words + first // group + word, v, width))
                for i, weights in enumerate(pairs(p, lanes, scales[v], count)):
                    take(word * (group // 2) + i, v, weights)

        if columns >= group:
            with T.serial(0, columns // group) as word:
                of_word(word, group)
        if columns % group:
            of_word(columns // group, columns % group)

    def direct(out, X, W, S, at, panel, row):
        start, total = T.bind(at(row)), sums(vecs)

        def one_block(first, columns):
            part = total if folded else sums(vecs)
            from_ = T.bind(start + first // 2)
            pairs_of(
                W, S, panel, first, columns,
                lambda i, v, weights: store(part, v, dot(load(part, v), weights, X[from_ + i])),
            )  # fmt: skip
            for v in range(vecs if not folded else 0):
                scale = p.block_scale(S, scale_at(panel, first, v))
                store(total, v, load(total, v) + load(part, v) * scale)

        parts_of(k, block, one_block)
        for v in range(vecs):
            store(out, row * vecs + v, load(total, v))

    def tile(out, X, weights, S, at, panel, first, columns, row, height, rows):
        """`height` rows from `row` by columns from `first`; beyond the last row the last one is repeated."""
        starts = [T.bind(at(T.min(row + r, rows - 1)) + first // 2) for r in range(height)]
        parts = [sums(vecs) for _ in range(height)]
        each = [(r, v) for r in range(height) for v in range(vecs)]
        for r, v in each if folded else []:
            store(parts[r], v, load(out, (row + r) * vecs + v))
        with T.serial(0, columns // 2) as c:
            for v in range(vecs):
                for start, part in zip(starts, parts, strict=True):
                    store(part, v, dot(load(part, v), weights(c, v), X[start + c]))
        for r, v in each:
            total, place = load(parts[r], v), (row + r) * vecs + v
            if not folded:
                total = load(out, place) + total * p.block_scale(S, scale_at(panel, first, v))
            store(out, place, total)

    def tiles(out, X, weights, S, at, panel, first, columns, rows):
        given = (out, X, weights, S, at, panel, first, columns)
        with T.serial(0, rows // ROWS) as i:
            tile(*given, i * ROWS, ROWS, rows)
        rest = T.bind(rows % ROWS)
        with T.If(rest > FEW):
            with T.Then():
                tile(*given, rows - rest, ROWS, rows)
            with T.Else(), T.serial(0, rest) as i:
                tile(*given, rows - rest + i, 1, rows)

    def shared(out, X, W, S, at, rows, panel):
        with T.serial(0, (rows + ROWS - 1) // ROWS * ROWS * vecs) as i:
            store(out, i, zeros())
        if in_place:
            tiles(out, X, lambda c, v: p.load(W, panel * words + c, v, width), S, at, panel, 0, k, rows)
            return
        scratch = T.alloc_buffer((strip // 2 * width,), "uint32")

        def place(pair, v):
            return [ramp((pair * vecs + v) * LANES)]

        def one_strip(first, columns):
            def one_block(start, count):
                pairs_of(
                    W, S, panel, first + start, count,
                    lambda i, v, weights: T.buffer_store(scratch, weights, place(start // 2 + i, v)),
                )  # fmt: skip

            parts_of(columns, min(block, strip), one_block)
            tiles(out, X, lambda c, v: scratch[place(c, v)[0]], S, at, panel, first, columns, rows)

        parts_of(k, strip, one_strip)

    def product(out, X, W, S, R, at, rows, panel, *_):
        with T.attr(T.int32(0), "pragma_import_llvm", DOT), asking():
            with T.If(rows <= p.tuning.few):
                with T.Then(), T.serial(0, rows) as r:
                    direct(out, X, W, S, at, panel, r)
                with T.Else():
                    shared(out, X, W, S, at, rows, panel)
            by_row_scales(p, out, R, rows, panel, width)

    return product
