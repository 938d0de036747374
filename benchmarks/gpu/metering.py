"""What is measured with: events in the stream of a device, copies in its memory, its name and free memory.

The driver's calls beside those that executing a plan takes; and a stand-in that measures nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

from dsv4c.runtime.container.plan import Plan
from dsv4c.runtime.gpu.device import Device
from dsv4c.runtime.gpu.driver import Api, DriverDevice, Handle, Library, load_library, pointer
from dsv4c.runtime.gpu.driver_cuda import CUDA, CudaDevice
from dsv4c.runtime.gpu.driver_hip import HIP, HipDevice
from dsv4c.runtime.gpu.dry_run import DryRunDevice

MEASURE = {
    "cuda": Api(CUDA.name, CUDA.libraries, {
        "words": "cuGetErrorString", "event": "cuEventCreate", "record": "cuEventRecord",
        "reach": "cuEventSynchronize", "between": "cuEventElapsedTime", "forget": "cuEventDestroy_v2",
        "copy": "cuMemcpyDtoDAsync_v2", "memory": "cuMemGetInfo_v2", "title": "cuDeviceGetName",
        "version": "cuDriverGetVersion",
    }, CUDA.missing),
    "hip": Api(HIP.name, HIP.libraries, {
        "event": "hipEventCreateWithFlags", "record": "hipEventRecord", "reach": "hipEventSynchronize",
        "between": "hipEventElapsedTime", "forget": "hipEventDestroy", "copy": "hipMemcpyDtoDAsync",
        "memory": "hipMemGetInfo", "title": "hipDeviceGetName", "version": "hipDriverGetVersion",
    }, HIP.missing),
}  # fmt: skip
"""Both vendors give these functions the same arguments."""


class Meter(Protocol):
    """Measures what a device does, in order with its launches."""

    measures: bool

    def facts(self) -> dict[str, Any]:
        """`name`, `driver` and `memory`, its bytes."""
        ...

    def free_bytes(self) -> int: ...

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy inside the device's memory."""
        ...

    def mark(self) -> Any:
        """A moment, when everything up to here is done."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two moments, after waiting for the second; both are forgotten by `forget`."""
        ...

    def forget(self, *moments: Any) -> None: ...

    def wait(self) -> None: ...


class DriverMeter:
    """Events and copies by the driver's library, in the stream of a device."""

    measures = True

    def __init__(self, device: DriverDevice, library: Any, vendor: str) -> None:
        self._device, self._call = device, Library(MEASURE[vendor], library, "measuring")

    def facts(self) -> dict[str, Any]:
        title, version = ctypes.create_string_buffer(256), ctypes.c_int()
        self._call("title", title, ctypes.c_int(len(title)), ctypes.c_int(0))
        self._call("version", ctypes.byref(version))
        return {
            "name": title.value.decode(errors="replace"), "driver": version.value, "memory": self._memory()[1]
        }  # fmt: skip

    def free_bytes(self) -> int:
        return self._memory()[0]

    def _memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("memory", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._call("copy", pointer(to), pointer(source), ctypes.c_size_t(nbytes), self._device.stream)

    def mark(self) -> Handle:
        event = Handle()
        self._call("event", ctypes.byref(event), ctypes.c_uint(0))
        self._call("record", event, self._device.stream)
        return event

    def seconds(self, first: Handle, last: Handle) -> float:
        milliseconds = ctypes.c_float()
        self._call("reach", last)
        self._call("between", ctypes.byref(milliseconds), first, last)
        return milliseconds.value / 1e3

    def forget(self, *moments: Handle) -> None:
        for event in moments:
            self._call("forget", event)

    def wait(self) -> None:
        self._device.synchronise()


class DryMeter:
    """Measures nothing; copies must stay in live memory."""

    measures = False

    def __init__(self, device: DryRunDevice) -> None:
        self._device = device

    def facts(self) -> dict[str, Any]:
        return {"name": "none: a dry run", "driver": 0, "memory": 0}

    def free_bytes(self) -> int:
        return 1 << 62

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._device.inside(to, nbytes, "copy")
        self._device.inside(source, nbytes, "copy")

    def mark(self) -> None:
        return None

    def seconds(self, first: None, last: None) -> float:
        return 0.0

    def forget(self, *moments: None) -> None: ...

    def wait(self) -> None: ...


def open_meter(plan: Plan, where: str, dry: bool, library: Any = None) -> tuple[Device, Meter]:
    """The device that a plan is for, and what measures it.

    Raises:
        ToolchainError: there is no driver, or it is too old or lacks a function.
        ArtifactError: the device is of another architecture.
    """
    if dry:
        stand_in = DryRunDevice()
        return stand_in, DryMeter(stand_in)
    library = library or load_library(CUDA if plan.vendor == "cuda" else HIP)
    kind = CudaDevice if plan.vendor == "cuda" else HipDevice
    device = kind(plan, where, library)
    return device, DriverMeter(device, library, plan.vendor)
