"""How kernels read stored matrices: the packing of codes and scales, and their decoding in registers.

Vector expressions over 16 lanes, one lane per output row, or over one. Portable but for the table look-ups,
which every arch of the target has under its own name. Knows formats and lanes; no op, no loop.
"""

# TIR expressions have no static types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"
from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from tvm.script import tirx as T

from dsv4c.ir.dtypes import E2M1, DType
from dsv4c.targets.cpu.tuning import DEFAULT, Tuning

from .vec import LANES, ramp


class Simd(enum.Enum):
    """The vector instructions that make a difference here: how 16 entries are looked up."""

    NONE = "none"
    SSSE3 = "ssse3"
    AVX2 = "avx2"
    AVX512 = "avx512"
    AVX512_BF16 = "avx512_bf16"
    AMX = "amx"
    NEON = "neon"


_TIR = {DType.F32: "float32", DType.BF16: "uint16", DType.I8: "int8"}
NIBBLE_VALUES: dict[DType, tuple[float, ...]] = {
    DType.F4E2M1X2: tuple(float(v) for v in E2M1),
    DType.I4X2: (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1),
}
"""The number of every code of 4 bits."""
_LOOKUPS = {
    Simd.AVX2: (32, "llvm.x86.avx2.pshuf.b"),
    Simd.SSSE3: (16, "llvm.x86.ssse3.pshuf.b.128"),
    Simd.NEON: (16, "llvm.aarch64.neon.tbl1.v16i8"),
}
"""Bytes that one instruction looks up in a table of 16, and its name."""

WORD = 4
"""Bytes of one lane's word: the codes of one row and of consecutive columns (`ir.layouts.lane_words`)."""
STEP = 64
"""Most columns in one partial sum."""


