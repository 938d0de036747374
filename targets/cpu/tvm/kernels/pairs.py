"""Stored codes as pairs of BF16 numbers in 32-bit lanes, exactly: for `dot`.

A lane holds two neighbouring columns of one row, the even one low; `lane_words` puts their codes so that one
shift serves both halves. Codes of 4 bits and E4M3 are looked up, others pass through float32. Scales that are
powers of two are taken off the exponents of numbers that the tables hold as large as they can be: saturating
subtraction leaves zero alone. Needs AVX-512 BW, and `by_words` AVX-512 VBMI.
"""

# TIR expressions have no static types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np
from tvm.script import tirx as T

from dsv4c.ir.dtypes import DType

from .packing import NIBBLE_VALUES, Packing, Simd
from .vec import LANES, ramp, splat_u32

_HALVES = 2 * LANES
_E4M3 = (DType.F8E4M3, DType.F8E4M3FNUZ)
_LARGEST = 254
"""Exponent field of the largest BF16 numbers."""


def folds(p: Packing) -> bool:
    """Whether every code times its block scale is a BF16 number: 8 significant bits, exponents of float32."""
    return p.scale is DType.F8E8M0 or (p.scale is DType.F8E4M3 and p.code is DType.F4E2M1X2)


def fold(p: Packing, buffer, at):
    """16 block scales in the form that `pair` takes them."""
    if not by_exponent(p):
        return p.block_scale(buffer, at)
    top, bottom = _exponents(p)
    code = T.cast(buffer[ramp(at)], "uint32x16")
    # A scale beyond what the exponents have room for counts as the last one that has: 2^-117 or 2^119 for
    # E4M3.
    code = T.min(T.max(code, splat_u32(top - bottom)), splat_u32(top))
    lower = T.shift_left(splat_u32(top) - code, splat_u32(7))
    return T.bitwise_or(lower, T.shift_left(lower, splat_u32(16)))


def whole_scale(p: Packing, buffer, at):
    """16 block scales as float32, for sums of codes as they are; no further than `fold` reaches."""
    top, bottom = _exponents(p)
    code = T.cast(buffer[ramp(at)], "uint32x16")
    code = T.min(T.max(code, splat_u32(top - bottom)), splat_u32(top))
    return T.reinterpret("float32x16", T.shift_left(code, splat_u32(23)))


