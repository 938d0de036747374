"""The inner part of products of INT8 rows by stored integers and FP4 numbers: sums of whole numbers.

A row of X comes as codes, with one scale for every 32 columns. Codes of a matrix become bytes in registers,
FP4 ones as twice their number. The products of up to 32 columns that share both scales are summed exactly, as
integers; the sum is multiplied by the scales and added to the row's, in FP32, columns ascending. So the order
of the integers does not matter: one row uses VPDPBUSD, whose first factors are bytes without a sign (codes of
the matrix are raised, and what that adds for a row's codes comes with the row), and many use TDPBSSD, where
the machine has tile registers; both give the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from dsv4c.ir.dtypes import DType

from .ahead import ask, asking, load_asking
from .amx import HIGH, codes_library
from .packing import NIBBLE_VALUES, Packing, Simd
from .product import by_row_scales, in_groups, load, parts_of, store, sums, whole_tiles
from .rows import BLOCK, CodedRow
from .tiles import close_gap
from .vec import LANES, ramp, splat, splat_u32, zeros

CHUNK = 256
"""Rows that share one decoding of a panel."""
TOGETHER = 4
"""Rows of a register tile where there are no tile registers: 4 x 4 vectors of sums."""

VNNI = """
define <16 x i32> @dsv4c_vnni(<16 x i32> %sum, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %sum, <64 x i8> %x, <64 x i8> %y)
  ret <16 x i32> %r
}
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
"""


def coded_product(p: Packing, k: int, width: int):
    """A function like `product.panel_product`'s; X is uint32, rows as `CodedRow` lays them out."""
    return _CodedProduct(p, k, width)