@dataclass(frozen=True)
class Packing:
    """The storage of a matrix [n, k] in panels of `width` rows, as kernels read it.

    Plain F32 numbers are `[panels, k, width]`, codes `[panels, words, width, 4]` bytes or, of BF16,
    `[panels, words, width, 2]` (`ir.layouts.lane_words`); block scales are `[panels, blocks, width]`, row
    scales `[panels, 1, width]` f32. A value is code * block scale * row scale.

    Attributes:
        code: element type of the codes.
        scale: element type of the block scales, None without.
        block: columns that share a block scale; a multiple of 8.
        rows: whether there are row scales.
        simd: the arch's vector instructions.
        pieces: 0 where rows of X are float32; else products are of pairs of BF16 numbers, by the instruction
            for them, and every number of X comes as that many BF16 numbers whose sum it is: 1 where it is one
            itself, 3 for any.
        coded: whether rows of X come as INT8 codes with a scale for every 32 columns (`rows.CodedRow`).
        tuning: what differs between processors, but for results.
    """

    code: DType
    scale: DType | None = None
    block: int = 0
    rows: bool = False
    simd: Simd = Simd.NONE
    pieces: int = 0
    coded: bool = False
    tuning: Tuning = DEFAULT

    @property
    def plain(self) -> bool:
        """Whether the codes are the values."""
        return self.code in (DType.F32, DType.BF16)

    @property
    def per_word(self) -> int:
        """Columns per lane of one load."""
        match self.code:
            case DType.F32:
                return 1
            case DType.BF16:
                return 2
        return 2 * WORD if self.code in NIBBLE_VALUES else WORD

    @property
    def per_byte(self) -> int:
        """Codes in one stored element."""
        return 2 if self.code in NIBBLE_VALUES else 1

    @property
    def step(self) -> int:
        """Columns summed before their scale is applied."""
        return min(self.block or STEP, STEP)

    @property
    def wide(self) -> bool:
        """Whether four vectors of six rows fit the registers."""
        return self.simd in (Simd.AVX512, Simd.AVX512_BF16, Simd.AMX)

    @property
    def unit(self) -> float:
        """What `decode` gives counts in this unit; block scales come multiplied by it."""
        return 0.5 if self.code is DType.F4E2M1X2 and self.simd in _LOOKUPS else 1.0

    @property
    def dtype(self) -> str:
        """TIR element type of the codes."""
        return _TIR.get(self.code, "uint8")

    @property
    def scale_dtype(self) -> str:
        """TIR element type of the block scales."""
        return "float32" if self.scale is None else _TIR.get(self.scale, "uint8")

    def words(self, k: int) -> int:
        """Loads that cover k columns of 16 rows."""
        return -(-k // self.per_word)

    def blocks(self, k: int) -> int:
        """Block scales of a row of k columns."""
        return -(-k // self.block) if self.scale else 1

    def code_shape(self, panels: int, k: int, width: int) -> tuple[int, ...]:
        if self.code is DType.F32:
            return (panels, k, width)
        return (panels, self.words(k), width, self.per_word // self.per_byte)

    def scale_shape(self, panels: int, k: int, width: int) -> tuple[int, ...]:
        """[1] of something never read where there are none; so for `row_shape`."""
        return (panels, self.blocks(k), width) if self.scale else (1,)

    def row_shape(self, panels: int, width: int) -> tuple[int, ...]:
        return (panels, 1, width) if self.rows else (1,)

    def load(self, buffer, word, vec, width: int):
        """Lanes 16 vec to 16 vec + 15 of a word row of a flat buffer, undecoded."""
        at = word * width + vec * LANES
        if self.code is DType.F32:
            return buffer[ramp(at)]
        elements = self.per_word // self.per_byte
        return T.reinterpret("uint32x16", buffer[T.ramp(at * elements, 1, LANES * elements)])

    def decode(self, word, j):
        """Column j of loaded lanes as float32, in `unit`s."""
        place = j // 2 + j % 2 * (self.per_word // 2)  # even columns lie in the low half of a word
        if self.code in NIBBLE_VALUES and self.simd is not Simd.NONE:
            return self._look_up(word, place)
        return number(self.code, word, place, LANES)

    def _look_up(self, word, j):
        values = np.array(NIBBLE_VALUES[self.code], np.float32)
        if self.wide:
            table = T.Shuffle([T.float32(float(v)) for v in values], list(range(LANES)))
            index = _signed(_right(word, 4 * j, LANES), LANES)
            return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", table, index)
        if self.code is DType.I4X2:  # converting costs no more than looking up
            return number(self.code, word, j, LANES)
        # The looked up bytes are integers: column j lands in byte j // 2 of the even or the odd columns.
        nibbles = _right(word, 4 * (j % 2), LANES) & _u32(0x0F0F0F0F, LANES)
        bytes_ = _table_bytes((values / self.unit).astype(np.int8), nibbles, self.simd)
        return number(DType.I8, bytes_, j // 2, LANES)

    def block_scale(self, buffer, at):
        """16 block scales as float32, times `unit`."""
        raw = scale_number(self.scale, buffer[ramp(at)], LANES)
        return raw if self.unit == 1 else raw * _f32(self.unit, LANES)


def number(code: DType, word, j, lanes: int):
    """Code j of words (uint32 lanes) as float32; one lane takes and gives scalars. Exact; no NaN codes."""
    match code:
        case DType.F32:
            return word
        case DType.BF16:
            return _float(_left(_widen(word, lanes), 16, lanes), lanes) if j == 0 else _high(word, lanes)
        case DType.I8:
            return _integer(_left(word, 24 - 8 * j, lanes), 24, lanes)
        case DType.I4X2:
            return _integer(_left(word, 28 - 4 * j, lanes), 28, lanes)
        case DType.F4E2M1X2:
            return _e2m1(_left(word, 28 - 4 * j, lanes), lanes)
        case _:
            return _e4m3(_left(word, 24 - 8 * j, lanes), code, lanes)


def scale_number(scale: DType | None, raw, lanes: int):
    """Loaded scales as float32. E8M0 code 0 is the subnormal 2^-127; there is no 255."""
    match scale:
        case DType.F8E8M0:
            return _float(T.max(_left(_widen(raw, lanes), 23, lanes), _u32(0x400000, lanes)), lanes)
        case DType.F8E4M3:
            return number(scale, _widen(raw, lanes), 0, lanes)
        case _:
            return raw if scale is None else number(scale, raw, 0, lanes)


def _e4m3(top, code: DType, lanes: int):
    """E4M3 in the top byte: its bits where float32 has them, then the bias made up for.

    Subnormal codes are subnormal floats for a moment, which costs little because they are rare.
    """
    bits = _unsigned(_spread(top, 4, lanes), lanes) & _u32(0x87F00000, lanes)
    return _float(bits, lanes) * _f32(2.0**119 if code is DType.F8E4M3FNUZ else 2.0**120, lanes)


def _e2m1(top, lanes: int):
    """E2M1 in the top nibble, where 0.5, its subnormal number, is common.

    With the bias put in, 0 and 0.5 come out as g = 0.5 and 0.75, for which 2 g - 1 is right; it is too large
    for all the others.
    """
    magnitude = _right(top, 6, lanes) & _u32(0x01C00000, lanes)
    g = _float(magnitude + _u32(126 << 23, lanes), lanes)
    value = T.min(g, g + g - _f32(1, lanes))
    return _float(_unsigned(value, lanes) | (top & _u32(0x80000000, lanes)), lanes)


def _table_bytes(values, indices, simd: Simd):
    """Every byte of `indices` (uint32x16, bytes 0 to 15) replaced by that entry of 16 int8."""
    size, name = _LOOKUPS[simd]
    parts = [T.reinterpret("int8x64", indices)]
    while 64 // len(parts) > size:
        half = f"int8x{32 // len(parts)}"
        parts = [take(half, p) for p in parts for take in (T.vectorlow, T.vectorhigh)]
    entries = [T.int8(int(values[i % 16])) for i in range(size)]
    table = T.Shuffle(entries, list(range(size)))
    parts = [T.call_llvm_pure_intrin(f"int8x{size}", name, table, p) for p in parts]
    while len(parts) > 1:
        whole = f"int8x{128 // len(parts)}"
        parts = [T.vectorcombine(whole, a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return T.reinterpret("uint32x16", parts[0])


def _type(name: str, lanes: int) -> str:
    return name if lanes == 1 else f"{name}x{lanes}"


def _all(x, lanes: int):
    return x if lanes == 1 else T.broadcast(x, lanes)


def _u32(x, lanes: int):
    return _all(T.cast(x, "uint32"), lanes)


def _f32(x: float, lanes: int):
    return _all(T.float32(x), lanes)


def _widen(x, lanes: int):
    return T.cast(x, _type("uint32", lanes))


def _left(x, n, lanes: int):
    """x << n on uint32 lanes; n is a constant or, in an unrolled loop, an expression."""
    return T.shift_left(x, _u32(n, lanes))


def _right(x, n, lanes: int):
    return T.shift_right(x, _u32(n, lanes))


def _spread(x, n: int, lanes: int):
    """x >> n with copies of the sign moving in: int32 lanes."""
    return T.shift_right(_signed(x, lanes), _all(T.int32(n), lanes))


def _integer(top, n: int, lanes: int):
    return T.cast(_spread(top, n, lanes), _type("float32", lanes))


def _high(word, lanes: int):
    """The upper 16 bits as BF16."""
    return _float(word & _u32(0xFFFF0000, lanes), lanes)


def _float(x, lanes: int):
    return T.reinterpret(_type("float32", lanes), x)


def _signed(x, lanes: int):
    return T.reinterpret(_type("int32", lanes), x)


def _unsigned(x, lanes: int):
    return T.reinterpret(_type("uint32", lanes), x)
