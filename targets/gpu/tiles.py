"""Tile sizes, warps and stages of the heavy kernels, for few rows (decode) and for many (prefill).

One literal table. Keys are the kernel and the class of device. The numbers compile without spills and fit
the shared memory of every architecture of the class; where the assembler of one of them spills all the
same, `build` tries other stages and warps. None was timed yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .arch import Gpu

FEW_ROWS = 16
"""Tokens of a call up to which a step counts as decode."""


class Tiles(NamedTuple):
    """Sizes of a tile (0 where a kernel has no such axis), warps of a block, stages of the pipeline."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """Tiles for steps of few rows and of many."""

    few: Tiles
    many: Tiles


_SAME = {
    "index_topk": Shape(Tiles(0, 2048, 0, 8, 1), Tiles(0, 1024, 0, 8, 1)),
    "hc_project": Shape(Tiles(16, 32, 64, 4, 2), Tiles(16, 32, 64, 4, 2)),
    "full_attention": Shape(Tiles(64, 32, 32, 4, 1), Tiles(64, 32, 32, 4, 1)),
}
_TABLE: dict[str, dict[str, Shape]] = {
    "large": {  # sm_80, sm_90a, sm_100a: 163 KiB of shared memory and more
        "linear": Shape(Tiles(16, 32, 128, 4, 3), Tiles(64, 64, 64, 4, 3)),
        "expert_up": Shape(Tiles(16, 32, 128, 4, 3), Tiles(32, 64, 64, 8, 3)),
        "expert_down": Shape(Tiles(16, 32, 64, 4, 3), Tiles(32, 64, 64, 4, 3)),
        "linear_codes": Shape(Tiles(16, 32, 128, 4, 3), Tiles(128, 128, 128, 8, 3)),
        "expert_up_codes": Shape(Tiles(16, 32, 128, 4, 3), Tiles(64, 128, 128, 8, 3)),
        "expert_down_codes": Shape(Tiles(16, 32, 128, 4, 3), Tiles(64, 128, 128, 8, 3)),
        "attention": Shape(Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
        "index_scores": Shape(Tiles(0, 32, 32, 4, 1), Tiles(0, 64, 32, 4, 1)),
        **_SAME,
    },
    "small": {  # sm_89, sm_120: 99 KiB
        "linear": Shape(Tiles(16, 32, 128, 4, 2), Tiles(64, 64, 32, 4, 2)),
        "expert_up": Shape(Tiles(16, 32, 128, 4, 2), Tiles(32, 64, 32, 4, 2)),
        "expert_down": Shape(Tiles(16, 32, 64, 4, 3), Tiles(32, 64, 32, 4, 2)),
        "linear_codes": Shape(Tiles(16, 32, 128, 4, 2), Tiles(64, 64, 128, 4, 2)),
        "expert_up_codes": Shape(Tiles(16, 32, 128, 4, 2), Tiles(64, 64, 128, 8, 2)),
        "expert_down_codes": Shape(Tiles(16, 32, 128, 4, 2), Tiles(64, 64, 128, 4, 2)),
        "attention": Shape(Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
        "index_scores": Shape(Tiles(0, 32, 32, 4, 1), Tiles(0, 32, 32, 4, 1)),
        **_SAME,
    },
    "cdna": {  # gfx90a, gfx942: 64 KiB, and gfx950
        "linear": Shape(Tiles(16, 32, 128, 4, 1), Tiles(64, 64, 32, 4, 2)),
        "expert_up": Shape(Tiles(16, 32, 64, 4, 1), Tiles(32, 64, 32, 4, 2)),
        "expert_down": Shape(Tiles(16, 32, 128, 4, 1), Tiles(32, 64, 32, 4, 2)),
        "linear_codes": Shape(Tiles(16, 32, 128, 4, 1), Tiles(64, 64, 128, 4, 2)),
        "expert_up_codes": Shape(Tiles(16, 32, 128, 4, 1), Tiles(64, 64, 128, 8, 2)),
        "expert_down_codes": Shape(Tiles(16, 32, 128, 4, 1), Tiles(64, 64, 128, 4, 2)),
        "attention": Shape(Tiles(16, 32, 16, 8, 1), Tiles(16, 32, 16, 8, 1)),
        "index_scores": Shape(Tiles(0, 32, 32, 4, 1), Tiles(0, 64, 32, 4, 1)),
        **_SAME,
    },
}


def tiles(kernel: str, gpu: Gpu, few: bool) -> Tiles:
    """The tiles of a kernel on a device."""
    group = "cdna" if gpu.vendor == "hip" else "large" if gpu.shared > 100 << 10 else "small"
    shape = _TABLE[group][kernel]
    return shape.few if few else shape.many