def pairs(p: Packing, word, scale, columns: int):
    """The pairs of a loaded word's first `columns` columns, in order.

    `scale` from `fold`; None without, or where sums are scaled instead.
    """
    if by_words(p):
        return _look_up_words(p, word, scale)[: columns // 2]
    return [_pair(p, word, i, scale) for i in range(columns // 2)]


def _pair(p: Packing, word, i: int, scale):
    """Columns 2 i and 2 i + 1 of a loaded word."""
    if p.code is DType.BF16:
        return word
    if scale is None or by_exponent(p):
        if p.code in NIBBLE_VALUES:
            return _look_up_nibbles(p, T.shift_right(word, splat_u32(4 * i)), scale)
        if p.code in _E4M3:
            return _look_up_bytes(p, T.shift_right(word, splat_u32(8 * i)), scale)
    low, high = (p.decode(word, 2 * i + j) for j in (0, 1))
    if scale is not None:
        low, high = low * scale, high * scale
    low, high = (T.reinterpret("uint32x16", x) for x in (low, high))
    return T.bitwise_or(T.shift_right(low, splat_u32(16)), T.bitwise_and(high, splat_u32(0xFFFF0000)))


def by_exponent(p: Packing) -> bool:
    """Whether a scale moves exponents and nothing else."""
    return p.scale is DType.F8E8M0 and (p.code in _E4M3 or p.code is DType.F4E2M1X2)


def _exponents(p: Packing) -> tuple[int, int]:
    """The E8M0 code that stands for tables as they are, and how far below it numbers keep their sign."""
    values = np.abs(_values(p))
    largest, least = (int(np.frexp(v)[1]) - 1 for v in (values.max(), values[values > 0].min()))
    top = _LARGEST - largest
    return top, top + least - 1


def _values(p: Packing):
    """The number of every code of 4 bits, minus zero as zero, or of every E4M3 code without its sign."""
    if p.code in NIBBLE_VALUES:
        return np.array(NIBBLE_VALUES[p.code], np.float32) + np.float32(0)
    code = np.arange(128)
    bias = 8 if p.code is DType.F8E4M3FNUZ else 7
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - bias - 3), np.ldexp(mantissa, -bias - 2))
    if p.code is DType.F8E4M3:
        value[127] = 0  # NaN, which no weight holds
    return value.astype(np.float32)


def _bits(p: Packing, values, scale):
    """Bits of BF16 numbers; with a scale raised so that its code `top` stands for them as they are raised."""
    if scale is not None and by_exponent(p):
        values = np.ldexp(values, _exponents(p)[0] - 127)
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _table(p: Packing, values, scale):
    bits = _bits(p, values, scale).view(np.int16)
    return T.Shuffle([T.int16(int(b)) for b in bits], list(range(_HALVES)))


def _lowered(halves, scale):
    """BF16 numbers in halves times a scale from `fold`; zero stays zero, other signs are not reached."""
    if scale is None:
        return T.reinterpret("uint32x16", halves)
    both = [T.reinterpret("uint16x32", x) for x in (halves, scale)]
    return T.reinterpret("uint32x16", T.call_llvm_pure_intrin("uint16x32", "llvm.usub.sat", *both))


def _look_up_nibbles(p: Packing, word, scale):
    """The lowest nibble of each half; five bits are looked at, so the table stands there twice."""
    table = _table(p, np.tile(_values(p), 2), scale)
    index = T.reinterpret("int16x32", word)
    name = "llvm.x86.avx512.permvar.hi.512"
    return _lowered(T.call_llvm_pure_intrin("int16x32", name, table, index), scale)


def _look_up_bytes(p: Packing, word, scale):
    """The lowest byte of each half as E4M3: six bits look into two tables, the seventh chooses which two."""
    tables = [_table(p, part, scale) for part in _values(p).reshape(4, _HALVES)]
    index = T.reinterpret("int16x32", word)
    name = "llvm.x86.avx512.vpermi2var.hi.512"
    small, large = (
        T.call_llvm_pure_intrin("int16x32", name, a, index, b) for a, b in (tables[:2], tables[2:])
    )
    is_large = T.bitwise_and(index, T.broadcast(T.int16(64), _HALVES)) != T.broadcast(T.int16(0), _HALVES)
    sign = T.bitwise_and(T.shift_left(word, splat_u32(8)), splat_u32(0x80008000))
    return T.bitwise_or(_lowered(T.Select(is_large, large, small), scale), sign)


def _look_up_words(p: Packing, word, scale):
    """Both pairs of four bytes as E4M3: tables of low and of high bytes, in which seven bits are looked up.

    Needs AVX-512 VBMI.
    """
    bits = _bits(p, _values(p), scale)
    low, high = (T.bind(_bytes_of(part, word)) for part in (bits & 0xFF, bits >> 8))
    if scale is None:
        high = T.bind(T.bitwise_or(high, T.bitwise_and(word, splat_u32(0x80808080))))
        return [
            T.bitwise_or(_halves_left(high, 8), T.bitwise_and(low, splat_u32(0x00FF00FF))),
            T.bitwise_or(_halves_right(low, 8), T.bitwise_and(high, splat_u32(0xFF00FF00))),
        ]
    even = T.bitwise_or(_halves_left(high, 8), T.bitwise_and(low, splat_u32(0x00FF00FF)))
    odd = T.bitwise_or(_halves_right(low, 8), T.bitwise_and(high, splat_u32(0xFF00FF00)))
    signs = _halves_left(word, 8), word
    return [
        T.bitwise_or(_lowered(T.reinterpret("int16x32", x), scale), T.bitwise_and(s, splat_u32(0x80008000)))
        for x, s in zip((even, odd), signs, strict=True)
    ]


CHAINS = """
define <16 x i32> @dsv4c_low_bytes(<16 x i32> %high, <16 x i32> %low) {
  %r = call <16 x i32> asm "vpshldw $$8, $2, $1, $0", "=v,v,v"(<16 x i32> %high, <16 x i32> %low)
  ret <16 x i32> %r
}
"""
"""In each half the lower byte of the first over the upper byte of the second: LLVM would look bytes up."""


def by_words(p: Packing) -> bool:
    """Whether the codes of a word are looked up at once, by their bytes; scales can then wait for a sum."""
    return p.code in _E4M3 and p.simd in (Simd.AMX, Simd.AVX512_BF16) and (p.scale is None or by_exponent(p))


def chains(p: Packing, word):
    """A loaded word of E4M3 codes as the pair of its even columns and that of its odd ones, the first high.

    VDPBF16PS adds the high product first. Needs AVX-512 VBMI and VBMI2, and `CHAINS` to be imported.
    """
    bits = _bits(p, _values(p), None)
    index = T.bind(_ordered(word, (1, 3, 0, 2)))  # columns 2 3 0 1
    swapped = _ordered(word, (3, 1, 2, 0))
    high = T.bind(T.bitwise_or(_bytes_of(bits >> 8, index), T.bitwise_and(index, splat_u32(0x80808080))))
    low = T.bind(_bytes_of(bits & 0xFF, swapped))
    even = T.call_extern("uint32x16", "dsv4c_low_bytes", high, low)
    odd = T.bitwise_or(T.bitwise_and(high, splat_u32(0xFF00FF00)), T.bitwise_and(low, splat_u32(0x00FF00FF)))
    return even, odd


def _ordered(word, order):
    """The bytes of each lane in another order."""
    places = [4 * lane + b for lane in range(4) for b in order] * 4
    table = T.Shuffle([T.int8(b) for b in places], list(range(64)))
    name = "llvm.x86.avx512.pshuf.b.512"
    found = T.call_llvm_pure_intrin("int8x64", name, T.reinterpret("int8x64", word), table)
    return T.reinterpret("uint32x16", found)


def _bytes_of(values, index):
    """Seven bits of every byte looked up in 128 bytes."""
    signed = values.astype(np.uint8).view(np.int8).reshape(2, 64)
    first, second = (T.Shuffle([T.int8(int(b)) for b in part], list(range(64))) for part in signed)
    name, at = "llvm.x86.avx512.vpermi2var.qi.512", T.reinterpret("int8x64", index)
    return T.reinterpret("uint32x16", T.call_llvm_pure_intrin("int8x64", name, first, at, second))


def _halves_left(x, n: int):
    return _by_halves(x, lambda h: T.shift_left(h, T.broadcast(T.uint16(n), _HALVES)))


def _halves_right(x, n: int):
    return _by_halves(x, lambda h: T.shift_right(h, T.broadcast(T.uint16(n), _HALVES)))


def _by_halves(x, f):
    return T.reinterpret("uint32x16", f(T.reinterpret("uint16x32", x)))
