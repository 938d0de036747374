"""What the launches of a plan need: operations and bytes by the meaning of their ops, and the least time.

The costs of ops are those that the compiler counted and the manifest carries as trees; here they are only
dealt out among the launches of an op and held against figures of a device. Knows neither graph nor device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import ITEM_BYTES, Kernel, Launch, Plan, Program
from .sizes import size

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "min": min,
}  # fmt: skip
_SPLITS = {"bf16x3": 3, "bf16x6": 6}
"""How the compiler multiplies two factors in FP32 -> products of BF16 numbers that this takes."""
_F32_CODES = 0
"""The FORM of weights that are FP32."""
_CODES = {2: "fp8", 3: "fp8", 4: "int8"}
"""ROWS of products of codes -> what both factors are."""


def evaluate(tree: Any, sizes: Mapping[str, int]) -> int:
    """The number of a tree: itself, the size of that name, or [operation, tree, tree]."""
    if isinstance(tree, str):
        return sizes[tree]
    if isinstance(tree, int):
        return tree
    name, a, b = tree
    return _OPERATIONS[name](evaluate(a, sizes), evaluate(b, sizes))


@dataclass(frozen=True)
class Needs:
    """Operations and bytes of one launch, or of several."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    data_bytes: float = 0.0

    def __add__(self, other: Needs) -> Needs:
        return Needs(
            self.flops + other.flops, self.weight_bytes + other.weight_bytes,
            self.data_bytes + other.data_bytes,
        )  # fmt: skip

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.data_bytes


@dataclass(frozen=True)
class Rates:
    """What a device does per second; None where that is not known.

    Attributes:
        bandwidth: bytes to and from memory.
        matrix: operations on BF16 numbers by the matrix units.
        vector: operations on FP32 numbers elsewhere.
        fp8, int8: operations on such numbers by the matrix units.
    """

    bandwidth: float | None
    matrix: float | None
    vector: float | None
    fp8: float | None = None
    int8: float | None = None

    def of(self, factors: str) -> float | None:
        """Of products of "fp8", "int8" or "bf16" numbers by the matrix units, or of "f32" ones elsewhere."""
        return {"fp8": self.fp8, "int8": self.int8, "bf16": self.matrix, "f32": self.vector}[factors]

    def least(self, kernel: Kernel, needs: Needs) -> tuple[float | None, str]:
        """The seconds below which no launch of the kernel stays, and what bounds it: memory or compute."""
        products, rate = products_of(kernel), self.of(factors_of(kernel))
        if self.bandwidth is None or rate is None:
            return None, "unknown"
        memory, compute = needs.bytes / self.bandwidth, needs.flops * max(products, 1) / rate
        return max(memory, compute), "compute" if compute > memory else "memory"


def factors_of(kernel: Kernel) -> str:
    """What the matrix units multiply in this kernel, "fp8", "int8" or "bf16"; "f32" where they do nothing."""
    return codes_of(kernel.constants) or ("bf16" if products_of(kernel) else "f32")


def codes_of(constants: Mapping[str, Any]) -> str:
    """The codes that a kernel of these constants multiplies, "fp8" or "int8"; "" for none."""
    return _CODES[constants["ROWS"]] if {"ROWS", "FORM"} <= constants.keys() else ""


def products_of(kernel: Kernel) -> int:
    """Products of the matrix units that one product of this kernel takes; 0 where it has none of matrices."""
    constants = kernel.constants
    if codes_of(constants):
        return 1
    if "PRECISION" not in constants:
        return 0
    if "PIECES" in constants and constants["FORM"] != _F32_CODES:
        return int(constants["PIECES"])
    return _SPLITS[str(constants["PRECISION"])]


def launch_needs(plan: Plan, program: Program, calls: Any, sizes: Mapping[str, int]) -> list[Needs]:
    """What each launch of a program needs at given sizes; together exactly what their ops do.

    Operations go to the launches with products of matrices, by the size of the matrix where several have one;
    bytes of weights to those that take the weights; other bytes by what a launch may touch.

    Args:
        calls: of the program, as `targets.calls` wrote them into the manifest.
        sizes: symbols of the plan, with `past` and `ctx`.
    """
    costs = [[evaluate(tree, sizes) for tree in cost] for cost in calls["costs"]]
    members: list[list[int]] = [[] for _ in calls["ops"]]
    for index, (op, _) in enumerate(calls["order"]):
        members[op].append(index)
    dtypes = {name: b.dtype for name, b in plan.known_to(program).items()}
    held = {b.name: size(b.elements, {}) * b.item_bytes for b in plan.of_kind("weight")}
    out = [Needs()] * len(program.launches)
    for (_, _, cost), indices in zip(calls["ops"], members, strict=True):
        launches = [program.launches[i] for i in indices]
        touched = [_touched(plan, launch, held, dtypes, sizes) for launch in launches]
        weights, data = [w for w, _ in touched], [d for _, d in touched]
        kernels = [plan.kernels[launch.kernel] for launch in launches]
        matrices = [w if products_of(k) else 0 for k, w in zip(kernels, weights, strict=True)]
        if not any(matrices):
            matrices = [int(products_of(k) > 0) for k in kernels]
        flops, weight_bytes, data_bytes = costs[cost]
        shares = (_shares(matrices), _shares(weights), _shares(data))
        for index, one, two, three in zip(indices, *shares, strict=True):
            out[index] = Needs(flops * one, weight_bytes * two, data_bytes * three)
    return out


def _touched(
    plan: Plan, launch: Launch, held: Mapping[str, int], dtypes: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[int, int]:
    """Bytes of the weights that a launch takes, and of all else that it may touch."""
    kernel = plan.kernels[launch.kernel]
    pairs = list(zip(kernel.parameters, launch.arguments, strict=True))
    known: dict[str, int] = {n: v for n, v in kernel.constants.items() if isinstance(v, int)}
    known |= {p.name: size(a.integer, sizes) for p, a in pairs if a.integer}
    weights = data = 0
    for parameter, argument in pairs:
        if argument.buffer in held:
            weights += held[argument.buffer]
        elif argument.buffer:
            data += size(parameter.elements, known) * ITEM_BYTES[dtypes[argument.buffer]]
    return weights, data


def _shares(parts: Sequence[int]) -> list[float]:
    """Parts of their sum; even ones where all are nothing."""
    total = sum(parts)
    return [p / total for p in parts] if total else [1 / len(parts)] * len(parts)