class _CodedProduct:
    """The product for one packing, number of columns and width of panels; called in a kernel's body."""

    def __init__(self, p: Packing, k: int, width: int) -> None:
        self.p, self.k, self.width, self.vecs = p, k, width, width // LANES
        self.row = CodedRow.of(p, k)
        self.tiled = p.simd is Simd.AMX
        self.in_place = self.tiled and p.code is DType.I8 and k % BLOCK == 0
        self.per = p.per_word // 4  # words of bytes in a stored word
        self.strip = min(p.tuning.strip, self.row.padded)

    def __call__(self, out, X, W, S, R, at, rows, panel, apart, following) -> None:
        start, stride = T.bind(at(0)), T.bind(at(1) - at(0))

        def direct(starts, row):
            self.direct(out, X, W, S, starts, panel, row)

        with T.attr(T.int32(0), "pragma_import_llvm", VNNI), asking():
            if self.tiled:  # rows lie at equal distances
                with T.If(rows <= self.p.tuning.few):
                    with T.Then():
                        in_groups(T.int64(0), rows, lambda r: start + r * stride, direct, 2)
                    with T.Else():
                        self.by_tiles(out, X, W, S, start, stride, rows, panel)
            else:
                whole = whole_tiles(rows, self.p.tuning.few, TOGETHER)
                with T.If(whole > 0), T.Then():
                    self.by_registers(out, X, W, S, at, rows, whole, panel)
                in_groups(whole, rows, at, direct)
        by_row_scales(self.p, out, R, rows, panel, self.width)

    # -------------------------------------------------------------------------------------- a few rows

    def direct(self, out, X, W, S, starts, panel, row) -> None:
        """The rows that begin at `starts`, straight from the stored codes."""
        p, vecs, words = self.p, self.vecs, self.p.words(self.k)
        totals = [sums(vecs) for _ in starts]

        def one_block(first, columns):
            for at, n in self.shared(columns):
                parts = [self.begin(X, start, first + at) for start in starts]
                for w in range(-(-n // p.per_word)):
                    for v in range(vecs):
                        place = panel * words + (first + at) // p.per_word + w
                        lanes = T.bind(load_asking(p, W, place, v, self.width))
                        for i, bytes_ in enumerate(map(T.bind, _bytes(p, lanes, raised=True))):
                            for part, start in zip(parts, starts, strict=True):
                                x = X[start + (first + at) // 4 + w * self.per + i]
                                store(part, v, vnni(load(part, v), bytes_, x))
                for v, scale in enumerate(self.scales(S, panel, first + at)):
                    for total, part, start in zip(totals, parts, starts, strict=True):
                        store(total, v, self.added(load(total, v), load(part, v), scale, X, start, first))

        parts_of(self.k, BLOCK, one_block)
        for r, total in enumerate(totals):
            for v in range(vecs):
                store(out, (row + r) * vecs + v, load(total, v))

    def begin(self, X, start, column):
        """Sums of integers that begin with what raising the matrix's codes has added too much."""
        part = T.alloc_buffer((self.vecs * LANES,), "int32")
        less = T.bind(T.reinterpret("int32", X[start + self.row.raise_at(column)]))
        for v in range(self.vecs):
            store(part, v, splat(less))
        return part

    def shared(self, columns: int) -> list[tuple[int, int]]:
        """The parts of a block whose columns share their scales: (first, how many)."""
        step = self.row.step
        return [(at, min(step, columns - at)) for at in range(0, columns, step)]

    def scales(self, S, panel, column):
        """The matrix's scales of every vector; None without."""
        p = self.p
        if p.scale is None:
            return [None] * self.vecs
        place = (panel * p.blocks(self.k) + column // p.block) * self.width
        return [T.bind(p.block_scale(S, place + v * LANES)) for v in range(self.vecs)]

    def added(self, total, part, scale, X, start, column):
        """`total` plus a sum of integers by its scales."""
        x = self.scale_of(X, start, column)
        return total + T.cast(part, "float32x16") * (splat(x) if scale is None else scale * splat(x))

    def scale_of(self, X, start, column):
        x = T.reinterpret("float32", X[start + self.row.scale_at(column)])
        return x * T.float32(0.5) if self.p.code is DType.F4E2M1X2 else x

    # --------------------------------------------------------------------------------------- many rows

    def decode(self, scratch, W, panel, first, columns, raised: bool) -> None:
        """Columns from `first` on as words of four bytes."""
        p = self.p
        word = panel * p.words(self.k) + first // p.per_word
        with T.serial(0, -(-columns // p.per_word)) as w:
            for v in range(self.vecs):
                lanes = T.bind(load_asking(p, W, word + w, v, self.width))
                for i, bytes_ in enumerate(_bytes(p, lanes, raised)):
                    place = (w * self.per + i) * self.width + v * LANES
                    T.buffer_store(scratch, bytes_, [ramp(place)])

    def by_tiles(self, out, X, W, S, first_row, stride, rows, panel) -> None:
        """16 rows at a time; the last tile overlaps the one before it."""
        part = T.alloc_buffer((HIGH * self.width,), "int32")
        with T.attr(T.int32(0), "pragma_import_llvm", codes_library(self.row.step, self.vecs)):
            high = T.bind(T.min(rows, HIGH))
            tiles = T.bind((rows + (HIGH - 1)) // HIGH)
            _call(f"config_{self.row.step}", T.cast(high, "int32"))
            with T.serial(0, tiles * (HIGH * self.vecs)) as i:
                store(out, i, zeros())
            scratch, word = W, panel * self.p.words(self.k)
            if not self.in_place:
                scratch = T.alloc_buffer((self.strip // 4 * self.width,), "uint32")

            def panel_of(first, at):
                """Where columns stand as bytes."""
                if self.in_place:
                    return T.address_of(scratch[(word + (first + at) // 4) * self.width * 4])
                return T.address_of(scratch[at // 4 * self.width])

            def one_block(tile, start, first, at, columns):
                for within, _ in self.shared(columns):
                    x = T.address_of(X[start + (first + at + within) // 4])
                    args = x, stride * 4, panel_of(first, at + within), T.address_of(part[0])
                    _call(f"block_{self.row.step}x{self.vecs}", *args, T.int64(self.width * 4))
                    scales = self.scales(S, panel, first + at + within)
                    with T.serial(0, high) as r:
                        for v, scale in enumerate(scales):
                            place, mine = (tile * HIGH + r) * self.vecs + v, load(part, r * self.vecs + v)
                            row = start + r * stride
                            total = self.added(load(out, place), mine, scale, X, row, first + at)
                            store(out, place, total)

            def one_strip(first, columns):
                if self.in_place:
                    with T.serial(0, columns // 4 * self.vecs) as i:
                        ask(W, (word + (first + self.strip) // 4) * self.width * 4 + i * 64)
                else:
                    self.decode(scratch, W, panel, first, columns, raised=False)
                with T.serial(0, tiles) as t:
                    start = T.bind(first_row + T.min(t * HIGH, rows - high) * stride)
                    parts_of(columns, BLOCK, lambda at, n: one_block(t, start, first, at, n))

            parts_of(self.k, self.strip, one_strip)
            _call("release")
            close_gap(out, rows, high, self.vecs)

    def by_registers(self, out, X, W, S, first_of, rows, whole, panel) -> None:
        """Whole tiles; beyond the last row that one is repeated."""
        scratch = T.alloc_buffer((self.strip // 4 * self.width,), "uint32")
        with T.serial(0, whole * self.vecs) as i:
            store(out, i, zeros())

        def tile(first, columns, row):
            """All columns of a strip, with the rows' sums in registers."""
            starts = [T.bind(first_of(T.min(row + r, rows - 1))) for r in range(TOGETHER)]
            totals = [sums(self.vecs) for _ in starts]
            for r, total in enumerate(totals):
                for v in range(self.vecs):
                    store(total, v, load(out, (row + r) * self.vecs + v))

            def one_block(at, n):
                for within, here in self.shared(n):
                    parts = [self.begin(X, start, first + at + within) for start in starts]
                    with T.serial(0, -(-here // 4)) as w:
                        for v in range(self.vecs):
                            bytes_ = scratch[ramp(((at + within) // 4 + w) * self.width + v * LANES)]
                            for part, start in zip(parts, starts, strict=True):
                                x = X[start + (first + at + within) // 4 + w]
                                store(part, v, vnni(load(part, v), bytes_, x))
                    for v, scale in enumerate(self.scales(S, panel, first + at + within)):
                        for total, part, start in zip(totals, parts, starts, strict=True):
                            store(
                                total, v,
                                self.added(load(total, v), load(part, v), scale, X, start, first + at),
                            )  # fmt: skip

            parts_of(columns, BLOCK, one_block)
            for r, total in enumerate(totals):
                for v in range(self.vecs):
                    store(out, (row + r) * self.vecs + v, load(total, v))

        def one_strip(first, columns):
            self.decode(scratch, W, panel, first, columns, raised=True)
            with T.serial(0, whole // TOGETHER) as i:
                tile(first, columns, i * TOGETHER)

        parts_of(self.k, self.strip, one_strip)


def vnni(total, raised, x):
    """16 integers plus the products of four bytes each by those of one word; where `VNNI` is imported."""
    return T.call_extern("int32x16", "dsv4c_vnni", total, raised, splat(x))


def _bytes(p: Packing, word, raised: bool):
    """A loaded word's codes as words of four bytes in the order of `CodedRow`, plus `CodedRow.raised`."""
    if p.code is DType.I8:
        return [T.bitwise_xor(word, splat_u32(0x80808080)) if raised else word]
    found = []
    for shift in (0, 4):
        nibbles = T.bitwise_and(
            T.shift_right(word, splat_u32(shift)) if shift else word, splat_u32(0x0F0F0F0F)
        )
        if p.code is DType.I4X2 and raised:  # two's complement of 4 bits, 8 more
            found.append(T.bitwise_xor(nibbles, splat_u32(0x08080808)))
        else:
            found.append(_looked_up(p, nibbles, CodedRow.raised(p) if raised else 0))
    return found


def _looked_up(p: Packing, nibbles, more: int):
    unit = 2 if p.code is DType.F4E2M1X2 else 1
    bytes_ = [int(v * unit) + more for v in NIBBLE_VALUES[p.code]]
    table = T.Shuffle([T.int8(b) for b in bytes_ * 4], list(range(4 * LANES)))
    name = "llvm.x86.avx512.pshuf.b.512"
    found = T.call_llvm_pure_intrin("int8x64", name, table, T.reinterpret("int8x64", nibbles))
    return T.reinterpret("uint32x16", found)


def _call(name: str, *args) -> None:
    T.evaluate(T.call_extern("int32", f"dsv4c_codes_{name}", *args))
