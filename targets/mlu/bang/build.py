"""BANG C sources: their tiles, the command line of cncc, and running the same sources on the CPU.

Owns what a kernel is built with; what is in the buffers is the business of `host.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import TargetError, unknown

from .toolchain import compile_shared

FOLDER = Path(__file__).resolve().parent
KERNELS, EMULATION = FOLDER / "kernels", FOLDER / "emulation"

LANES = 64
"""Numbers in a vector instruction; its operands are multiples of it."""

F32 = 4

Argument = npt.NDArray[Any] | int | float


@dataclass(frozen=True)
class Memory:
    """On-chip memory of one core, in bytes.

    Attributes:
        nram: what a kernel may use of NRAM: the memory without the stack, measured for Triton's compiler.
        wram: all of WRAM.
    """

    nram: int
    wram: int


ARCHS: dict[str, Memory] = {
    "mtp_372": Memory(nram=655360, wram=1048576),
    "mtp_592": Memory(nram=327680, wram=524288),
}
"""MLU370 and MLU590."""

Tiling = dict[str, int]


@dataclass(frozen=True)
class Kernel:
    """A source and its entries.

    Attributes:
        sizes: what its tiles depend on, as `tiling` takes it.
        choose: (sizes, memory) -> its definitions, from the largest tile down; the last one is the smallest.
        nram, wram: bytes of on-chip memory that definitions take.
    """

    name: str
    entries: tuple[str, ...]
    sizes: tuple[str, ...]
    choose: Callable[[Mapping[str, int]], list[Tiling]]
    nram: Callable[[Tiling], int]
    wram: Callable[[Tiling], int]


def _whole(count: int, unit: int = LANES) -> int:
    return -(-count // unit) * unit


def _powers(largest: int, smallest: int) -> list[int]:
    """largest, largest / 2, ... smallest."""
    return [n for n in (largest >> shift for shift in range(largest.bit_length())) if n >= smallest]


def _experts(sizes: Mapping[str, int]) -> list[Tiling]:
    """As many routes as a call can bring to one expert, up to 64; then as deep as fits."""
    routes = min(64, 1 << max(0, sizes["tokens"] - 1).bit_length())
    deepest = _whole(max(sizes["d"], sizes["inner"]))
    return [{"ROUTES": routes, "COLUMNS": 64, "DEPTH": depth} for depth in range(deepest, 0, -LANES)]


def _experts_nram(t: Tiling) -> int:
    rows = t["ROUTES"] * t["DEPTH"] + 2 * t["COLUMNS"] * t["DEPTH"]
    return F32 * (rows + 3 * t["ROUTES"] * t["COLUMNS"] + t["COLUMNS"])


def _attention(sizes: Mapping[str, int]) -> list[Tiling]:
    return [{"KEYS": keys, "WIDTH": _whole(sizes["d"])} for keys in _powers(128, LANES // 2)]


def _attention_nram(t: Tiling) -> int:
    return F32 * (LANES * t["WIDTH"] + 2 * t["KEYS"] * t["WIDTH"] + 2 * t["KEYS"] * LANES + 3 * LANES)


def _gather(sizes: Mapping[str, int]) -> list[Tiling]:
    width, groups = sizes["width"], sizes["groups"]
    if groups < 1 or width % groups or width // groups % 16:
        raise TargetError(
            f"{width} codes in {groups} groups of one scale",
            where="engram_gather",
            allowed="groups of a multiple of 16 codes",
            hint="the transpose of the vector unit moves 64 bytes",
        )
    fit = [rows for rows in range(64, 0, -1) if rows * groups % LANES == 0]
    return [{"WIDTH": width, "GROUPS": groups, "ROWS": rows} for rows in fit or [LANES]]


def _gather_nram(t: Tiling) -> int:
    codes = t["ROWS"] * t["WIDTH"]
    return codes + F32 * (3 * codes + 3 * t["ROWS"] * t["GROUPS"])


TABLE: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "grouped_experts",
            ("experts_hidden_f32", "experts_hidden_i8", "experts_output_f32", "experts_output_i8",
             "experts_combine"),
            ("tokens", "d", "inner"), _experts, _experts_nram,
            lambda t: F32 * t["COLUMNS"] * t["DEPTH"],
        ),
        Kernel(
            "sparse_attention", ("sparse_attention",), ("d",), _attention, _attention_nram,
            lambda t: F32 * LANES * (t["WIDTH"] + t["KEYS"]),
        ),
        Kernel(
            "engram_gather", ("engram_gather_e8m0", "engram_gather_f32"), ("width", "groups"),
            _gather, _gather_nram, lambda t: 0,
        ),
    )
}  # fmt: skip


def sources() -> tuple[Path, ...]:
    """The BANG C sources and the headers they include."""
    return tuple(sorted(path for path in KERNELS.iterdir() if path.suffix in (".mlu", ".h")))


def kernel(name: str) -> Kernel:
    """The kernel of that name; raises `TargetError` with the known ones."""
    if name not in TABLE:
        raise unknown("kernel", name, TABLE, TargetError, "mlu")
    return TABLE[name]


def memory(arch: str) -> Memory:
    """The memories of an arch; raises `TargetError` with the known ones."""
    if arch not in ARCHS:
        raise unknown("arch", arch, ARCHS, TargetError, "mlu")
    return ARCHS[arch]


def tiling(name: str, arch: str, sizes: Mapping[str, int]) -> Tiling:
    """The -D definitions of kernel `name` for these sizes: the largest tile that fits the memories of `arch`.

    Args:
        sizes: grouped_experts takes tokens, d, inner; sparse_attention d; engram_gather width, groups.

    Raises:
        TargetError: an unknown kernel, arch or size, or even the smallest tile does not fit.
    """
    found, room = kernel(name), memory(arch)
    if set(sizes) != set(found.sizes) or min(sizes.values()) < 1:
        raise TargetError(f"sizes {dict(sizes)}", where=name, allowed=f"positive {', '.join(found.sizes)}")
    capacity = {"NRAM_BYTES": room.nram, "WRAM_BYTES": room.wram}
    tiles = found.choose(sizes)
    for tile in tiles:
        if found.nram(tile) <= room.nram and found.wram(tile) <= room.wram:
            return capacity | tile
    raise TargetError(
        f"sizes {dict(sizes)} need {found.nram(tiles[-1])} bytes of NRAM and {found.wram(tiles[-1])} of WRAM "
        f"with the smallest tile {tiles[-1]}",
        where=f"{name} on {arch}",
        allowed=f"{room.nram} bytes of NRAM, {room.wram} of WRAM",
        hint="an arch with more memory, or a narrower model",
    )


def definitions(tile: Mapping[str, int]) -> list[str]:
    """The tile as compiler arguments."""
    return [f"-D{name}={value}" for name, value in tile.items()]


def cncc_command(name: str, arch: str, sizes: Mapping[str, int], output: str = "") -> list[str]:
    """What compiles kernel `name` for `arch` into an object file, on a machine that has the vendor's SDK.

    The include folder is the shell's $NEUWARE_HOME. The object is linked with -lcnrt -lcndrv.
    """
    tile = tiling(name, arch, sizes)
    return [
        "cncc", f"{name}.mlu", "-c", "-o", output or f"{name}.o", f"--bang-mlu-arch={arch}",
        "-I$NEUWARE_HOME/include", "-O3", "-std=c++11", *definitions(tile),
    ]  # fmt: skip


@dataclass(frozen=True)
class Emulated:
    """A kernel compiled for this CPU; `launch` runs its entries.

    Attributes:
        tile: the definitions it was compiled with.
    """

    name: str
    library: ctypes.CDLL
    tile: Mapping[str, int]

    def launch(self, entry: str, *arguments: Argument, tasks: int = 4) -> None:
        """Run all tasks of one entry, one after another.

        Arrays are GDRAM and are passed by address; integers as int32, floats as float32. Results are written
        into the arrays.

        Raises:
            TargetError: the kernel broke a rule of the machine; names intrinsic, file, line and limit.
        """
        if entry not in kernel(self.name).entries:
            raise unknown("entry", entry, kernel(self.name).entries, TargetError, self.name)
        values = [_value(f"{entry}, argument {i}", argument) for i, argument in enumerate(arguments)]
        slots = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        call = self.library[f"emulate_{entry}"]
        call.restype = ctypes.c_char_p
        message = call(ctypes.c_int(tasks), slots)
        if message is not None:
            raise TargetError(message.decode(), where=entry, hint=f"tile: {dict(self.tile)}")

    def declared(self) -> tuple[int, int]:
        """Bytes of NRAM and of WRAM that the source declares with this tile."""
        count = self.library["emulate_declared"]
        return int(count(ctypes.c_int(0))), int(count(ctypes.c_int(1)))


def _value(where: str, argument: Argument) -> Any:
    """The C value of an argument; the caller keeps arrays alive."""
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise TargetError("the array is not contiguous", where=where)
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument)


def emulate(name: str, arch: str, sizes: Mapping[str, int], folder: Path) -> Emulated:
    """Kernel `name` as it would be compiled for `arch`, compiled for this CPU instead.

    Args:
        sizes: as `tiling` takes them.
        folder: keeps shared objects; one that is there is used again.

    Raises:
        TargetError: the tiles do not fit `arch`.
        ToolchainError: there is no C++ compiler, or it refuses the source.
    """
    tile = tiling(name, arch, sizes)
    return Emulated(name, compile_emulation(name, tile, folder), tile)


def compile_emulation(name: str, tile: Mapping[str, int], folder: Path) -> ctypes.CDLL:
    """The kernel and the emulation header as a shared object with one function for every entry."""
    source = KERNELS / f"{name}.mlu"
    exports = [f"BANG_EXPORT({entry})" for entry in kernel(name).entries]
    lines = [f'#include "{source.name}"', *exports, "BANG_EXPORT_DECLARED", ""]
    parts = [*lines, *definitions(tile), *(path.read_text() for path in (*sources(), EMULATION / "bang.h"))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    built = folder / f"{source.stem}-{digest}.so"
    if not built.exists():
        wrapper = folder / f"{source.stem}-{digest}.cpp"
        wrapper.write_text("\n".join(lines))
        compile_shared(wrapper, built, [f"-I{source.parent}", f"-I{EMULATION}", *definitions(tile)])
    return ctypes.CDLL(str(built))
