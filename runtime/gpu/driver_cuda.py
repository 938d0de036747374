"""An NVIDIA GPU through libcuda, the driver's library; neither the toolkit nor CUDA's runtime is needed."""

from __future__ import annotations

import ctypes
from typing import Any, Self

from dsv4c.errors import ToolchainError
from dsv4c.runtime.container.plan import Plan

from .driver import (
    REACHED_BEFORE,
    Api,
    DriverDevice,
    Handle,
    Library,
    check_count,
    load_library,
    pointer,
    wrong_device,
)

CUDA = Api(
    "CUDA",
    ("libcuda.so.1", "libcuda.so"),
    {
        "words": "cuGetErrorString", "init": "cuInit", "version": "cuDriverGetVersion",
        "count": "cuDeviceGetCount", "device": "cuDeviceGet",
        "attribute": "cuDeviceGetAttribute", "retain": "cuDevicePrimaryCtxRetain",
        "current": "cuCtxSetCurrent",
        "stream": "cuStreamCreate", "wait": "cuStreamSynchronize", "load": "cuModuleLoadData",
        "function": "cuModuleGetFunction", "allow": "cuFuncSetAttribute", "allocate": "cuMemAlloc_v2",
        "free": "cuMemFree_v2", "to_device": "cuMemcpyHtoDAsync_v2", "from_device": "cuMemcpyDtoHAsync_v2",
        "launch": "cuLaunchKernel", "begin": "cuStreamBeginCapture_v2", "end": "cuStreamEndCapture",
        "instantiate": "cuGraphInstantiateWithFlags", "run": "cuGraphLaunch", "memory": "cuMemGetInfo_v2",
        "event": "cuEventCreate", "record": "cuEventRecord", "await": "cuStreamWaitEvent",
        "reachable": "cuDeviceCanAccessPeer", "reach": "cuCtxEnablePeerAccess", "peer": "cuMemcpyPeerAsync",
    },
    "install NVIDIA's driver; dsv4c verify runs such an artifact only where the card is",
)  # fmt: skip
_MAJOR, _MINOR = 75, 76
"""Attributes of a device: the two halves of its compute capability."""


class CudaDevice(DriverDevice):
    """A CUDA device, by its number, in its primary context.

    Raises:
        ToolchainError: there is no driver, or it is older than the code.
        ArtifactError: there is no device of that number, or it is of another architecture.
    """

    def __init__(self, plan: Plan, where: str, library: Any = None, number: int = 0) -> None:
        call = Library(CUDA, library or load_library(CUDA), where)
        call("init", ctypes.c_uint(0))
        version = ctypes.c_int()
        call("version", ctypes.byref(version))
        if version.value < plan.driver:
            raise ToolchainError(
                f"the driver is for CUDA {_named(version.value)}, the code needs {_named(plan.driver)}",
                where=where, hint="install a newer driver",
            )  # fmt: skip
        check_count(call, plan, number)
        device = ctypes.c_int()
        call("device", ctypes.byref(device), ctypes.c_int(number))
        major, minor = ctypes.c_int(), ctypes.c_int()
        for figure, attribute in ((major, _MAJOR), (minor, _MINOR)):
            call("attribute", ctypes.byref(figure), ctypes.c_int(attribute), device)
        if not _fits(plan, major.value, minor.value):
            raise wrong_device(plan, f"{major.value}.{minor.value}", where, number)
        self._context = Handle()
        call("retain", ctypes.byref(self._context), device)
        call("current", self._context)
        super().__init__(call, number)

    def activate(self) -> None:
        self._library("current", self._context)

    def _enable(self, other: Self) -> None:
        self._library("reach", other._context, ctypes.c_uint(0), also=REACHED_BEFORE)

    def _copy_from(self, other: Self, here: int, there: int, nbytes: int) -> None:
        ends = pointer(here), self._context, pointer(there), other._context
        self._library("peer", *ends, ctypes.c_size_t(nbytes), self._stream)


def _named(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _fits(plan: Plan, major: int, minor: int) -> bool:
    """Code runs on its own architecture, and where it is not exact on later ones of the same major number."""
    wanted = tuple(int(part) for part in plan.capability.split("."))
    return (major, minor) == wanted or (not plan.exact and major == wanted[0] and minor >= wanted[1])
