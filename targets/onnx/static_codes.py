"""Weights held as codes and scales, in fixed shapes: how they become FLOAT numbers where they are used.

Every step is exact. Codes that a consumer has a type for are cast; bytes for which it has none (E2M1 pairs,
E4M3 of experts, which are gathered, E8M0 scales) are looked up in a table of 256 numbers or pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.formats import Scheme

from .graph import V

if TYPE_CHECKING:
    from .static import StaticContext


def decoded(g: StaticContext, codes: V, scales: V, scheme: Scheme) -> V:
    """Codes [..., n, stored columns] and scales [..., R, C] of as many matrices -> FLOAT [..., n, k]."""
    return _scaled(g, _numbers(g, codes, scheme.code), _numbers(g, scales, DType.F8E8M0), scheme)


def table(g: StaticContext, dtype: DType) -> V:
    """The numbers of all 256 bytes of a type, FLOAT [256], or [256,2] of a type of two in a byte."""
    numbers = np.asarray(decode(np.arange(256, dtype=np.uint8)[:, None], dtype), np.float32)
    return g.constant(numbers if numbers.shape[1] > 1 else numbers[:, 0])


def by_row(g: StaticContext, scales: V, scheme: Scheme, n: int, k: int) -> V:
    """E8M0 scales [R,C] of a matrix [n,k] -> FLOAT [n,C], those of its rows."""
    numbers = _numbers(g, scales, DType.F8E8M0)
    (rows, columns), high = g.shape_of(scales), scheme.tile(n, k)[0]
    if high == 1:
        return numbers
    spread = g.op("Expand", g.op("Reshape", numbers, [rows, 1, columns]), [rows, high, columns])
    return g.op("Slice", g.op("Reshape", spread, [rows * high, columns]), [0], [n], [0])


def _numbers(g: StaticContext, stored: V, dtype: DType) -> V:
    """FLOAT numbers of codes or scales; `dtype` says what bytes mean."""
    element = g.element_of(stored)
    if element == TensorProto.FLOAT:
        return stored
    if element != TensorProto.UINT8:
        return g.op("Cast", stored, to=TensorProto.FLOAT)
    sizes = g.shape_of(stored)
    found = g.op("Gather", table(g, dtype), g.op("Cast", stored, to=g.index), axis=0)
    return g.op("Reshape", found, [*sizes[:-1], -1])


def _scaled(g: StaticContext, numbers: V, scales: V, scheme: Scheme) -> V:
    """Every tile of a matrix times its scale; the last tiles of an axis may be cut."""
    *lead, n, k = g.shape_of(numbers)
    rows, columns = g.shape_of(scales)[-2:]
    high, wide = (min(a, b) for a, b in zip(scheme.tile(n, k), (n, k), strict=True))
    if high in (1, n) and columns == 1:
        return g.op("Mul", numbers, scales)
    spread = g.op("Reshape", scales, [*lead, rows, 1, columns, 1])
    if (rows * high, columns * wide) == (n, k):
        tiles = g.op("Mul", g.op("Reshape", numbers, [*lead, rows, high, columns, wide]), spread)
        return g.op("Reshape", tiles, [*lead, n, k])
    every = g.op("Expand", spread, [*lead, rows, high, columns, wide])
    every = g.op("Reshape", every, [*lead, rows * high, columns * wide])
    axes = [len(lead), len(lead) + 1]
    return g.op("Mul", numbers, g.op("Slice", every, [0, 0], [n, k], axes))
