"""What a card does at most: copies in its memory, and one large product by the vendor's library.

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
from dsv4c.runtime.container.plan import Buffer
from dsv4c.runtime.gpu.device import Device
from dsv4c.runtime.gpu.driver import DriverDevice

COPY = 2 << 30
SIDE = 8192
"""Rows, columns and terms of the product."""
ROUNDS = 12
_NONE, _TURNED, _DEFAULT = 0, 1, -1
"""CUBLAS_OP_N, CUBLAS_OP_T and CUBLAS_GEMM_DEFAULT."""
_F32, _BF16, _INT8, _INT32, _E4M3 = 0, 14, 3, 10, 28
"""CUDA_R_32F, CUDA_R_16BF, CUDA_R_8I, CUDA_R_32I and CUDA_R_8F_E4M3."""
_F32_COMPUTE, _INT32_COMPUTE, _TURN_FIRST = 68, 72, 3
"""CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32I and CUBLASLT_MATMUL_DESC_TRANSA."""


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


def matrix_rate(
    device: Device, meter: Meter, filler: Filler, vendor: str, factors: str = "bf16"
) -> tuple[float | None, str]:
    """Operations per second of a product of random BF16, FP8 or INT8 matrices, and where that is from."""
    if not meter.measures:
        return None, "not measured"
    if vendor != "cuda" or not isinstance(device, DriverDevice):
        return None, "no library of this vendor is called"
    name = "cuBLASLt" if factors == "fp8" else "cuBLAS"
    try:
        rate = _measured(find_cublas, device, meter, filler, factors)
        return rate, f"{name}, {SIDE} x {SIDE} x {SIDE}"
    except (OSError, AttributeError, ArtifactError) as error:
        return None, f"no {name}: {error}"


def find_cublas(name: str = "cublas") -> Any:
    """The library, from the loader's path or from a Python package of NVIDIA's.

    Raises:
        OSError: it is nowhere.
    """
    names = [f"lib{name}.so.13", f"lib{name}.so.12", f"lib{name}.so"]
    for folder in sys.path:
        names += sorted(str(f) for f in Path(folder or ".").glob(f"nvidia/*/lib/lib{name}.so.*"))
    for found in names:
        try:
            return ctypes.CDLL(found)
        except OSError as error:
            last = error
    raise last


def _measured(
    find: Callable[..., Any], device: DriverDevice, meter: Meter, filler: Filler, factors: str
) -> float:
    """Fill two matrices, multiply them again and again."""
    item, out = (2, 2) if factors == "bf16" else (1, 4 if factors == "int8" else 2)
    library = find("cublasLt") if factors == "fp8" else find()
    a, b, c = (device.allocate(size * SIDE * SIDE) for size in (item, item, out))
    for address, spread in ((a, 1.0), (b, SIDE**-0.5)):
        if factors == "bf16":
            filler.rows(address, item * SIDE * SIDE, spread)
        else:
            dtype = "f8e4m3" if factors == "fp8" else "i8"
            filler.weight(Buffer("matrix", "weight", dtype, (str(SIDE), str(SIDE))), address)
    made = _by_cublaslt if factors == "fp8" else _by_cublas
    seconds = made(library, device, meter, (a, b, c), factors)
    for address in (a, b, c):
        device.free(address)
    return 2 * SIDE**3 / seconds


def _by_cublas(
    library: Any, device: DriverDevice, meter: Meter, addresses: tuple[int, int, int], factors: str
) -> float:
    """BF16, or INT8 with int32 sums, whose first matrix the library wants turned."""
    handle = ctypes.c_void_p()
    _checked(library.cublasCreate_v2(ctypes.byref(handle)))
    _checked(library.cublasSetStream_v2(handle, device.stream))
    whole = factors == "int8"
    one, zero = (ctypes.c_int(n) if whole else ctypes.c_float(n) for n in (1, 0))
    kind, result = (ctypes.c_int(n) for n in ((_INT8, _INT32) if whole else (_BF16, _BF16)))
    compute, side = ctypes.c_int(_INT32_COMPUTE if whole else _F32_COMPUTE), ctypes.c_int(SIDE)
    a, b, c = (ctypes.c_uint64(address) for address in addresses)

    def run() -> None:
        _checked(library.cublasGemmEx(
            handle, ctypes.c_int(_TURNED if whole else _NONE), ctypes.c_int(_NONE), side, side, side,
            ctypes.byref(one), a, kind, side, b, kind, side, ctypes.byref(zero), c, result, side, compute,
            ctypes.c_int(_DEFAULT),
        ))  # fmt: skip

    seconds = median_seconds(meter, run)
    _checked(library.cublasDestroy_v2(handle))
    assert seconds is not None
    return seconds


def _by_cublaslt(
    library: Any, device: DriverDevice, meter: Meter, addresses: tuple[int, int, int], factors: str
) -> float:
    """E4M3 with FP32 sums into BF16; the first matrix turned, all scales one, by the library's own choice."""
    handle, job, turned = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(_TURNED)
    _checked(library.cublasLtCreate(ctypes.byref(handle)))
    _checked(library.cublasLtMatmulDescCreate(
        ctypes.byref(job), ctypes.c_int(_F32_COMPUTE), ctypes.c_int(_F32)
    ))  # fmt: skip
    _checked(library.cublasLtMatmulDescSetAttribute(
        job, ctypes.c_int(_TURN_FIRST), ctypes.byref(turned), ctypes.c_size_t(4)
    ))  # fmt: skip
    layouts = [ctypes.c_void_p() for _ in range(2)]
    for layout, kind in zip(layouts, (_E4M3, _BF16), strict=True):
        side = ctypes.c_uint64(SIDE)
        _checked(library.cublasLtMatrixLayoutCreate(
            ctypes.byref(layout), ctypes.c_int(kind), side, side, ctypes.c_int64(SIDE)
        ))  # fmt: skip
    codes, result = layouts
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    a, b, c = (ctypes.c_uint64(address) for address in addresses)

    def run() -> None:
        _checked(library.cublasLtMatmul(
            handle, job, ctypes.byref(one), a, codes, b, codes, ctypes.byref(zero), c, result, c, result,
            None, None, ctypes.c_size_t(0), device.stream,
        ))  # fmt: skip

    seconds = median_seconds(meter, run)
    _checked(library.cublasLtDestroy(handle))
    assert seconds is not None
    return seconds


def _checked(code: int) -> None:
    if code:
        raise ArtifactError(f"status {code}", where="cuBLAS")
