"""Layouts of packed weights for kernels that decode in registers: words of codes by lane, scales by row.

Weight operations on raw codes and scales, and the wish not to have any; moves bytes, decodes nothing. NaN
codes are refused, because kernels decode without looking for them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4c.errors import CompileError

from .dtypes import Array, DType
from .expr import WeightExpr, describe, expect

WORD = 4
"""Bytes of a word: the codes of one row and of consecutive columns, the even ones in the low half."""

_NAN: dict[DType, Callable[[Array], Array]] = {
    DType.F8E4M3: lambda a: (a.view(np.uint8) & 0x7F) == 0x7F,
    DType.F8E4M3FNUZ: lambda a: a.view(np.uint8) == 0x80,
    DType.F8E8M0: lambda a: a.view(np.uint8) == 0xFF,
    DType.BF16: lambda a: (a.view(np.uint16) & 0x7FFF) > 0x7F80,
    DType.F32: np.isnan,
}


def lane_words(x: WeightExpr, width: int) -> WeightExpr:
    """[n, b] codes of s = 1 or 2 bytes -> [ceil(n/width), ceil(b s/4), width, 4/s]: panels of words, k-major.

    One load of 64 bytes holds four bytes of codes of each of 16 rows. In a word the codes of even columns
    fill the low half and those of odd columns the high half, both in order: so equal shifts bring two
    neighbouring columns into the halves of a lane, as instructions take them that multiply pairs. Padding is
    zero, and code 0 is 0.
    """
    expect(len(x.shape) == 2 and x.dtype.itemsize <= 2, "lane_words takes codes of one or two bytes", x)
    n, b = x.shape
    per_word = WORD // x.dtype.itemsize
    shape = (-(-n // width), -(-b // per_word), width, per_word)
    return WeightExpr("lane_words", (x,), (("width", width),), x.dtype, shape)


def row_scales(x: WeightExpr, rows: int, high: int) -> WeightExpr:
    """[ceil(rows/high), c] scales of bands of `high` rows -> [rows, c], a line for every row."""
    fits = len(x.shape) == 2 and high > 0 and x.shape[0] == -(-rows // high)
    expect(fits, f"row_scales needs a line for every {high} of {rows} rows", x)
    attrs = (("rows", rows), ("high", high))
    return WeightExpr("row_scales", (x,), attrs, x.dtype, (rows, x.shape[1]))


def unpacked(x: WeightExpr) -> WeightExpr:
    """The numbers of an f32 expression, to be stored as they are even where codes and scales would do."""
    expect(x.dtype is DType.F32, "unpacked takes float32 numbers", x)
    return WeightExpr("unpacked", (x,), (), x.dtype, x.shape)


def _refuse_nan(x: WeightExpr, codes: Array) -> None:
    is_nan = _NAN.get(x.args[0].dtype)
    if is_nan is not None and is_nan(codes).any():
        raise CompileError(
            f"{x.args[0].dtype.value} codes that are NaN cannot be stored packed", where=describe(x),
            hint='narrow_weights{storage="auto"} stores them as numbers',
        )  # fmt: skip


def _lane_words(x: WeightExpr, args: list[Array]) -> Array:
    if x.dtype is not DType.BF16:  # numbers may be NaN; codes are decoded without looking for it
        _refuse_nan(x, args[0])
    panels, words, width, per_word = x.shape
    padded = np.zeros((panels * width, words * per_word), args[0].dtype)
    padded[: args[0].shape[0], : args[0].shape[1]] = args[0]
    lanes = padded.reshape(panels, width, words, per_word).transpose(0, 2, 1, 3)
    if x.dtype in (DType.F4E2M1X2, DType.I4X2):
        pairs = lanes.view(np.uint8)
        return np.concatenate([_low_nibbles(pairs), _low_nibbles(pairs >> 4)], axis=-1).view(lanes.dtype)
    return np.concatenate([lanes[..., ::2], lanes[..., 1::2]], axis=-1)


def _low_nibbles(x: Array) -> Array:
    """u8 [..., 4] -> [..., 2]: the low nibbles, two to a byte, in order."""
    return np.asarray(np.bitwise_and(x[..., ::2], 15) | np.left_shift(x[..., 1::2], 4))


def _row_scales(x: WeightExpr, args: list[Array]) -> Array:
    _refuse_nan(x, args[0])
    high = x.attr("high")
    assert isinstance(high, int)
    return args[0] if high == 1 else np.repeat(args[0], high, axis=0)[: x.shape[0]]


LAYOUT_OPS: dict[str, Callable[[WeightExpr, list[Array]], Array]] = {
    "lane_words": _lane_words,
    "row_scales": _row_scales,
    "unpacked": lambda x, args: args[0],
}
"""The operations of this module and how they are evaluated."""
