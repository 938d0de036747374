"""Whether scales of FP4 weights lie near enough for products of codes, which a compiler must know.

Kernels turn E2M1 codes of a step of columns into E4M3 numbers with one scale for them all
(`kernels/codes.py`), which is exact for scales within 2^`SPREAD` of the largest. What lies further apart is
refused here, with the tensor and the row, when weights are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CompileError
from dsv4c.ir.weights import TensorStore, WeightExpr, materialise

Arr = npt.NDArray[Any]

SPREAD = 11
"""E2M1 numbers times 2^6 down to 2^-5 are normal E4M3 numbers."""
_GROUP = 16
"""Bytes of 32 codes, which have one scale."""


@dataclass(frozen=True)
class Near:
    """A weight of E2M1 codes u8 [..., rows, cols/2] with E8M0 scales u8 [..., rows, cols/32].

    Attributes:
        step: columns that a kernel multiplies at a time.
        where: its location.
    """

    codes: WeightExpr
    scales: WeightExpr
    step: int
    where: str


def check_near(near: Near, store: TensorStore) -> None:
    """Look at every scale; codes are read only of matrices where scales alone do not settle it.

    Raises:
        CompileError: scales of one step lie further than 2^`SPREAD` apart, and the small one's codes are not
        all zero.
    """
    each = near.step // 32
    for codes, scales in zip(_matrices(near.codes), _matrices(near.scales), strict=True):
        exponents = materialise(scales, store).view(np.uint8).reshape(-1, scales.shape[-1]).astype(np.int16)
        steps = _by(exponents, each, -1)
        below = np.where(steps < 0, 0, steps.max(axis=-1, keepdims=True) - steps)
        if int(below.max(initial=0)) <= SPREAD:
            continue
        pairs = materialise(codes, store).view(np.uint8).reshape(-1, codes.shape[-1])
        used: Arr = (_by(pairs & 0x77, _GROUP, 0) != 0).any(axis=-1)
        below = np.where(_by(used, each, False), below, 0)
        if int(below.max(initial=0)) > SPREAD:
            row = int(np.argmax(below.max(axis=(1, 2))))
            raise CompileError(
                f"in row {row} scales of {near.step} columns lie 2^{int(below.max())} apart",
                where=near.where, allowed=f"2^{SPREAD} in products of codes",
                hint="compile with --numerics bf16",
            )  # fmt: skip


def _by(rows: Arr, count: int, fill: int) -> Arr:
    """[rows, n] -> [rows, ceil(n/count), count]."""
    short = -rows.shape[1] % count
    return np.pad(rows, ((0, 0), (0, short)), constant_values=fill).reshape(len(rows), -1, count)


def _matrices(x: WeightExpr) -> Iterator[WeightExpr]:
    """The parts that a stack or a join is made of, one after the other."""
    if x.op in ("stack", "concat"):
        for arg in x.args:
            yield from _matrices(arg)
    else:
        yield x
