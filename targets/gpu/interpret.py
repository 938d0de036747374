"""A device that runs kernels on the CPU in Triton's interpreter, with every access held to its parameter.

For proof, not for use. It must be imported before Triton, in a process that compiles nothing: the interpreter
is switched on when Triton is imported. Bytes outside the elements that a parameter declares are an error, and
fresh memory is NaN.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import numpy.typing as npt
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_builder, tl

from dsv4c.errors import CompileError
from dsv4c.runtime.container.plan import ALIGN, Kernel
from dsv4c.runtime.container.sizes import size

Arr = npt.NDArray[Any]
TYPES = {
    "*fp32": tl.float32, "*i32": tl.int32, "*i64": tl.int64, "*bf16": tl.bfloat16, "*fp16": tl.float16,
    "*i8": tl.int8,
    "*u8": tl.uint8,
}  # fmt: skip
ITEM = {"*fp32": 4, "*i32": 4, "*i64": 8, "*bf16": 2, "*fp16": 2, "*i8": 1, "*u8": 1}


def widen(bits: Arr) -> Arr:
    """FP32 values of BF16 bits."""
    wide: Arr = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def narrow(values: Arr) -> Arr:
    """BF16 bits of FP32 values, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


class Guard:
    """The memory that the parameters of the running kernel declare."""

    def __init__(self) -> None:
        self.where, self.spans = "", np.zeros((0, 3), np.uint64)

    def enter(self, where: str, spans: list[tuple[int, int, bool]]) -> None:
        self.where = where
        self.spans = np.array([s for s in spans if s[1] > s[0]], np.uint64).reshape(-1, 3)

    def check(self, addresses: Arr, mask: Arr, item: int, store: bool) -> None:
        """Every address that is not masked lies in a span, a written one in one that may be written."""
        at = np.broadcast_to(addresses, mask.shape)[mask].astype(np.uint64)
        if not at.size:
            return
        spans = self.spans[self.spans[:, 2] == 1] if store else self.spans
        inside = (at[:, None] >= spans[None, :, 0]) & (at[:, None] + np.uint64(item) <= spans[None, :, 1])
        if not inside.any(1).all():
            what = "writes" if store else "reads"
            raise CompileError(
                f"{what} {int((~inside.any(1)).sum())} elements that it does not declare", where=self.where
            )


_guard = Guard()


