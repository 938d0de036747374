"""How many warps of a kernel a core holds, by the rules of the programming guides; knows no kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arch import Gpu


def occupancy(gpu: Gpu, facts: Mapping[str, Any], shared: int, warps: int) -> float:
    """The part of a core's threads that blocks of a kernel fill, 0 to 1, by registers and shared memory.

    Registers are given out to warps in units: of 8 per thread on CUDA and CDNA alike. On CDNA accumulators
    come from the same 512 registers of a thread.
    """
    threads = warps * gpu.warp
    used = max(1, int(facts["registers"]))
    unit = -(-used // 8) * 8 * threads
    by_registers = gpu.registers // unit
    by_shared = gpu.shared_core // max(1, shared + gpu.reserved)
    most = gpu.threads // threads
    return round(min(by_registers, by_shared, most) * threads / gpu.threads, 3)
