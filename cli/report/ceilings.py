"""What a machine can do at most: its float32 matrix rate and its read bandwidth, measured with NumPy."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ceilings:
    """
    Attributes:
        flops: float32 operations per second.
        bandwidth: bytes read per second.
        source: where the numbers come from.
    """

    flops: float
    bandwidth: float
    source: str


def measure(seconds: float = 0.25) -> Ceilings:
    """The best of repeated products of 768 x 768 matrices, and of sums over 256 MiB.

    NumPy's BLAS decides the first and one thread does the second, so both are what a plain program reaches
    here, not what the hardware could.
    """
    a = np.ones((768, 768), np.float32)
    flops = 2 * 768**3 / _best(lambda: a @ a, seconds)
    data = np.ones(1 << 26, np.float32)
    bandwidth = data.nbytes / _best(lambda: np.max(data), seconds)
    return Ceilings(flops, bandwidth, "measured on this machine with NumPy")


def _best(run: object, seconds: float) -> float:
    assert callable(run)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        stop = time.perf_counter()
        best = min(best, stop - start)
        if stop > end:
            return best