def mend() -> None:
    """BF16 products and casts, which Triton's interpreter gets wrong: it multiplies the bits as integers, and
    cuts them off where hardware rounds to nearest even. And every access is checked.
    """
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        pair = [
            TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        ]
        return plain_dot(self, *pair, d, precision, imprecise)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(src.data), tl.float32)
        return plain_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        return cast_impl(self, src, dst_type)

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return plain_load(self, ptrs, checked(ptrs, mask, False), *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return plain_store(self, ptrs, value, checked(ptrs, mask, True), *rest)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.create_masked_load, builder.create_masked_store = load, store
    interpreter.InterpretedFunction.__call__ = call_patched
    options = interpreter_builder.options  # its products are in FP32, whatever split is asked for
    splits = (*options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    interpreter_builder.options = dataclasses.replace(options, allowed_dot_input_precisions=splits)


def checked(pointers: Any, mask: Any, store: bool) -> Any:
    """The mask, as booleans, once every address that it leaves is checked."""
    live = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
    item = max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)
    _guard.check(pointers.data, live, item, store)
    return TensorHandle(np.ascontiguousarray(live), tl.int1)


def argument(kind: str, value: int | float) -> Any:
    """A value of a parameter as kernels see it: a scalar in its own type, or a pointer."""
    if kind in TYPES:
        type_ = tl.pointer_type(TYPES[kind])
        return tl.tensor(TensorHandle(np.array([value], np.uint64), type_), type_)
    type_, stored = (tl.int32, np.int32) if kind == "i32" else (tl.float32, np.float32)
    return tl.tensor(TensorHandle(np.array([value], stored), type_), type_)


class InterpreterDevice:
    """Memory is NumPy's; launches run at once."""

    def __init__(self) -> None:
        mend_once()
        self._kernels: Sequence[Kernel] = ()
        self._memory: dict[int, Arr] = {}

    def activate(self) -> None:
        """Nothing: all memory is this process's."""

    def free_bytes(self) -> int | None:
        return None

    def take(self, source: InterpreterDevice, copies: Sequence[tuple[int, int, int]]) -> None:
        for here, there, nbytes in copies:
            self._at(here, nbytes)[:] = source._at(there, nbytes)

    def load(self, kernels: Sequence[Kernel], code: bytes) -> None:
        self._kernels = kernels

    def allocate(self, nbytes: int) -> int:
        raw = np.full(nbytes + 2 * ALIGN, 0xFF, np.uint8)
        address = -(-raw.ctypes.data // ALIGN) * ALIGN
        self._memory[address] = raw
        return address

    def free(self, address: int) -> None:
        del self._memory[address]

    def write(self, address: int, array: Arr) -> None:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._at(address, flat.size)[:] = flat

    def read(self, address: int, array: Arr) -> None:
        array[...] = self._at(address, array.nbytes).view(array.dtype).reshape(array.shape)

    def _at(self, address: int, nbytes: int) -> Arr:
        """A view of memory from an address on."""
        for start, raw in self._memory.items():
            end = int(raw.ctypes.data) + raw.size
            if start <= address and address + nbytes <= end:
                first = address - int(raw.ctypes.data)
                return raw[first : first + nbytes]
        raise CompileError(f"{nbytes} bytes at {address:#x} were never allocated", where="interpreter")

    def launch(self, kernel: int, grid: tuple[int, int, int], values: Sequence[int | float]) -> None:
        found = self._kernels[kernel]
        module = importlib.import_module(f"dsv4c.targets.gpu.kernels.{found.module}")
        known = {n: v for n, v in found.constants.items() if isinstance(v, int)}
        named = {p.name: v for p, v in zip(found.parameters, values, strict=True)}
        known |= {p.name: int(named[p.name]) for p in found.parameters if p.type == "i32"}
        spans, given = [], dict[str, Any]()
        for p in found.parameters:
            value = named[p.name]
            if p.is_pointer:
                touched = size(p.elements, known) * ITEM[p.type]
                spans.append((int(value), int(value) + touched, "w" in p.access))
            given[p.name] = argument(p.type, value)
        _guard.enter(found.name, spans)
        run(getattr(module, found.name).rewrite(), grid, given, found.constants)

    def begin_graph(self) -> bool:
        return False

    def end_graph(self) -> object:
        raise CompileError("no graph was begun", where="interpreter")

    def run_graph(self, graph: object) -> None:
        raise CompileError("no graph was recorded", where="interpreter")


def run(function: Any, grid: tuple[int, int, int], given: dict[str, Any], constants: dict[str, Any]) -> None:
    """Every program of a launch, one after the other."""
    patch_once(function)
    interpreter_builder.set_grid_dim(*grid)
    for x in range(grid[0]):
        for y in range(grid[1]):
            for z in range(grid[2]):
                interpreter_builder.set_grid_idx(x, y, z)
                function(**given, **constants)


_patched: set[str] = set()


def patch_once(function: Any) -> None:
    """Give the language's functions their meaning in the interpreter, for good; once for each file of
    kernels.

    The interpreter does so around every call of every function, which takes longer than most of them.
    """
    if function.__module__ not in _patched:
        interpreter._patch_lang(function)
        _patched.add(function.__module__)


def call_patched(self: Any, *arguments: Any, **named: Any) -> Any:
    """A kernel's call of a function of its own."""
    function = self.rewrite()
    patch_once(function)
    return function(*arguments, **named)


_mended: list[bool] = []


def mend_once() -> None:
    if not _mended:
        mend()
        _mended.append(True)
