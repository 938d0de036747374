"""A GPU through the driver's own library by ctypes: what CUDA's and HIP's driver interfaces have in common.

Knows no vendor by name: an `Api` says how functions are called. Launches of a device run in one stream of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, ToolchainError
from dsv4c.runtime.container.plan import Kernel, Plan

from .device import Copy, Scalar, packed_bytes

_DYNAMIC_SHARED = 8
"""The attribute of a function that allows it more shared memory than every device has; the same in both."""
_PLAIN_SHARED = 48 << 10
_UNTIMED = 2
"""Events that order and do not measure."""
REACHED_BEFORE = 704
"""What enabling access to a peer gives where it is enabled already; the same in both."""
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

    def __call__(self, name: str, *arguments: Any, also: int = 0) -> None:
        """Call a function; ArtifactError with the driver's own words unless it gives 0, or `also`."""
        code = self._functions[name](*arguments)
        if code not in (0, also):
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
    """Memory, launches and graphs by a `Library`; the vendor's class has activated the device already.

    Attributes:
        number: among the devices that the driver shows.
    """

    def __init__(self, library: Library, number: int) -> None:
        self._library, self.number = library, number
        self._stream, self._event = Handle(), Handle()
        library("stream", ctypes.byref(self._stream), ctypes.c_uint(1))
        self._kernels: Sequence[Kernel] = ()
        self._functions: list[Handle] = []
        self._modules: list[Handle] = []
        self._reached: set[int] = set()

    def activate(self) -> None:
        raise NotImplementedError

    def _enable(self, other: Self) -> None:
        """Let this device, which is active, reach the memory of another."""
        raise NotImplementedError

    def _copy_from(self, other: Self, here: int, there: int, nbytes: int) -> None:
        """Copy in the stream of this device, which is active."""
        raise NotImplementedError

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

    def free_bytes(self) -> int | None:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._library("memory", ctypes.byref(free), ctypes.byref(total))
        return free.value

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

    def take(self, source: Self, copies: Sequence[Copy]) -> None:
        """An event of each stream, which the other waits for, puts the copies in order. They go from memory
        to memory where the devices reach each other's, and by the driver through the host where they do not.
        """
        if source.number not in self._reached:
            self._reached.add(source.number)
            source._reach(self)
            self._reach(source)
        source.activate()
        source._record()
        self.activate()
        self._wait_for(source)
        for here, there, nbytes in copies:
            if nbytes:
                self._copy_from(source, here, there, nbytes)
        self._record()
        source.activate()
        source._wait_for(self)
        self.activate()

    def _reach(self, other: Self) -> None:
        """Enable access to another device's memory, where the machine has it."""
        able = ctypes.c_int()
        numbers = ctypes.c_int(self.number), ctypes.c_int(other.number)
        self._library("reachable", ctypes.byref(able), *numbers)
        if able.value:
            self.activate()
            self._enable(other)

    def _record(self) -> None:
        if not self._event:
            self._library("event", ctypes.byref(self._event), ctypes.c_uint(_UNTIMED))
        self._library("record", self._event, self._stream)

    def _wait_for(self, other: Self) -> None:
        """What is sent to this device from now on runs after the other's event, as recorded last."""
        self._library("await", self._stream, other._event, ctypes.c_uint(0))

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


def check_count(library: Library, plan: Plan, number: int) -> None:
    """ArtifactError where the machine has no device of that number."""
    count, wanted = ctypes.c_int(), len(plan.stages)
    library("count", ctypes.byref(count))
    if number >= count.value:
        raise ArtifactError(
            f"compiled for {wanted} device{'s' * (wanted > 1)}, this machine shows {count.value}",
            where=library.where, allowed=f"{wanted} or more of {plan.arch}",
            hint="compile with --devices for as many as there are, or see that no variable such as "
            "CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES hides some",
        )  # fmt: skip


def wrong_device(plan: Plan, found: str, where: str, number: int = 0) -> ArtifactError:
    """The error for a device of another architecture."""
    name = f"device {number}" if len(plan.stages) > 1 else "this device"
    return ArtifactError(
        f"compiled for {plan.arch}, {name} is {found}", where=where, allowed=plan.capability,
        hint="compile with --target for this device; dsv4c targets lists what there is",
    )  # fmt: skip
