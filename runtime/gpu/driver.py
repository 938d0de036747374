"""A GPU through the driver's own library by ctypes: what CUDA's and HIP's driver interfaces have in common.

Knows no vendor by name: an `Api` says how functions are called. Launches run in one stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, ToolchainError
from dsv4c.runtime.container.plan import Kernel, Plan

from .device import Scalar, packed_bytes

_DYNAMIC_SHARED = 8
"""The attribute of a function that allows it more shared memory than every device has; the same in both."""
_PLAIN_SHARED = 48 << 10
_RELAXED = 2
"""Capturing a stream does not forbid other threads their own calls."""

Handle = ctypes.c_void_p


@dataclass(frozen=True)
class Api:
    """How one vendor calls things.

    Attributes:
        libraries: file names, the first that loads is taken.
        functions: our name of a function -> its symbol.
        missing: what to do where no library loads.
    """

    name: str
    libraries: tuple[str, ...]
    functions: Mapping[str, str]
    missing: str


def load_library(api: Api) -> Any:
    """The driver's library.

    Raises:
        ToolchainError: none of its names loads.
    """
    problems = []
    for name in api.libraries:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            problems.append(str(error))
    raise ToolchainError(f"there is no driver: {problems[0]}", where=api.name, hint=api.missing)


class Library:
    """The functions of an `Api`, with their results checked."""

    def __init__(self, api: Api, library: Any, where: str) -> None:
        self.api, self.where = api, where
        self._functions: dict[str, Any] = {}
        for name, symbol in api.functions.items():
            try:
                self._functions[name] = getattr(library, symbol)
            except AttributeError as error:
                raise ToolchainError(
                    f"the driver has no {symbol}", where=api.name, hint="install a newer driver"
                ) from error

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function; ArtifactError with the driver's own words unless it gives 0."""
        code = self._functions[name](*arguments)
        if code:
            symbol = self.api.functions[name]
            raise ArtifactError(f"{symbol} failed: {self._words(code)}", where=self.where)

    def _words(self, code: int) -> str:
        if "words" not in self._functions:
            return f"error {code}"
        text = ctypes.c_char_p()
        self._functions["words"](code, ctypes.byref(text))
        return f"error {code}, {(text.value or b'?').decode(errors='replace')}"


def pointer(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(address)


class DriverDevice:
    """Memory, launches and graphs by a `Library`; the vendor's class has chosen the device already."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._stream = Handle()
        library("stream", ctypes.byref(self._stream), ctypes.c_uint(1))
        self._kernels: Sequence[Kernel] = ()
        self._functions: list[Handle] = []
        self._modules: list[Handle] = []

    @property
    def stream(self) -> Handle:
        """Where launches and copies run, one after the other; measuring puts its events there."""
        return self._stream

    def load(self, kernels: Sequence[Kernel], code: bytes) -> None:
        """Every object becomes a module; a kernel that wants much shared memory is allowed it."""
        self._kernels = kernels
        for kernel in kernels:
            module, function = Handle(), Handle()
            image = code[kernel.offset : kernel.offset + kernel.nbytes]
            if len(image) != kernel.nbytes or not image:
                raise ArtifactError(f"the code of {kernel.name} is missing", where=self._library.where)
            self._library("load", ctypes.byref(module), ctypes.c_char_p(image))
            self._library("function", ctypes.byref(function), module, ctypes.c_char_p(kernel.entry.encode()))
            if kernel.shared > _PLAIN_SHARED and "allow" in self._library.api.functions:
                self._library("allow", function, ctypes.c_int(_DYNAMIC_SHARED), ctypes.c_int(kernel.shared))
            self._modules.append(module)
            self._functions.append(function)

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_uint64()
        self._library("allocate", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return int(address.value)

    def free(self, address: int) -> None:
        self._library("free", pointer(address))

    def write(self, address: int, array: npt.NDArray[Any]) -> None:
        raw = packed_bytes(array)
        if raw.nbytes:
            source = ctypes.c_void_p(raw.ctypes.data)
            self._library("to_device", pointer(address), source, ctypes.c_size_t(raw.nbytes), self._stream)
            self.synchronise()

    def read(self, address: int, array: npt.NDArray[Any]) -> None:
        fresh = np.empty(array.shape, array.dtype)
        if array.nbytes:
            target = ctypes.c_void_p(fresh.ctypes.data)
            self._library(
                "from_device", target, pointer(address), ctypes.c_size_t(array.nbytes), self._stream
            )
            self.synchronise()
            array[...] = fresh

    def synchronise(self) -> None:
        """Wait for everything in the stream."""
        self._library("wait", self._stream)

    def launch(self, kernel: int, grid: tuple[int, int, int], values: Sequence[Scalar]) -> None:
        """The parameters in order, and behind them two addresses of scratch memory that no kernel here uses.
        """
        found = self._kernels[kernel]
        held: list[Any] = []
        for parameter, value in zip(found.parameters, values, strict=True):
            if parameter.is_pointer:
                held.append(pointer(int(value)))
            else:
                held.append(ctypes.c_int32(int(value)) if parameter.type == "i32" else ctypes.c_float(value))
        held += [pointer(0), pointer(0)]
        addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
        sizes = (ctypes.c_uint(n) for n in (*grid, found.threads, 1, 1, found.shared))
        self._library("launch", self._functions[kernel], *sizes, self._stream, addresses, None)

    def begin_graph(self) -> bool:
        self._library("begin", self._stream, ctypes.c_int(_RELAXED))
        return True

    def end_graph(self) -> object:
        graph, ready = Handle(), Handle()
        self._library("end", self._stream, ctypes.byref(graph))
        self._library("instantiate", ctypes.byref(ready), graph, *self._instantiate_more())
        return ready

    def _instantiate_more(self) -> tuple[Any, ...]:
        """Arguments behind the graph where it is made ready."""
        return (ctypes.c_ulonglong(0),)

    def run_graph(self, graph: object) -> None:
        self._library("run", graph, self._stream)


def wrong_device(plan: Plan, found: str, where: str) -> ArtifactError:
    """The error for a device of another architecture."""
    return ArtifactError(
        f"compiled for {plan.arch}, this device is {found}", where=where, allowed=plan.capability,
        hint="compile with --target for this device; dsv4c targets lists what there is",
    )  # fmt: skip
