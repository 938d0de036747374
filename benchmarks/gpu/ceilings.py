"""What a card does at most: copies in its memory, and one large BF16 product by the vendor's library.

A product is measured where cuBLAS is found; nobody needs to install it. Elsewhere the published figure stands
in, and results say so.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filling import Filler
from metering import Meter

from dsv4c.errors import ArtifactError
from dsv4c.runtime.gpu.device import Device
from dsv4c.runtime.gpu.driver import DriverDevice

COPY = 2 << 30
SIDE = 8192
"""Rows, columns and terms of the product."""
ROUNDS = 12
_NONE, _BF16, _F32_COMPUTE, _DEFAULT = 0, 14, 68, -1
"""CUBLAS_OP_N, CUDA_R_16BF, CUBLAS_COMPUTE_32F and CUBLAS_GEMM_DEFAULT."""


def copy_rate(device: Device, meter: Meter, nbytes: int = COPY) -> float | None:
    """Bytes read and written per second by copies of 2 GiB; None where nothing is measured."""
    nbytes = min(nbytes, meter.free_bytes() // 4)
    one, two = device.allocate(nbytes), device.allocate(nbytes)
    seconds = median_seconds(meter, lambda: meter.copy(two, one, nbytes))
    device.free(one)
    device.free(two)
    return None if seconds is None else 2 * nbytes / seconds


def median_seconds(meter: Meter, run: Callable[[], None], rounds: int = ROUNDS) -> float | None:
    """Of `rounds` runs after two that warm up."""
    found = []
    for _ in range(rounds + 2):
        first = meter.mark()
        run()
        last = meter.mark()
        found.append(meter.seconds(first, last))
        meter.forget(first, last)
    return statistics.median(found[2:]) if meter.measures else None


def matrix_rate(device: Device, meter: Meter, filler: Filler, vendor: str) -> tuple[float | None, str]:
    """Operations per second of a product of random BF16 matrices, and where that is from."""
    if not meter.measures:
        return None, "not measured"
    if vendor != "cuda" or not isinstance(device, DriverDevice):
        return None, "no library of this vendor is called"
    try:
        library = find_cublas()
        return _by_cublas(library, device, meter, filler), "cuBLAS, 8192 x 8192 x 8192"
    except (OSError, AttributeError, ArtifactError) as error:
        return None, f"no cuBLAS: {error}"


def find_cublas() -> Any:
    """The library, from the loader's path or from a Python package of NVIDIA's.

    Raises:
        OSError: it is nowhere.
    """
    names = ["libcublas.so.13", "libcublas.so.12", "libcublas.so"]
    for folder in sys.path:
        names += sorted(str(f) for f in Path(folder or ".").glob("nvidia/*/lib/libcublas.so.*"))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            last = error
    raise last


def _by_cublas(library: Any, device: DriverDevice, meter: Meter, filler: Filler) -> float:
    nbytes = 2 * SIDE * SIDE
    a, b, c = (device.allocate(nbytes) for _ in range(3))
    filler.rows(a, nbytes)
    filler.rows(b, nbytes, SIDE**-0.5)
    handle = ctypes.c_void_p()
    _checked(library.cublasCreate_v2(ctypes.byref(handle)))
    _checked(library.cublasSetStream_v2(handle, device.stream))
    one, zero, side = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_int(SIDE)
    kind = ctypes.c_int(_BF16)

    def run() -> None:
        _checked(library.cublasGemmEx(
            handle, ctypes.c_int(_NONE), ctypes.c_int(_NONE), side, side, side, ctypes.byref(one),
            ctypes.c_uint64(a), kind, side, ctypes.c_uint64(b), kind, side, ctypes.byref(zero),
            ctypes.c_uint64(c), kind, side, ctypes.c_int(_F32_COMPUTE), ctypes.c_int(_DEFAULT),
        ))  # fmt: skip

    seconds = median_seconds(meter, run)
    _checked(library.cublasDestroy_v2(handle))
    for address in (a, b, c):
        device.free(address)
    assert seconds is not None
    return 2 * SIDE**3 / seconds


def _checked(code: int) -> None:
    if code:
        raise ArtifactError(f"status {code}", where="cuBLAS")
