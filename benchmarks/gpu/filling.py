"""Weights and states that are made up on the device: small random blocks, copied over all of their memory.

Every weight has memory of its own, so a step reads what a real one would. Codes are random and finite, scales
bring a row to a variance of about one, tables of expert ids name distinct ones, and routers have no bias to
speak of, so that tokens choose experts about evenly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from metering import Meter

from dsv4c.runtime.container.plan import ALIGN, Buffer, Plan
from dsv4c.runtime.container.sizes import size
from dsv4c.runtime.gpu.device import Device

BLOCK = 8 << 20
"""Bytes of a random block."""
SMALL = 1 << 20
"""Bytes up to which a tensor is drawn number by number."""
_CODE_RMS = {"f8e4m3": 1.75, "f8e4m3fnuz": 0.88, "f4e2m1x2": 2.93, "i8": 73.0, "i4x2": 4.6}
"""Root mean square of the numbers that random codes stand for."""

Array = npt.NDArray[Any]


class Filler:
    """Fills memory of one device.

    Args:
        plan: whose launches say which scale belongs to which codes.
    """

    def __init__(self, plan: Plan, device: Device, meter: Meter) -> None:
        self._device, self._meter = device, meter
        self._rng = np.random.default_rng(1)
        self._blocks: dict[tuple[str, float], tuple[int, int]] = {}
        self._scales = _scales(plan)
        self._experts = _experts(plan)

    def weight(self, buffer: Buffer, address: int) -> None:
        """Give a weight numbers of its kind."""
        shape = tuple(size(text, {}) for text in buffer.shape)
        nbytes = math.prod(shape) * buffer.item_bytes
        if buffer.dtype in ("i32", "i64"):
            self._device.write(address, self._ids(buffer, shape))
        elif len(shape) == 1 or nbytes <= SMALL:
            self._device.write(address, self._small(buffer, shape))
        else:
            self._spread(buffer.dtype, self._spread_of(buffer, shape), address, nbytes)

    def state(self, buffer: Buffer, address: int, nbytes: int) -> None:
        """Give a state of floats normal numbers."""
        self._spread(buffer.dtype, 1.0, address, nbytes)

    def rows(self, address: int, nbytes: int, spread: float = 1.0) -> None:
        """Normal BF16 numbers."""
        self._spread("bf16", spread, address, nbytes)

    # ------------------------------------------------------------------------------------- numbers

    def _spread_of(self, buffer: Buffer, shape: tuple[int, ...]) -> float:
        """Standard deviation of a weight's numbers, or the exponent of its scales."""
        if buffer.dtype == "f8e8m0" or buffer.name in self._scales:
            dtype, columns = self._scales.get(buffer.name, ("f8e4m3", shape[-1]))
            factor = 1 / (_CODE_RMS.get(dtype, 1.0) * math.sqrt(columns))
            return round(math.log2(factor)) if buffer.dtype == "f8e8m0" else factor
        return 1 / math.sqrt(shape[-1])

    def _small(self, buffer: Buffer, shape: tuple[int, ...]) -> Array:
        if len(shape) == 1 and buffer.dtype in ("f32", "bf16", "f16"):
            normal = self._rng.standard_normal(shape).astype(np.float32)
            values = 0.01 * normal if "bias" in buffer.name or "sink" in buffer.name else 1 + 0.1 * normal
            return stored(values, buffer.dtype)
        return self._numbers(buffer.dtype, self._spread_of(buffer, shape), math.prod(shape))

    def _ids(self, buffer: Buffer, shape: tuple[int, ...]) -> Array:
        """Distinct ids of experts in every row."""
        count, last = self._experts, shape[-1]
        if len(shape) != 2 or count < last:
            return np.zeros(shape, np.int32 if buffer.dtype == "i32" else np.int64)
        first = self._rng.integers(0, count, (*shape[:-1], 1))
        step = self._rng.integers(1, max(2, (count - 1) // max(1, last - 1) + 1), (*shape[:-1], 1))
        return ((first + step * np.arange(last)) % count).astype(np.int32)

    def _numbers(self, dtype: str, spread: float, count: int) -> Array:
        """`count` elements as they are stored."""
        rng = self._rng
        match dtype:
            case "f8e8m0":
                return (127 + int(spread) + rng.integers(-1, 2, count)).astype(np.uint8)
            case "f8e4m3" | "f8e4m3fnuz":  # 2^-2 to 2^1, or half of it, times 1 to 1.875; never NaN
                sign, rest = rng.integers(0, 2, count), rng.integers(5 << 3, 9 << 3, count)
                return (sign << 7 | rest).astype(np.uint8)
            case "f4e2m1x2" | "i4x2" | "u8":
                return rng.integers(0, 256, count, np.uint8)
            case "i8":
                return rng.integers(-127, 128, count, np.int8)
            case _:
                return stored(spread * rng.standard_normal(count, np.float32), dtype)

    # -------------------------------------------------------------------------------------- copies

    def _spread(self, dtype: str, spread: float, address: int, nbytes: int) -> None:
        """A block of its kind over all of the memory, from another place in it each time."""
        key = dtype, spread
        if key not in self._blocks:
            item = {"f32": 4, "bf16": 2, "f16": 2}.get(dtype, 1)
            array = self._numbers(dtype, spread, BLOCK // item)
            self._blocks[key] = self._device.allocate(array.nbytes), array.nbytes
            self._device.write(self._blocks[key][0], array)
        block, there = self._blocks[key]
        at, start = 0, int(self._rng.integers(0, there // ALIGN)) * ALIGN
        while at < nbytes:
            piece = min(there - start, nbytes - at)
            self._meter.copy(address + at, block + start, piece)
            at, start = at + piece, 0


def stored(values: Array, dtype: str) -> Array:
    """Floats as FP32, or as the upper half of their bits for BF16."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "f16" else np.float32)


def _scales(plan: Plan) -> dict[str, tuple[str, int]]:
    """Name of a scale -> the dtype of its codes, and how many numbers a row of them has."""
    buffers = {b.name: b for b in plan.buffers}
    out = {}
    for program in plan.programs:
        for launch in program.launches:
            names = [p.name for p in plan.kernels[launch.kernel].parameters]
            given = dict(zip(names, launch.arguments, strict=True))
            if "w" in given and "scale" in given and given["scale"].buffer:
                codes = buffers[given["w"].buffer]
                pack = 2 if codes.dtype in ("f4e2m1x2", "i4x2") else 1
                out[given["scale"].buffer] = codes.dtype, pack * size(codes.shape[-1], {})
    return out


def _experts(plan: Plan) -> int:
    """How many experts routes may name."""
    found = [k.constants["E"] for k in plan.kernels if k.name in ("route_topk", "route_weights")]
    return min((int(n) for n in found), default=0)
