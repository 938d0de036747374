"""The one table of Ascend kernels: arguments, sizes of the model, and tiles from the largest down.

Knows nothing of Triton: a kernel is named by the file and the function that `lower` imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4c.errors import UsageError, unknown

Numbers = Mapping[str, int]

DTYPES = ("bf16", "fp16", "fp32")
"""Formats of activations and weights, in the words of Triton."""

SOCS = ("Ascend910B3", "Ascend910_9391")
"""What the memory plan was proved for; both are architecture 2201: UB 192 KiB, L1 512 KiB, L0C 128 KiB."""


@dataclass(frozen=True)
class Kernel:
    """One Triton function.

    Attributes:
        name: of the function; `module` is the file of this folder without its ending.
        arguments: types by name, `*T` for an array in the dtype of the request.
        sizes: names of the constants that a model decides, with those of DeepSeek-V4-Flash.
        tiles: choices of the tile sizes, best first: more work per byte moved comes before less.
    """

    name: str
    module: str
    arguments: Mapping[str, str]
    sizes: Numbers
    tiles: tuple[Numbers, ...]

    def __post_init__(self) -> None:
        names = set(self.tiles[0])
        if any(set(tile) != names for tile in self.tiles) or names & (set(self.sizes) | set(self.arguments)):
            raise UsageError("every choice of tiles must name the same constants", where=self.name)

    def signature(self, dtype: str) -> dict[str, str]:
        """The types of the arguments for arrays of `dtype`."""
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES, UsageError, self.name)
        return {name: f"*{dtype}" if type_ == "*T" else type_ for name, type_ in self.arguments.items()}

    def constants(self, sizes: Numbers, tiles: Numbers) -> dict[str, int]:
        """All compile-time constants; refuses missing and unknown names."""
        given, needed = {**sizes, **tiles}, {*self.sizes, *self.tiles[0]}
        if set(given) != needed:
            wrong = ", ".join(sorted(set(given) ^ needed))
            raise UsageError(
                f"constants missing or unknown: {wrong}", where=self.name, allowed=", ".join(sorted(needed))
            )
        return given


def _grid(**choices: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    """Columns of choices as rows: _grid(BM=(64, 32), BN=(8, 4)) is two choices."""
    return tuple(dict(zip(choices, row, strict=True)) for row in zip(*choices.values(), strict=True))


_ROUTED = {"blocks": "*i32"}
_CALL = {"pos": "*i32", "n_valid": "*i32"}
KERNELS: tuple[Kernel, ...] = (
    Kernel("expert_up", "grouped_experts",
           {"x": "*T", "w13": "*T", "weights": "*fp32", **_ROUTED, "hidden": "*T", "limit": "fp32"},
           {"D": 4096, "INNER": 2048, "ROUND": 0},
           _grid(BM=(128, 128, 128, 64, 64, 32, 16), BN=(256, 128, 128, 128, 64, 64, 32),
                 BK=(128, 128, 64, 128, 128, 128, 64))),
    Kernel("expert_down", "grouped_experts", {"hidden": "*T", "w2": "*T", **_ROUTED, "y": "*T"},
           {"D": 4096, "INNER": 2048},
           _grid(BM=(128, 128, 128, 64, 32), BN=(512, 256, 128, 128, 64), BK=(128, 128, 128, 128, 128))),
    Kernel("expert_sum", "grouped_experts", {"y": "*T", "slots": "*i32", "out": "*T"},
           {"D": 4096, "K": 6}, _grid(BN=(4096, 2048, 1024))),
    Kernel("sparse_attention", "sparse_attention",
           {"q": "*T", "kv": "*T", "ring": "*T", "sinks": "*fp32", **_CALL, "entries": "*T",
            "selected": "*i32", "out": "*T", "T": "i32", "C": "i32", "scale": "fp32"},
           {"H": 64, "D": 512, "WINDOW": 128, "RING": 128, "RATIO": 4, "K": 512, "BD": 512},
           _grid(BH=(64, 64, 32, 32, 16, 16, 16), BK=(64, 32, 64, 32, 64, 32, 16))),
    Kernel("compress", "compressor",
           {"kv": "*T", "gate": "*T", "kv_ring": "*T", "gate_ring": "*T", **_CALL, "out": "*T", "T": "i32",
            "G": "i32"},
           {"RATIO": 4, "WIDTH": 512, "OVERLAP": 1}, _grid(BC=(512, 256, 128, 64, 32, 16))),
    Kernel("hc_project", "hyper_connection",
           {"streams": "*T", "fn": "*T", "out": "*fp32", "ROWS": "i32", "norm_eps": "fp32"},
           {"WIDTH": 16384, "COLUMNS": 24, "BN": 32},
           _grid(BM=(128, 64, 64, 32, 16), BK=(256, 256, 128, 128, 128))),
    Kernel("hc_sinkhorn", "hyper_connection",
           {"mixed": "*fp32", "base": "*fp32", "scale": "*fp32", "pre": "*fp32", "post": "*fp32",
            "comb": "*fp32", "ROWS": "i32", "eps": "fp32"},
           {"N": 4, "ITERS": 20}, _grid(BM=(512, 256, 128, 64, 32, 16))),
    Kernel("hc_collapse", "hyper_connection", {"streams": "*T", "pre": "*fp32", "out": "*T"},
           {"D": 4096, "N": 4}, _grid(BN=(4096, 2048, 1024))),
    Kernel("hc_expand", "hyper_connection",
           {"streams": "*T", "y": "*T", "post": "*fp32", "comb": "*fp32", "out": "*T"},
           {"D": 4096, "N": 4}, _grid(BN=(4096, 2048, 1024, 512))),
    Kernel("engram_gate", "engram_gate",
           {"x": "*T", "kv": "*T", "q_weight": "*T", "k_weight": "*T", "ids": "*i32", "out": "*T",
            "eps": "fp32", "floor": "fp32"},
           {"N": 4, "D": 4096, "COPYSIGN": 1, "RESIDUAL": 1, "DEAD": 1}, _grid(BN=(4096, 2048, 1024))),
)  # fmt: skip


def kernel(name: str) -> Kernel:
    """The kernel of that name, or an error that lists them."""
    for found in KERNELS:
        if found.name == name:
            return found
    raise unknown("Ascend kernel", name, (k.name for k in KERNELS), UsageError)
