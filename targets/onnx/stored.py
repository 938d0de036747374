"""Writes weights into the artifact and declares them as ONNX external data that lies in the artifact itself.

Where a tensor lies and what the file will be called is known only when the artifact is opened: until then the
model carries marks, which the runtime overwrites with as many characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import Array, DType
from dsv4c.ir.graph import Op
from dsv4c.ir.weights import TensorStore, WeightExpr, stack, transpose
from dsv4c.runtime.container import ArtifactWriter

from .pieces import code_pieces, pieces

LOCATION_MARK = "@location@".ljust(258, "@")
"""Stands for the file; room for "./" and the longest name that usual file systems allow, 255 bytes."""

SCALES = ".scales"
"""Behind the name of the codes they belong to."""


def offset_mark(index: int) -> str:
    """Stands for the offset of tensor `index` of meta["onnx"]["tensors"]; as wide as the largest offset."""
    return f"@offset:{index}@".ljust(20, "@")


@dataclass(frozen=True)
class Stored:
    """A tensor of the artifact as ONNX sees it.

    Attributes:
        index: its place in meta["onnx"]["tensors"].
        element: TensorProto code.
    """

    name: str
    index: int
    element: int
    shape: tuple[int, ...]
    nbytes: int

    def declare(self, name: str = "", shape: tuple[int, ...] = ()) -> TensorProto:
        """The initializer; another shape may stand over the same bytes under another name."""
        tensor = TensorProto(
            name=name or self.name, data_type=self.element, dims=shape or self.shape,
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        place = {"location": LOCATION_MARK, "offset": offset_mark(self.index), "length": str(self.nbytes)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        return tensor


def stored_bytes(op: Op) -> int:
    """Bytes of a `weight` op in the artifact."""
    assert op.weight is not None
    return 4 * prod(op.weight.shape)


_INTEGERS = {DType.I32: TensorProto.INT32, DType.I8: TensorProto.INT8}


def store_weight(
    expr: WeightExpr, name: str, index: int, store: TensorStore, writer: ArtifactWriter, where: str,
    half: bool = False,
) -> Stored:  # fmt: skip
    """Stream one weight into the artifact, as f32 or as the integers it is; `index` counts the calls.

    Args:
        half: keep FP16 numbers as they are.

    Raises:
        TargetError: the weight is neither of floats nor of 8-bit or 32-bit integers.
    """
    if not expr.dtype.is_float and expr.dtype not in _INTEGERS:
        raise TargetError(f"cannot store {expr.dtype.value}", where=where, allowed="floats, i32, i8")
    if half and expr.dtype is DType.F16:
        numbers = (piece.astype(np.float16) for piece in pieces(expr, store))  # which they are
        writer.add_tensor(name, expr.dtype.value, expr.shape, numbers)
        return Stored(name, index, TensorProto.FLOAT16, expr.shape, expr.nbytes)
    dtype = DType.F32 if expr.dtype.is_float else expr.dtype
    element = TensorProto.FLOAT if expr.dtype.is_float else _INTEGERS[dtype]
    writer.add_tensor(name, dtype.value, expr.shape, pieces(expr, store))
    return Stored(name, index, element, expr.shape, dtype.itemsize * prod(expr.shape))


_CODES = {
    DType.I8: TensorProto.INT8, DType.F8E4M3: TensorProto.FLOAT8E4M3FN, DType.F4E2M1X2: TensorProto.UINT8,
    DType.F8E4M3FNUZ: TensorProto.FLOAT8E4M3FNUZ, DType.F8E8M0: TensorProto.UINT8,
    DType.F32: TensorProto.FLOAT,
}  # fmt: skip
"""Types of codes and scales -> what ONNX is told; pairs of E2M1, and E8M0, are bytes."""


def store_codes(
    codes: WeightExpr, scales: WeightExpr, name: str, index: int, store: TensorStore, writer: ArtifactWriter,
    as_bytes: bool = False,
) -> tuple[Stored, Stored]:  # fmt: skip
    """Stream codes under `name` and after them their scales, which takes the next index; bits stay bits.

    Every matrix is read once; of the scales of a weight all are held.

    Args:
        as_bytes: declare codes of 8-bit floats as bytes, for nodes that take no such type.
    """
    made: list[Array] = []
    writer.add_tensor(name, codes.dtype.value, codes.shape, code_pieces(codes, scales, store, made))
    writer.add_tensor(name + SCALES, scales.dtype.value, scales.shape, made)
    element = TensorProto.UINT8 if as_bytes and codes.dtype.is_float else _CODES[codes.dtype]
    return (
        Stored(name, index, element, codes.shape, codes.nbytes),
        Stored(name + SCALES, index + 1, _CODES[scales.dtype], scales.shape, scales.nbytes),
    )


def transposed(expr: WeightExpr) -> WeightExpr:
    """The last two axes swapped, matrix by matrix, so that no more than one is held."""
    if expr.op == "stack":
        return stack(tuple(transpose(x) for x in expr.args))
    return transpose(expr)
