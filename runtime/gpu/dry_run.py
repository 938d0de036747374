"""A device that computes nothing and believes nothing: every address of a launch must lie in live memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container.plan import ALIGN, Kernel

from .device import Copy, Scalar, packed_bytes

_REACH = 1 << 44
_numbers = itertools.count(1)
"""Every device has addresses of its own, so that one of another device is found out."""


class DryRunDevice:
    """Memory is bookkeeping: what was written is kept, results are zeros.

    Args:
        memory: bytes that it has; None is as many as anybody wants.

    Attributes:
        launches: (kernel, grid) of all launches so far.
        taken: bytes of every copy from another device so far.
    """

    def __init__(self, memory: int | None = None) -> None:
        self.memory = memory
        self.taken: list[int] = []
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self._kernels: Sequence[Kernel] = ()
        self._held: dict[int, int] = {}
        self._next = next(_numbers) * _REACH

    def activate(self) -> None:
        """Nothing: no thread has to know."""

    def load(self, kernels: Sequence[Kernel], code: bytes) -> None:
        for kernel in kernels:
            if kernel.offset + kernel.nbytes > len(code):
                raise ArtifactError(f"the code of {kernel.name} lies outside the section", where="dry run")
        self._kernels = kernels

    def free_bytes(self) -> int | None:
        return None if self.memory is None else self.memory - sum(self._held.values())

    def take(self, source: DryRunDevice, copies: Sequence[Copy]) -> None:
        for here, there, nbytes in copies:
            self.inside(here, nbytes, "copy from another device")
            source.inside(there, nbytes, "copy to another device")
            self.taken.append(nbytes)

    def allocate(self, nbytes: int) -> int:
        address, self._next = self._next, self._next + -(-max(nbytes, 1) // ALIGN) * ALIGN + ALIGN
        self._held[address] = nbytes
        return address

    def free(self, address: int) -> None:
        if self._held.pop(address, None) is None:
            raise ArtifactError(f"{address:#x} was not allocated", where="dry run")

    def write(self, address: int, array: npt.NDArray[Any]) -> None:
        self.inside(address, packed_bytes(array).nbytes, "write")

    def read(self, address: int, array: npt.NDArray[Any]) -> None:
        self.inside(address, array.nbytes, "read")
        array[...] = np.zeros((), array.dtype)

    def launch(self, kernel: int, grid: tuple[int, int, int], values: Sequence[Scalar]) -> None:
        found = self._kernels[kernel]
        for parameter, value in zip(found.parameters, values, strict=True):
            if parameter.is_pointer:
                self.inside(int(value), 1, f"{found.name}.{parameter.name}")
                if parameter.divisible and int(value) % 16:
                    raise ArtifactError(
                        f"{value:#x} is no multiple of 16", where=f"{found.name}.{parameter.name}"
                    )
        self.launches.append((found.name, grid))

    def begin_graph(self) -> bool:
        return False

    def end_graph(self) -> object:
        raise ArtifactError("no graph was begun", where="dry run")

    def run_graph(self, graph: object) -> None:
        raise ArtifactError("no graph was recorded", where="dry run")

    def inside(self, address: int, nbytes: int, what: str) -> None:
        """ArtifactError unless all of these bytes were allocated in one piece."""
        for start, there in self._held.items():
            if start <= address and address + nbytes <= start + there:
                return
        raise ArtifactError(f"{nbytes} bytes at {address:#x} are no live memory", where=f"dry run, {what}")
