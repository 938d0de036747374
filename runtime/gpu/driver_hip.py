"""An AMD GPU through libamdhip64, HIP's runtime, by the functions that it shares with the driver interface.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container.plan import Plan

from .driver import Api, DriverDevice, Library, load_library, wrong_device

HIP = Api(
    "ROCm",
    ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"),
    {
        "init": "hipInit", "device": "hipSetDevice", "properties": "hipGetDevicePropertiesR0600",
        "stream": "hipStreamCreateWithFlags", "wait": "hipStreamSynchronize", "load": "hipModuleLoadData",
        "function": "hipModuleGetFunction", "allocate": "hipMalloc",
        "free": "hipFree", "to_device": "hipMemcpyHtoDAsync", "from_device": "hipMemcpyDtoHAsync",
        "launch": "hipModuleLaunchKernel", "begin": "hipStreamBeginCapture", "end": "hipStreamEndCapture",
        "instantiate": "hipGraphInstantiateWithFlags", "run": "hipGraphLaunch",
    },
    "install ROCm 6.0 or newer and AMD's kernel driver",
)  # fmt: skip
_PROPERTIES = 8192
"""More bytes than the properties of a device take in any version; they are searched, not laid out."""


class HipDevice(DriverDevice):
    """The first HIP device.

    Raises:
        ToolchainError: there is no HIP runtime, or it is too old.
        ArtifactError: the device is of another architecture.
    """

    def __init__(self, plan: Plan, where: str, library: Any = None) -> None:
        call = Library(HIP, library or load_library(HIP), where)
        call("init", ctypes.c_uint(0))
        call("device", ctypes.c_int(0))
        raw = ctypes.create_string_buffer(_PROPERTIES)
        call("properties", raw, ctypes.c_int(0))
        found = re.search(rb"gfx[0-9a-f]{3,}", raw.raw)
        if found is None:
            raise ArtifactError("the device does not say its architecture", where=where)
        if found.group().decode() != plan.capability:
            raise wrong_device(plan, found.group().decode(), where)
        super().__init__(call)
