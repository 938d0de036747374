"""What a device must do for a launch plan: memory, launches, and graphs of launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dsv4c.runtime.container.plan import Kernel

Scalar = int | float
"""Values of a launch: addresses and integers, or numbers."""


Copy = tuple[int, int, int]
"""From one device to another: address here, address there, bytes."""


class Device(Protocol):
    """A GPU, or what stands in for one. Addresses are integers; launches run in order.

    A thread that uses several devices calls `activate` of one before it uses that one.
    """

    def activate(self) -> None:
        """What this thread does from now on it does on this device."""
        ...

    def load(self, kernels: Sequence[Kernel], code: bytes) -> None:
        """Make the kernels of a plan ready; from now on they are known by their index."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that is not taken; None where that is not known."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Fresh memory whose address is a multiple of 256."""
        ...

    def free(self, address: int) -> None: ...

    def write(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to the device."""
        ...

    def read(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy from the device into an array, after everything that was launched."""
        ...

    def launch(self, kernel: int, grid: tuple[int, int, int], values: Sequence[Scalar]) -> None:
        """Launch kernel number `kernel` with the values of its parameters in order."""
        ...

    def take(self, source: Any, copies: Sequence[Copy]) -> None:
        """Copy from another device of the same kind.

        The copies come after everything that was launched there and in front of everything that is launched
        here from now on; what is launched there later comes after them. This device is active afterwards.
        """
        ...

    def begin_graph(self) -> bool:
        """From now on record launches in place of running them; False where the device has no graphs."""
        ...

    def end_graph(self) -> object:
        """What was recorded."""
        ...

    def run_graph(self, graph: object) -> None: ...


def packed_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of an array, in order, without a copy where it is contiguous."""
    raw: npt.NDArray[np.uint8] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return raw
