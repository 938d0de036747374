"""How rows of X reach the products of a packing: as float32, as BF16 pieces, or as INT8 codes with scales."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from dsv4c.ir.dtypes import DType

from .packing import NIBBLE_VALUES, Packing
from .tiles import row_length
from .vec import LANES, ramp, splat

BLOCK = 32
"""Columns of a row of X that share a scale."""
_LINE = 16
"""Words of a line of memory."""


@dataclass(frozen=True)
class Rows:
    """Rows of `groups` times k columns as products of a packing take them.

    Attributes:
        p: the packing; its pieces, or whether rows are codes, decide.
        k: columns of a product.
        groups: products that a row holds the columns of.
    """

    p: Packing
    k: int
    groups: int = 1

    @property
    def planes(self) -> int:
        """How often all rows are there: once for every piece."""
        return self.p.pieces or 1

    @property
    def dtype(self) -> str:
        """BF16 bits where pairs are multiplied, words of codes, or numbers."""
        return "uint32" if self.p.coded else "uint16" if self.p.pieces else "float32"

    @property
    def view(self) -> str:
        """What a product reads."""
        return "uint32" if self.p.coded or self.p.pieces else "float32"

    @property
    def stored(self) -> bool:
        """Whether rows are made for the product, as [planes,...,length]."""
        return self.p.coded or self.p.pieces > 0

    @property
    def length(self) -> int:
        """Elements from one row to the next."""
        if self.p.coded:
            return self.groups * CodedRow.of(self.p, self.k).words
        return row_length(self.p, self.groups * self.k)

    @property
    def words(self) -> int:
        """The same in elements of `view`."""
        return self.length // (2 if self.p.pieces else 1)

    @property
    def group(self) -> int:
        """Elements of `view` from one group of a row to the next."""
        if self.p.coded:
            return CodedRow.of(self.p, self.k).words
        return self.k // (2 if self.p.pieces else 1)

    def shape(self, *leading):
        """Of the buffer of rows, with these axes in front."""
        return (self.planes, *leading, self.length) if self.stored else (*leading, self.groups * self.k)


_RAISED = {DType.I8: 128, DType.I4X2: 8, DType.F4E2M1X2: 12}


@dataclass(frozen=True)
class CodedRow:
    """A row of k columns as 32-bit words: codes, four to a word, scales (f32), and what raising costs (i32).

    Codes of a word's columns are in the order of the stored matrix's bytes; blocks are filled up with zeros.

    Attributes:
        k: columns.
        nibbles: whether two words hold the columns of one stored word, as its low and its high nibbles.
        step: columns that share a sum of integers: a block, or a smaller block of the matrix.
        more: by how much products raise the matrix's codes.
    """

    k: int
    nibbles: bool
    step: int
    more: int

    @classmethod
    def of(cls, p: Packing, k: int) -> CodedRow:
        return cls(k, p.code in NIBBLE_VALUES, min(p.block or BLOCK, BLOCK), cls.raised(p))

    @staticmethod
    def raised(p: Packing) -> int:
        """What makes every code of a matrix, in `coded`'s bytes, zero or more."""
        return _RAISED[p.code]

    @property
    def blocks(self) -> int:
        return -(-self.k // BLOCK)

    @property
    def padded(self) -> int:
        return self.blocks * BLOCK

    @property
    def words(self) -> int:
        """From one row to the next: whole lines, and one more where rows would be a power of two apart."""
        used = self.padded // 4 + self.blocks + self.padded // self.step
        lines = -(-used // _LINE)
        return (lines + (lines % 8 == 0)) * _LINE

    def scale_at(self, column):
        """The word with the scale of a column."""
        return self.padded // 4 + column // BLOCK

    def raise_at(self, column):
        """The word with minus `more` times the sum of the codes of the step's columns."""
        return self.padded // 4 + self.blocks + column // self.step

    @property
    def order(self) -> list[int]:
        """For every byte of a block the column whose code it is."""
        word = [0, 4, 1, 5, 2, 6, 3, 7] if self.nibbles else [0, 2, 1, 3]
        return [at + c for at in range(0, BLOCK, len(word)) for c in word]


def store_codes(buffer, start, column, low, high, row: CodedRow) -> None:
    """Write a block of 32 columns from `column` on, two vectors of float32, into a row at buffer[start].

    Codes and scale are those of `codes_of`.
    """
    codes, scale = codes_of(low, high)
    bytes_ = T.Shuffle([T.cast(c, "int8x16") for c in codes], row.order)
    words = T.reinterpret(f"uint32x{BLOCK // 4}", bytes_)
    T.buffer_store(buffer, words, [T.ramp(start + column // 4, 1, BLOCK // 4)])
    T.buffer_store(buffer, T.reinterpret("uint32", scale), [start + row.scale_at(column)])
    totals = [T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add.v16i32", c) for c in codes]
    if row.step == BLOCK:
        totals = [totals[0] + totals[1]]
    for i, total in enumerate(totals):
        less = T.reinterpret("uint32", total * T.int32(-row.more))
        T.buffer_store(buffer, less, [start + row.raise_at(column) + i])


def codes_of(low, high):
    """A block of 32 numbers, two vectors of float32 -> (two vectors of int32 codes, the scale).

    By `round_values` of the rule int8 (`ir.meaning.quantise`): scale amax / 127 in FP32, ties to even.
    """
    larger = T.bind(T.max(_magnitude(low), _magnitude(high)))
    amax = T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax.v16f32", larger)
    scale = T.bind(amax / T.float32(127))
    by = splat(T.bind(T.if_then_else(scale == T.float32(0), T.float32(1), scale)))
    codes = [T.bind(T.cast(T.nearbyint(x / by), "int32x16")) for x in (low, high)]
    return codes, scale


def _magnitude(x):
    bits = T.bitwise_and(T.reinterpret("uint32x16", x), T.broadcast(T.uint32(0x7FFFFFFF), LANES))
    return T.reinterpret("float32x16", bits)


def block_of(buffer, at, columns: int):
    """Two vectors from buffer[at] on, of which `columns` are real; zeros behind them, whatever is there."""
    if columns == BLOCK:
        return buffer[ramp(at)], buffer[ramp(at + LANES)]
    numbers = [buffer[at + i] if i < columns else T.float32(0) for i in range(BLOCK)]
    return tuple(T.Shuffle(numbers[i : i + LANES], list(range(LANES))) for i in (0, LANES))
