"""The inner part of products of BF16 numbers, where one instruction multiplies pairs of them.

For machines with AVX-512 BF16. Rows of X come as BF16, weights become pairs of neighbouring columns in
registers. The instruction adds a pair's two products to an FP32 sum one after the other, rounding to nearest
even, and takes subnormal BF16 numbers for zero (Intel SDM, VDPBF16PS). Pairs are summed in ascending order;
where a scale cannot be multiplied into BF16 numbers exactly, or costs more there, its block has a sum of its
own that is scaled and added. A few rows decode straight into their sums, more share pairs that are decoded
once into the first-level cache; both give the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from dsv4c.ir.dtypes import DType

from .ahead import ask, asking, load_asking
from .packing import Packing
from .pairs import by_words, fold, folds, pairs
from .product import ROWS, by_row_scales, in_groups, load, parts_of, store, sums, whole_tiles
from .vec import LANES, ramp, splat, zeros

STRIP = 128
"""Most columns of a panel that are decoded at a time: 16 KiB for 64 rows."""
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
    folded = p.scale is None or (folds(p) and not by_words(p))  # one sum for all columns
    block = p.block if p.scale else k  # columns that share scales
    in_place = p.code is DType.BF16
    strip = STRIP if folded and block < STRIP else min(block, STRIP)

    def scale_at(panel, column, v):
        return (panel * blocks + column // block) * width + v * LANES

    def pairs_of(W, S, panel, first, columns, take):
        """`take(i, vec, weights)` for the pairs of columns from `first` on, which share their scales."""
        scales = [None] * vecs
        if folded and p.scale is not None:
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

    def direct(out, X, W, S, starts, panel, row):
        """The rows that begin at `starts`, straight from the stored codes."""
        totals = [sums(vecs) for _ in starts]

        def one_block(first, columns):
            parts = totals if folded else [sums(vecs) for _ in starts]
            places = [T.bind(start + first // 2) for start in starts]

            def add(i, v, weights):
                weights = T.bind(weights)
                for part, place in zip(parts, places, strict=True):
                    store(part, v, dot(load(part, v), weights, X[place + i]))

            pairs_of(W, S, panel, first, columns, add)
            for v in range(vecs if not folded else 0):
                scale = T.bind(p.block_scale(S, scale_at(panel, first, v)))
                for total, part in zip(totals, parts, strict=True):
                    store(total, v, load(total, v) + load(part, v) * scale)

        parts_of(k, block, one_block)
        for r, total in enumerate(totals):
            for v in range(vecs):
                store(out, (row + r) * vecs + v, load(total, v))

    def tile(out, X, weights, S, at, panel, first, columns, row, rows, soon):
        """A tile's rows from `row` on by columns from `first`; beyond the last row that one is repeated.

        `soon(c)` is called for every pair of columns.
        """
        starts = [T.bind(at(T.min(row + r, rows - 1)) + first // 2) for r in range(ROWS)]
        parts = [sums(vecs) for _ in starts]
        each = [(r, v) for r in range(ROWS) for v in range(vecs)]
        for r, v in each if folded else []:
            store(parts[r], v, load(out, (row + r) * vecs + v))
        with T.serial(0, columns // 2) as c:
            soon(c)
            for v in range(vecs):
                for start, part in zip(starts, parts, strict=True):
                    store(part, v, dot(load(part, v), weights(c, v), X[start + c]))
        for r, v in each:
            total, place = load(parts[r], v), (row + r) * vecs + v
            if not folded:
                total = load(out, place) + total * p.block_scale(S, scale_at(panel, first, v))
            store(out, place, total)

    def tiles(out, X, weights, S, at, panel, first, columns, rows, whole, soon=lambda i, c: None):
        with T.serial(0, whole // ROWS) as i:
            given = (first, columns, i * ROWS, rows, lambda c: soon(i, c))
            tile(out, X, weights, S, at, panel, *given)

    def strip_in_place(out, X, W, S, at, panel, first, columns, rows, whole, following):
        """Numbers as they are stored; lines of the next strip, of this panel or the next, are requested."""
        word = T.bind(panel * words + first // 2)
        after = T.bind(T.if_then_else(first + columns < k, word + columns // 2, following * words))

        def weights(c, v):
            return p.load(W, word + c, v, width)

        def soon(i, c):
            ask(W, ((after + c) * width + i % vecs * LANES) * 2)

        tiles(out, X, weights, S, at, panel, first, columns, rows, whole, soon)

    def shared(out, X, W, S, at, rows, whole, panel, following):
        """Whole tiles, which share what is decoded."""
        with T.serial(0, whole * vecs) as i:
            store(out, i, zeros())
        if in_place:
            given = (out, X, W, S, at, panel)
            more = (rows, whole, following)
            parts_of(k, strip, lambda first, columns: strip_in_place(*given, first, columns, *more))
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
            given = (S, at, panel, first, columns, rows, whole)
            tiles(out, X, lambda c, v: scratch[place(c, v)[0]], *given)

        parts_of(k, strip, one_strip)

    def product(out, X, W, S, R, at, rows, panel, _, following):
        with T.attr(T.int32(0), "pragma_import_llvm", DOT), asking():
            whole = whole_tiles(rows, p.tuning.few)
            with T.If(whole > 0), T.Then():
                shared(out, X, W, S, at, rows, whole, panel, following)
            in_groups(whole, rows, at, lambda starts, row: direct(out, X, W, S, starts, panel, row))
            by_row_scales(p, out, R, rows, panel, width)

    return product
