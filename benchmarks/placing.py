"""Where weights lie in memory: two copies of a file can differ in how fast they are read.

Pages of a file are wherever there was room when it was written or read, in large pieces or in small ones. On
one machine half of a file was read at 18 GB/s and the other half at 27, by dsv4c and by a plain loop, until
it was read from disk anew. So files of a group are read anew before its programs start, and what they can be
read at is reported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from protocol import Worker

CLOSE = 0.92
"""The share of the rate of plain memory that a file should be read at."""
TRIES = 4


def forget(paths: Sequence[Path]) -> None:
    """Take files out of the system's cache, so that they make room and are read anew."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                held = os.open(file, os.O_RDONLY)
                os.fsync(held)
                os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(held)


def placed(paths: Sequence[str], threads: int) -> dict[str, float]:
    """GB/s at which each file can be read, once it lies as well as some tries can make it."""
    found: dict[str, float] = {}
    worker = Worker("ceilings", "worker_ceilings.py", str(threads), *paths, threads=threads)
    for number, path in enumerate(paths):
        for _ in range(TRIES):
            forget([Path(path)])
            rate, plain = worker.measure("file", number)["gb_per_s"], worker.measure("read", 5)["gb_per_s"]
            found[Path(path).name] = rate
            print(f"{Path(path).name} is read at {rate:.1f} GB/s, memory at {plain:.1f}", file=sys.stderr)
            if rate >= CLOSE * plain:
                break
    worker.close()
    return found
