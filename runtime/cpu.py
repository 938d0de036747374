"""What this processor can do, as the kernel spells it."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

_ARCH_PRCTL = 158
_REQUEST_PERMISSION = 0x1023
_TILE_DATA = 18
"""x86-64 Linux: a system call, its request for a part of the register state, the part of tile registers."""


@cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of the first core; empty where the system does not say.

    A process has to ask for tile registers before it touches them: this asks, for all threads of the process,
    and leaves out `amx_*` where the system refuses.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((x for x in text.splitlines() if x.startswith(("flags", "Features"))), "")
    flags = frozenset(line.partition(":")[2].split())
    if "amx_tile" in flags and not _tiles_granted():
        return frozenset(f for f in flags if not f.startswith("amx_"))
    return flags


def _tiles_granted() -> bool:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)
