"""What this processor can do, as the kernel spells it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable
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


def lacks(machine: str, requires: Iterable[str]) -> str:
    """Why this machine cannot run code for an arch, as half a sentence; "" where it can.

    Where the system does not tell what its processor can do, anything of its kind passes.
    """
    if machine != platform.machine():
        return f"this machine is {platform.machine()}"
    missing = sorted(set(requires) - cpu_flags()) if cpu_flags() else []
    return f"this CPU lacks {', '.join(missing)}" if missing else ""


@cache
def cpu_model() -> str:
    """The maker's numbers of the first core, `GenuineIntel-6-207` or `0x41-0xd40`; "" where there are none.

    Of x86-64 vendor, family and model, of ARM implementer and part: clouds hide the names.
    """
    try:
        return model_of(Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""


def model_of(text: str) -> str:
    """The same of the text of `/proc/cpuinfo`."""
    said: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    for keys in (("vendor_id", "cpu family", "model"), ("CPU implementer", "CPU part")):
        if all(said.get(key) for key in keys):
            return "-".join(said[key] for key in keys)
    return ""


def _tiles_granted() -> bool:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)
