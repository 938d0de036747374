"""The program that runs kernels on the CPU in Triton's interpreter: `python interpret.py REQUEST.json`.

Runs in the same environment as `lower` and imports nothing of dsv4c. A request lists calls (module,
function, grid, constants, arguments) over arrays of an .npz file; arguments change arrays in place, and
every array of the file is written to the result. Arrays of BF16 are uint16 with their bits.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when `triton` is imported, so it stands before that

import numpy as np
import numpy.typing as npt

Arr = npt.NDArray[Any]
POINTERS = {"float32": "*fp32", "float16": "*fp16", "int32": "*i32", "uint16": "*bf16"}


class Memory:
    """An array as the interpreter wants it: the few methods of a tensor that it asks for."""

    def __init__(self, array: Arr) -> None:
        self.array, self.dtype, self.device, self.data = array, POINTERS[array.dtype.name], "cpu", self

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def cpu(self) -> Memory:
        return self

    def to(self, device: str) -> Memory:
        return self

    def copy_(self, other: object) -> None:
        """The interpreter worked on this very memory; there is nothing to bring back."""


def widen(bits: Arr) -> Arr:
    """FP32 values of BF16 bits."""
    wide: Arr = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def narrow(values: Arr) -> Arr:
    """BF16 bits of FP32 values, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mend_bf16() -> None:
    """Give the interpreter of triton-ascend 3.2.0 the two BF16 operations that it gets wrong.

    It holds BF16 as uint16: its matrix product multiplies the bits as integers, and its cast from FP32
    cuts them off where the hardware rounds to nearest even.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        pair = [
            interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        ]
        return plain_dot(self, *pair, d, precision, imprecise)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrow(src.data), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def run(call: dict[str, Any], arrays: dict[str, Arr]) -> None:
    """One launch of one kernel; text arguments name arrays, numbers are passed as they are."""
    function = getattr(importlib.import_module(call["module"]), call["function"])
    arguments = {k: Memory(arrays[v]) if isinstance(v, str) else v for k, v in call["arguments"].items()}
    function[tuple(call["grid"])](**arguments, **call["constants"])


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with np.load(request["arrays"]) as stored:
        arrays = {name: np.ascontiguousarray(stored[name]) for name in stored.files}
    mend_bf16()
    for call in request["calls"]:
        run(call, arrays)
    np.savez(request["result"], **arrays)  # type: ignore[arg-type, unused-ignore]


if __name__ == "__main__":
    main()
