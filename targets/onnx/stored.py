"""Writes weights into the artifact and declares them as ONNX external data that lies in the artifact itself.

Where a tensor lies and what the file will be called is known only when the artifact is opened: until then the
model carries marks, which the runtime overwrites with as many characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import Array, DType, decode
from dsv4c.ir.graph import Op
from dsv4c.ir.weights import TensorStore, WeightExpr, materialise, stack, transpose
from dsv4c.runtime.container import ArtifactWriter

LOCATION_MARK = "@location@".ljust(258, "@")
"""Stands for the file; room for "./" and the longest name that usual file systems allow, 255 bytes."""

BAND = 1 << 25
"""Bytes of decoded rows made at a time."""


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
    expr: WeightExpr, name: str, index: int, store: TensorStore, writer: ArtifactWriter, where: str
) -> Stored:
    """Stream one weight into the artifact, as f32 or as the integers it is; `index` counts the calls.

    Raises:
        TargetError: the weight is neither of floats nor of 8-bit or 32-bit integers.
    """
    if not expr.dtype.is_float and expr.dtype not in _INTEGERS:
        raise TargetError(f"cannot store {expr.dtype.value}", where=where, allowed="floats, i32, i8")
    dtype = DType.F32 if expr.dtype.is_float else expr.dtype
    element = TensorProto.FLOAT if expr.dtype.is_float else _INTEGERS[dtype]
    writer.add_tensor(name, dtype.value, expr.shape, _pieces(expr, store))
    return Stored(name, index, element, expr.shape, dtype.itemsize * prod(expr.shape))


def transposed(expr: WeightExpr) -> WeightExpr:
    """The last two axes swapped, matrix by matrix, so that no more than one is held."""
    if expr.op == "stack":
        return stack(tuple(transpose(x) for x in expr.args))
    return transpose(expr)


def _pieces(expr: WeightExpr, store: TensorStore) -> Iterator[Array]:
    """The decoded rows in order: one entry of a stack, and of that `BAND` bytes, at a time."""
    if expr.op in ("stack", "concat"):
        for arg in expr.args:
            yield from _pieces(arg, store)
        return
    raw = np.atleast_1d(materialise(expr, store))
    step = max(1, BAND // max(1, 4 * prod(raw.shape[1:])))
    for start in range(0, raw.shape[0], step):
        rows = decode(raw[start : start + step], expr.dtype)
        yield np.ascontiguousarray(rows, np.float32 if expr.dtype.is_float else expr.dtype.storage)
