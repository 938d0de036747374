"""Writes weights into the artifact and declares them as ONNX external data that lies in the artifact itself.

Where a tensor lies and what the file will be called is known only when the artifact is opened: until then the
model carries marks, which the runtime overwrites with as many characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import Array, DType, decode
from dsv4c.ir.graph import Op
from dsv4c.ir.weights import TensorStore, WeightExpr, materialise
from dsv4c.runtime.container import ArtifactWriter

LOCATION_MARK = "@location@".ljust(258, "@")
"""Stands for the file; room for "./" and the longest name that usual file systems allow, 255 bytes."""

BAND = 1 << 25
"""Bytes of decoded rows made at a time."""


def offset_mark(index: int) -> str:
    """Stands for the offset of tensor `index` of meta["onnx"]["tensors"]; as wide as the largest offset."""
    return f"@offset:{index}@".ljust(20, "@")


def stored_bytes(op: Op) -> int:
    """Bytes of a `weight` op in the artifact."""
    assert op.weight is not None
    return 4 * prod(op.weight.shape)


def store_weight(op: Op, name: str, index: int, store: TensorStore, writer: ArtifactWriter) -> TensorProto:
    """Stream one `weight` op into the artifact, as f32 or i32, and declare it; `index` counts the calls.

    Raises:
        TargetError: the weight is neither of floats nor of 32-bit integers.
    """
    expr = op.weight
    assert expr is not None
    if not expr.dtype.is_float and expr.dtype is not DType.I32:
        raise TargetError(f"cannot store {expr.dtype.value}", where=op.loc, allowed="floats, i32")
    kind, proto = ("f32", TensorProto.FLOAT) if expr.dtype.is_float else ("i32", TensorProto.INT32)
    writer.add_tensor(name, kind, expr.shape, _pieces(expr, store))
    tensor = TensorProto(name=name, data_type=proto, dims=expr.shape, data_location=TensorProto.EXTERNAL)
    place = {"location": LOCATION_MARK, "offset": offset_mark(index), "length": str(stored_bytes(op))}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


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
        yield np.ascontiguousarray(rows, np.float32 if expr.dtype.is_float else np.int32)
