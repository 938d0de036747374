"""An AMD GPU through libamdhip64, HIP's runtime, by the functions that it shares with the driver interface.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any, Self

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container.plan import Plan

from .driver import (
    REACHED_BEFORE,
    Api,
    DriverDevice,
    Library,
    check_count,
    load_library,
    pointer,
    wrong_device,
)

HIP = Api(
    "ROCm",
    ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"),
    {
        "init": "hipInit", "count": "hipGetDeviceCount", "device": "hipSetDevice",
        "properties": "hipGetDevicePropertiesR0600",
        "stream": "hipStreamCreateWithFlags", "wait": "hipStreamSynchronize", "load": "hipModuleLoadData",
        "function": "hipModuleGetFunction", "allocate": "hipMalloc",
        "free": "hipFree", "to_device": "hipMemcpyHtoDAsync", "from_device": "hipMemcpyDtoHAsync",
        "launch": "hipModuleLaunchKernel", "begin": "hipStreamBeginCapture", "end": "hipStreamEndCapture",
        "instantiate": "hipGraphInstantiateWithFlags", "run": "hipGraphLaunch", "memory": "hipMemGetInfo",
        "event": "hipEventCreateWithFlags", "record": "hipEventRecord", "await": "hipStreamWaitEvent",
        "reachable": "hipDeviceCanAccessPeer", "reach": "hipDeviceEnablePeerAccess",
        "peer": "hipMemcpyPeerAsync",
    },
    "install ROCm 6.0 or newer and AMD's kernel driver",
)  # fmt: skip
_PROPERTIES = 8192
"""More bytes than the properties of a device take in any version; they are searched, not laid out."""


class HipDevice(DriverDevice):
    """A HIP device, by its number.

    Raises:
        ToolchainError: there is no HIP runtime, or it is too old.
        ArtifactError: there is no device of that number, or it is of another architecture.
    """

    def __init__(self, plan: Plan, where: str, library: Any = None, number: int = 0) -> None:
        call = Library(HIP, library or load_library(HIP), where)
        call("init", ctypes.c_uint(0))
        check_count(call, plan, number)
        call("device", ctypes.c_int(number))
        raw = ctypes.create_string_buffer(_PROPERTIES)
        call("properties", raw, ctypes.c_int(number))
        found = re.search(rb"gfx[0-9a-f]{3,}", raw.raw)
        if found is None:
            raise ArtifactError("the device does not say its architecture", where=where)
        if found.group().decode() != plan.capability:
            raise wrong_device(plan, found.group().decode(), where, number)
        super().__init__(call, number)

    def activate(self) -> None:
        self._library("device", ctypes.c_int(self.number))

    def _enable(self, other: Self) -> None:
        self._library("reach", ctypes.c_int(other.number), ctypes.c_uint(0), also=REACHED_BEFORE)

    def _copy_from(self, other: Self, here: int, there: int, nbytes: int) -> None:
        ends = pointer(here), ctypes.c_int(self.number), pointer(there), ctypes.c_int(other.number)
        self._library("peer", *ends, ctypes.c_size_t(nbytes), self._stream)
