"""How a weight becomes arguments of a kernel: its codes and scales as they are stored, and what tells them
apart.

Knows layouts, not ops. Nothing is repacked: codes lie row by row, columns together, as in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Value
from dsv4c.ir.packed import packed_form
from dsv4c.ir.weights import WeightExpr

from .context import Context, Given, Ref

FORMS = {
    DType.F32: 0, DType.BF16: 1, DType.F8E4M3: 2, DType.F8E4M3FNUZ: 3, DType.I8: 4, DType.F4E2M1X2: 5,
    DType.I4X2: 6,
}  # fmt: skip
"""Element type of codes -> the number by which `kernels.decode` knows it."""
SCALES = {DType.F8E8M0: 1, DType.F8E4M3: 2, DType.F32: 3, DType.BF16: 4}

POINTER = {DType.F32: "*fp32", DType.BF16: "*bf16", DType.I8: "*i8"}
"""Pointer type of codes and scales; all others are bytes."""


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns] or [experts, rows, columns] as kernels take it.

    Attributes:
        constants: FORM, SCALE, HIGH, WIDE and TENSOR of the kernels.
        types: pointer types of codes (W) and scales (S).
        pack: values in one code.
        given: parameters w, scale, tensor_scale, SCOLS, SROWS and BAND.
        most: the widest step of columns that has one scale; 0 where steps may have any width.
    """

    constants: dict[str, int]
    types: dict[str, str]
    pack: int
    given: dict[str, Given]
    most: int

    def step(self, wanted: int) -> int:
        """Columns of a step."""
        return min(wanted, self.most) if self.most else wanted


def matrix(c: Context, value: Value) -> Matrix:
    """The stored form of a weight."""
    op = value.producer
    if op is None or op.weight is None:
        raise TargetError("this operand must be a weight", where=c.where)
    held = packed_form(op.weight) if op.weight.dtype is DType.F32 else None
    if held is None:
        return _plain(c, op.weight, c.weight(value))
    scheme = held.scheme
    assert scheme.scale is not None
    rows = held.codes.shape[-2]
    tensor, band = c.unused, 1
    if held.tensor_scale is not None:
        tensor = c.parameter(f"{op.loc}.tensor_scale", held.tensor_scale)
        band = rows // held.tensor_scale.shape[-1]
    constants = {
        "FORM": FORMS[held.codes.dtype], "SCALE": SCALES[held.scales.dtype], "HIGH": scheme.block[0],
        "WIDE": scheme.block[1], "TENSOR": int(held.tensor_scale is not None),
    }  # fmt: skip
    given: dict[str, Given] = {
        "w": c.parameter(op.loc, held.codes), "scale": c.parameter(f"{op.loc}.scale", held.scales),
        "tensor_scale": tensor, "SROWS": held.scales.shape[-2], "SCOLS": held.scales.shape[-1], "BAND": band,
    }  # fmt: skip
    types = {"W": pointer(held.codes), "S": pointer(held.scales)}
    in_sums = scheme.scale in (DType.F32, DType.BF16)
    return Matrix(constants, types, scheme.values_per_byte, given, scheme.block[1] if in_sums else 0)


def _plain(c: Context, expr: WeightExpr, ref: Ref) -> Matrix:
    constants = {"FORM": FORMS[expr.dtype], "SCALE": 0, "HIGH": 1, "WIDE": 0, "TENSOR": 0}
    given: dict[str, Given] = {
        "w": ref,
        "scale": c.unused,
        "tensor_scale": c.unused,
        "SROWS": 0,
        "SCOLS": 0,
        "BAND": 1,
    }
    return Matrix(constants, {"W": pointer(expr), "S": "*fp32"}, 1, given, 0)


def pointer(expr: WeightExpr) -> str:
    return POINTER.get(expr.dtype, "*u8")
