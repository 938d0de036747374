"""The inner part of products of BF16 numbers on machines with tile registers (Intel AMX).

A tile of X is 16 rows of 32 columns, a tile of a panel 16 words, each a pair of columns, of 16 rows: as
`lane_words` stores them. TDPBF16PS sums the even and the odd columns of a tile in two FP32 chains that begin
at zero, adds them, and adds that to the sum so far, rounding to nearest even and with subnormal numbers as
zero (Intel SDM; that it is these two chains was measured). So the order of summation is columns in tiles,
ascending, and does not depend on how many rows there are. Where a scale cannot be multiplied into BF16
numbers exactly, the tiles of its block have a sum of their own that is scaled and added.

Rows of any float32 come in three pieces. A product of pieces is exact, so sums are as good as those of
float32 products.

A few rows of one piece would leave tiles all but empty: they decode straight into two chains of float32
products, of the even and of the odd columns, which gives the same bits; codes of E4M3, whose even columns can
be had as a pair, into two of VDPBF16PS.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from dsv4c.ir.dtypes import DType

from .ahead import asking, load_asking
from .amx import COLUMNS, HIGH, LINE, Block, library
from .dot import DOT, dot
from .packing import Packing, Simd
from .pairs import CHAINS, by_exponent, by_words, chains, fold, folds, pairs, whole_scale
from .product import by_row_scales, load, parts_of, store, sums
from .vec import LANES, ramp, splat, splat_u32, zeros

CHUNK = 256
"""Rows that share one decoding of a panel."""
AHEAD = 3
"""Steps that a lone tile of rows is ahead of itself in requesting memory; several request the next panel."""
IN_PLACE = 512
"""Most columns of a panel that all rows are multiplied by before the next: 32 KiB for 32 rows of it."""


def by_tiles(p: Packing) -> bool:
    """Whether products are by tiles: blocks of a scale are whole ones, or scales go into the numbers."""
    if p.coded:
        return p.simd is Simd.AMX
    if p.simd is not Simd.AMX or not p.pieces or p.code is DType.F32:
        return False
    return p.scale is None or folds(p) or p.block % COLUMNS == 0


def row_length(p: Packing, k: int) -> int:
    """Numbers from one row of X to the next.

    Behind rows that are read as tiles lies a line of nothing: rows that are powers of two apart would all
    fall into a few sets of the first-level cache.
    """
    return k + COLUMNS if by_tiles(p) else k


def tile_product(p: Packing, k: int, width: int):
    """A function like `product.panel_product`'s; X is uint32, a pair of columns to a word, and so is at(r).

    k is even, at(r) linear in r, 1 <= rows <= CHUNK, and out has room for CHUNK rows.
    """
    return _TileProduct(p, k, width)


class _TileProduct:
    """The product for one packing, number of columns and width of panels; called in a kernel's body.

    Attributes:
        in_place: tiles are loaded from the stored panel; otherwise from a scratch that it is decoded into.
        folded: one sum for all columns; otherwise one for each block of columns that share scales.
        in_chains: a word's even columns can be had as a pair.
    """

    def __init__(self, p: Packing, k: int, width: int) -> None:
        self.p, self.k, self.width, self.vecs = p, k, width, width // LANES
        self.tail = k % COLUMNS
        self.in_place = p.code is DType.BF16 and not self.tail
        self.folded = p.scale is None or folds(p)
        self.shared = p.block if p.scale else k  # columns that share scales
        self.row = T.int64(width * 4)  # bytes
        self.padded = (k + COLUMNS - 1) // COLUMNS * COLUMNS  # columns up to the end of the last tile
        self.strip = min(IN_PLACE if self.in_place else p.tuning.strip, self.padded)
        self.single, self.double = Block(1, self.vecs, p.pieces), Block(2, 2)
        self.in_chains = by_words(p)
        self.in_twos = p.pieces == 1 and self.vecs % 2 == 0
        self.blocks = frozenset({self.single, self.double} if self.in_twos else {self.single})

    def __call__(self, out, X, W, S, R, at, rows, panel, apart, following) -> None:
        start, stride = T.bind(at(0)), T.bind(at(1) - at(0))
        if self.p.pieces > 1:
            self.by_tiles(out, X, W, S, start, stride, rows, panel, apart, following)
        else:
            with T.If(rows <= self.p.tuning.few):
                with T.Then(), T.serial(0, rows) as r:
                    self.direct(out, X, W, S, start + r * stride, panel, r)
                with T.Else():
                    self.by_tiles(out, X, W, S, start, stride, rows, panel, apart, following)
        by_row_scales(self.p, out, R, rows, panel, self.width)

    def direct(self, out, X, W, S, start, panel, row) -> None:
        """One row of one piece, by the order of tiles."""
        p, vecs = self.p, self.vecs
        total = sums(vecs)
        of_tile = self.chained(X, W, start, panel) if self.in_chains else self.halved(X, W, S, start, panel)

        def one_tile(part, first, columns):
            even, odd = (sums(vecs) for _ in range(2))
            of_tile(even, odd, first, columns)
            for v in range(vecs):
                found = load(even, v) + load(odd, v)
                if by_exponent(p):  # which is exact, so that it does not matter what is scaled
                    found = found * whole_scale(p, S, self.scale_at(panel, first, v))
                store(part, v, load(part, v) + found)

        def one_block(first, columns):
            part = total if self.folded else sums(vecs)
            parts_of(columns, COLUMNS, lambda at, n: one_tile(part, first + at, n))
            for v in range(vecs if not self.folded else 0):
                scale = p.block_scale(S, self.scale_at(panel, first, v))
                store(total, v, load(total, v) + load(part, v) * scale)

        with T.attr(T.int32(0), "pragma_import_llvm", DOT), asking():
            parts_of(self.k, self.k if self.folded else self.shared, one_block)
        for v in range(vecs):
            store(out, row * vecs + v, load(total, v))

    def halved(self, X, W, S, start, panel):
        """A tile's two sums by float32 numbers: 0.7 of the time of VDPBF16PS with zeros between.

        A product of BF16 numbers is exact either way. Subnormal numbers count here, which the instructions
        for BF16 take for zero.
        """
        p, words = self.p, self.k // 2
        numbers = T.alloc_buffer((2 * words,), "float32")  # the even columns of X, and the odd ones
        with T.serial(0, words) as i:
            both = T.bind(X[start + i])
            T.buffer_store(numbers, T.reinterpret("float32", both << T.uint32(16)), [i])
            T.buffer_store(numbers, T.reinterpret("float32", both & T.uint32(0xFFFF0000)), [words + i])

        def of_tile(even, odd, first, columns):
            def add(word, v, weights):
                halves = T.shift_left(weights, splat_u32(16)), T.bitwise_and(weights, splat_u32(0xFFFF0000))
                for i, (chain, half) in enumerate(zip((even, odd), halves, strict=True)):
                    x = splat(numbers[i * words + first // 2 + word])
                    store(chain, v, load(chain, v) + T.reinterpret("float32x16", half) * x)

            scaled = not by_exponent(p)
            parts_of(
                columns, min(self.shared, columns),
                lambda at, n: self.for_each_pair(W, S, panel, first + at, n, at // 2, add, scaled),
            )  # fmt: skip

        return of_tile

    def chained(self, X, W, start, panel):
        """The same where a word's even columns are a pair, and its odd ones: half of the products."""
        p, words, pairs_of_x = self.p, self.p.words(self.k), self.k // 2
        chained = T.alloc_buffer((2 * words,), "uint32")
        whole = self.k // COLUMNS  # vectors of X
        order = [at + c for at in range(0, COLUMNS, 4) for c in (2, 0, 3, 1)]
        with T.serial(0, whole) as i:
            halves = T.reinterpret("uint16x32", X[ramp(start + i * LANES)])
            T.buffer_store(
                chained, T.reinterpret("uint32x16", T.Shuffle([halves], order)), [ramp(i * LANES)]
            )
        with T.serial(0, words - whole * LANES // 2) as rest:
            i = T.bind(whole * (LANES // 2) + rest)
            here = T.bind(X[start + 2 * i])
            last = T.bind(X[start + T.min(2 * i + 1, pairs_of_x - 1)])
            last = T.if_then_else(2 * i + 1 < pairs_of_x, last, T.uint32(0))
            T.buffer_store(chained, here << T.uint32(16) | last & T.uint32(0xFFFF), [2 * i])
            T.buffer_store(chained, here & T.uint32(0xFFFF0000) | last >> T.uint32(16), [2 * i + 1])

        def of_tile(even, odd, first, columns):
            with (
                T.attr(T.int32(0), "pragma_import_llvm", CHAINS),
                T.serial(0, -(-columns // p.per_word)) as word,
            ):
                at = T.bind(first // p.per_word + word)
                for v in range(self.vecs):
                    lanes = T.bind(load_asking(p, W, panel * words + at, v, self.width))
                    for i, (chain, weights) in enumerate(zip((even, odd), chains(p, lanes), strict=True)):
                        store(chain, v, dot(load(chain, v), weights, chained[2 * at + i]))

        return of_tile

    def by_tiles(self, out, X, W, S, start, stride, rows, panel, apart, following) -> None:
        with T.attr(T.int32(0), "pragma_import_llvm", library(self.blocks)), asking():
            high = T.bind(T.min(rows, HIGH))
            tiles = T.bind((rows + (HIGH - 1)) // HIGH)
            call(f"config_{self.p.pieces}", T.cast(high, "int32"))
            if self.tail:
                X, start, stride, apart = self.ends_padded(X, start, stride, apart, rows)
            scratch = W
            if not self.in_place:
                scratch = T.alloc_buffer((self.strip // 2 * self.width,), "uint32")
            if not self.folded:
                with T.serial(0, tiles * (HIGH * self.vecs)) as i:
                    store(out, i, zeros())

            def x_of(tile, column):
                """The last tile overlaps the one before it."""
                return T.address_of(X[start + T.min(tile * HIGH, rows - high) * stride + column // 2])

            def one_strip(first, columns):
                if not self.in_place:
                    self.decode(scratch, W, S, panel, first, columns)
                given = (out, scratch, panel, x_of, stride * 4, apart * 4, tiles, first, columns)
                if self.folded:
                    self.plain_strip(*given, rows - high, following)
                else:
                    self.scaled_strip(*given, S, high)

            parts_of(self.k, self.strip, one_strip)
            call("release")
            close_gap(out, rows, high, self.vecs)

    def plain_strip(
        self, out, scratch, panel, x_of, stride, apart, tiles, first, columns, last, following
    ) -> None:
        """Add the products of some columns to all sums."""
        more = T.cast(first > 0, "int32") if not isinstance(first, int) else T.int32(first > 0)
        steps, step_lines = -(-columns // COLUMNS), HIGH * self.width // 16
        passes = T.bind(tiles // 2 * (self.vecs // 2) + tiles % 2 if self.in_twos else tiles)
        # the next panel's columns, spread over all steps; a single pass is ahead of itself instead
        lines = T.bind(T.min((steps * step_lines + passes * steps - 1) // (passes * steps), step_lines))

        def soon(number):
            """What the steps of a pass request: (from, lines, turn, jump)."""
            if not self.in_place:
                return T.address_of(scratch[0]), T.int64(0), T.int64(0), T.int64(0)
            own = self.place(panel, 0, first + AHEAD * COLUMNS)
            ahead = self.place(following, 0, first) + number * steps * lines * (LINE // 2)
            jump = (self.place(following, 0, 0) - self.place(panel + 1, 0, 0)) * 2
            turn = T.if_then_else(first + columns >= self.k, T.int64(AHEAD), T.int64(0))
            alone = passes == 1
            start = T.address_of(scratch[T.if_then_else(alone, own, ahead)])
            return start, lines, T.if_then_else(alone, turn, T.int64(0)), jump

        def sums(block, tile, v, distance, number):
            self.sums(
                block, out, tile * HIGH * self.width + v * LANES, x_of(tile, first), distance, stride,
                self.panel_of(scratch, panel, v, first if self.in_place else 0), steps, more, soon(number),
            )  # fmt: skip

        if not self.in_twos:
            with T.serial(0, tiles) as tile:
                sums(self.single, tile, 0, apart, tile)
            return
        with T.serial(0, tiles // 2) as two:
            distance = T.bind((T.min((two * 2 + 1) * HIGH, last) - two * 2 * HIGH) * stride)
            for v in range(0, self.vecs, 2):
                sums(self.double, two * 2, v, distance, two * (self.vecs // 2) + v // 2)
        with T.If(tiles % 2 == 1), T.Then():
            sums(self.single, tiles - 1, 0, apart, passes - 1)

    def scaled_strip(
        self, out, scratch, panel, x_of, stride, apart, tiles, first, columns, S, high
    ) -> None:
        """Add the products of some columns, block by block and scaled, to all sums."""
        part = T.alloc_buffer((HIGH * self.width,), "float32")

        def one_block(tile, at, n):
            self.sums(
                self.single, part, 0, x_of(tile, first + at), apart, stride,
                self.panel_of(scratch, panel, 0, at), -(-n // COLUMNS), T.int32(0),
                (T.address_of(scratch[0]), T.int64(0), T.int64(0), T.int64(0)),
            )  # fmt: skip
            places = [self.scale_at(panel, first + at, v) for v in range(self.vecs)]
            scales = [T.bind(self.p.block_scale(S, place)) for place in places]
            with T.serial(0, high) as r:
                for v, scale in enumerate(scales):
                    place = (tile * HIGH + r) * self.vecs + v
                    store(out, place, load(out, place) + load(part, r * self.vecs + v) * scale)

        with T.serial(0, tiles) as i:
            parts_of(columns, self.shared, lambda at, n: one_block(i, at, n))

    def sums(self, block, out, place, x, apart, stride, panel, steps, more, soon) -> None:
        """A block of sums at out[place]; x and panel are pointers, apart and stride bytes."""
        c = T.address_of(out[place])
        call(f"begin_{block.name}", c, self.row, more)
        call(f"steps_{block.name}", x, apart, stride, panel, self.row, T.int64(steps), *soon)
        call(f"end_{block.name}", c, self.row)

    def panel_of(self, scratch, panel, v, column):
        """Where vector v of a column stands: in the stored panel, or in the scratch."""
        if self.in_place:
            return T.address_of(scratch[self.place(panel, v, column)])
        return T.address_of(scratch[column // 2 * self.width + v * LANES])

    def place(self, panel, v, column):
        """Of a vector in the stored panels, in BF16 numbers."""
        return ((panel * (self.k // 2) + column // 2) * self.width + v * LANES) * 2

    def scale_at(self, panel, column, v):
        return (panel * self.p.blocks(self.k) + column // self.shared) * self.width + v * LANES

    # ------------------------------------------------------------------------------- before and after

    def ends_padded(self, X, start, stride, apart, rows):
        """A copy of rows of X whose last tile is filled with zeros, and where its rows and pieces lie."""
        words, per = self.padded // 2, self.k // 2
        copy = T.alloc_buffer((self.p.pieces * CHUNK * words,), "uint32")
        with T.serial(0, self.p.pieces) as i, T.serial(0, rows) as r, T.serial(0, words) as c:
            value = X[start + i * apart + r * stride + T.min(c, per - 1)]
            value = T.if_then_else(c < per, value, T.uint32(0))
            T.buffer_store(copy, value, [(i * CHUNK + r) * words + c])
        return copy, T.int64(0), T.int64(words), T.int64(CHUNK * words)

    def decode(self, scratch, W, S, panel, first, columns) -> None:
        """Columns from `first` on as pairs, and zeros up to the end of the last tile."""

        def put(row, v, weights):
            T.buffer_store(scratch, weights, [ramp(row * self.width + v * LANES)])

        parts_of(
            columns, min(self.shared, columns),
            lambda at, n: self.for_each_pair(W, S, panel, first + at, n, at // 2, put),
        )  # fmt: skip
        nothing = T.broadcast(T.uint32(0), LANES)
        with T.serial(0, -columns % COLUMNS // 2 * self.vecs) as i:
            T.buffer_store(scratch, nothing, [ramp(columns // 2 * self.width + i * LANES)])

    def for_each_pair(self, W, S, panel, first, columns, number, take, scaled=True) -> None:
        """`take(number + i, vector, weights)` for the i-th pair of columns, which share their scales.

        Scales that can be are multiplied into the weights if `scaled`.
        """
        p, vecs, group = self.p, self.vecs, self.p.per_word
        words = p.words(self.k)
        scales = [None] * vecs
        if folds(p) and scaled:
            scales = [T.bind(fold(p, S, self.scale_at(panel, first, v))) for v in range(vecs)]

        def of_word(word, count):
            for v in range(vecs):
                lanes = T.bind(load_asking(p, W, panel * words + first // group + word, v, self.width))
                for i, weights in enumerate(pairs(p, lanes, scales[v], count)):
                    take(number + word * (group // 2) + i, v, weights)

        if columns >= group:
            with T.serial(0, columns // group) as word:
                of_word(word, group)
        if columns % group:
            of_word(columns // group, columns % group)


def close_gap(out, rows, high, vecs: int) -> None:
    """The last tile of `high` rows begins before it would: its sums move up to those of the tile before."""
    last = T.bind((rows - 1) // HIGH * HIGH)
    gap = T.bind(last - (rows - high))
    with T.If(gap > 0), T.Then(), T.serial(0, (rows - last) * vecs) as i:
        store(out, last * vecs + i, load(out, (last + gap) * vecs + i))


def call(name: str, *args) -> None:
    """A function that the text of `amx` defines."""
    T.evaluate(T.call_extern("int32", f"dsv4c_amx_{name}", *args))
