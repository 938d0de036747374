"""The GPUs that plans are made for: what the compiler is told, and what bounds a kernel on each.

Sources: CUDA programming guide, table of compute capabilities; AMD CDNA 2, 3 and 4 instruction set
references.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.errors import TargetError, unknown


@dataclass(frozen=True)
class Gpu:
    """One architecture.

    Attributes:
        name: as targets call it.
        vendor: "cuda" or "hip", also the back end of Triton.
        compiler: what Triton calls the architecture.
        capability: what the driver of a device reports ("9.0"), or its gfx name.
        exact: whether code runs on that one only, not on later ones of the same major number.
        warp: threads of a warp.
        shared: bytes of shared memory that one block may have.
        shared_core: bytes of shared memory of a core; `reserved` of them go with every block.
        registers: 32-bit registers of a core.
        threads: most threads on a core at a time.
        matrix: patterns of the instructions that show that the matrix units are used.
        fp8: the kind of E4M3 that they multiply: "ocp", "fnuz", or "" for none. All of them multiply INT8.
    """

    name: str
    vendor: str
    compiler: int | str
    capability: str
    exact: bool
    warp: int
    shared: int
    shared_core: int
    reserved: int
    registers: int
    threads: int
    matrix: tuple[str, ...]
    fp8: str = ""


_HMMA = ("HMMA", "IMMA")
GPUS = (
    Gpu("sm_80", "cuda", 80, "8.0", False, 32, 163 << 10, 164 << 10, 1024, 65536, 2048, _HMMA),
    Gpu("sm_89", "cuda", 89, "8.9", False, 32, 99 << 10, 100 << 10, 1024, 65536, 1536,
        (*_HMMA, "QMMA"), "ocp"),
    Gpu("sm_90a", "cuda", 90, "9.0", True, 32, 227 << 10, 228 << 10, 1024, 65536, 2048,
        (*_HMMA, "HGMMA", "QGMMA", "IGMMA"), "ocp"),
    Gpu("sm_100a", "cuda", 100, "10.0", True, 32, 227 << 10, 228 << 10, 1024, 65536, 2048,
        (*_HMMA, "UTCHMMA", "UTCQMMA", "UTCIMMA"), "ocp"),
    Gpu("sm_120", "cuda", 120, "12.0", True, 32, 99 << 10, 100 << 10, 1024, 65536, 1536,
        (*_HMMA, "QMMA", "OMMA"), "ocp"),
    Gpu("gfx90a", "hip", "gfx90a", "gfx90a", True, 64, 64 << 10, 64 << 10, 0, 4 * 512 * 64, 2048,
    ("v_mfma",)),
    Gpu("gfx942", "hip", "gfx942", "gfx942", True, 64, 64 << 10, 64 << 10, 0, 4 * 512 * 64, 2048,
        ("v_mfma",), "fnuz"),
    Gpu("gfx950", "hip", "gfx950", "gfx950", True, 64, 160 << 10, 160 << 10, 0, 4 * 512 * 64, 2048,
        ("v_mfma",), "ocp"),
)  # fmt: skip
"""Triton compiles for 9.0, 10.0 and 12.0 with the features of that architecture alone ("a")."""


def gpu(name: str) -> Gpu:
    """The architecture of that name.

    Raises:
        TargetError: there is none.
    """
    for found in GPUS:
        if found.name == name:
            return found
    raise unknown("arch", name, [g.name for g in GPUS], TargetError, "launch plans")
