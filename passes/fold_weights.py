"""Arithmetic that can be done once, on weights: norm scales that are powers of two, ops on weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsv4c.ir import maps
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import Array
from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.levels import Level
from dsv4c.ir.packed import is_bf16, packed_form

from .base import Pass
from .cleanup import EliminateDeadCode
from .merge_projections import rewire


@dataclass(frozen=True)
class FoldNormScale(Pass):
    """rms_norm(x, s) -> unit_norm(x), with s in the columns of every linear that reads it; exact.

    Only where every s is a power of two: any other scale rounds each product once, and folding would move
    that rounding into the weights. `module.notes["fold_norm_scale"]` says which norms stay and why.
    """

    name: ClassVar[str] = "fold_norm_scale"
    doc: ClassVar[str] = "move norm scales that are powers of two into the weights behind them"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED

    def run(self, module: Module) -> int:
        kept, ops, folded = {}, [], 0
        for op in module.ops:
            reason = norm_stays(module, op) if op.name == "rms_norm" else "no norm"
            if reason:
                if op.name == "rms_norm":
                    kept[op.operands[1].producer.loc if op.operands[1].producer else op.loc] = reason
                ops.append(op)
                continue
            ops += [*_fold_norm(module, op), op]
            folded += 1
        # a scaled weight is made where its norm stood, in front of the linear that reads it
        module.ops = ops
        EliminateDeadCode().run(module)
        module.notes[self.name] = {"folded": folded, "kept": kept}
        return folded


def norm_stays(module: Module, norm: Op) -> str:
    """Why the scale of an rms_norm cannot move into its readers, or ""."""
    scale = norm.operands[1].producer
    if scale is None or scale.weight is None:
        return "its scale is no weight"
    if norm.result in module.output_values():
        return "its result is an output"
    for reader, index in norm.result.uses:
        if reader.name != "linear" or index:
            return f"{reader.name} reads it, which has no columns to scale"
        matrix = reader.operands[1].producer
        if matrix is None or matrix.weight is None:
            return f"the matrix of {reader.name} @{reader.loc} is no weight"
        if len(reader.operands[1].uses) > 1:
            return f"the weight {matrix.loc} has other readers"
        if packed_form(matrix.weight) is not None:
            return f"the weight {matrix.loc} is packed, and its scaled columns would not be"
        if is_bf16(matrix.weight) and not is_bf16(scale.weight):
            return f"the weight {matrix.loc} is BF16 and the scale is not, so that it would be stored wider"
    if module.store is None:
        return "the module has no bytes to look at (it was read from text)"
    if not maps.powers_of_two(w.values(scale.weight, module.store)):
        return "some scale is no power of two, so that folding would move a rounding"
    return ""


def _fold_norm(module: Module, norm: Op) -> list[Op]:
    builder = Builder(Module(module.name))
    builder.loc = norm.loc
    scale = norm.operands[1].producer
    assert scale is not None and scale.weight is not None
    for reader, _ in list(norm.result.uses):
        matrix = reader.operands[1].producer
        assert matrix is not None and matrix.weight is not None
        reader.set_operand(1, builder.weight(maps.scale_columns(matrix.weight, scale.weight), matrix.loc))
    rewire(module, norm.result, builder.op("unit_norm", norm.operands[0], eps=norm.attrs["eps"]))
    return builder.module.ops


@dataclass(frozen=True)
class FoldConstants(Pass):
    """scale by a power of two or clamp of a weight -> a weight; exact.

    Other ops round, so what they make of a weight at compile time need not be what a kernel makes of it. The
    front end of DeepSeek-V4 leaves no such op; other passes and front ends may.
    """

    name: ClassVar[str] = "fold_constants"
    doc: ClassVar[str] = "compute ops on weights alone when the weights are stored"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})

    def run(self, module: Module) -> int:
        kept: dict[str, str] = {}
        ops: list[Op] = []
        folded = 0
        for op in module.ops:
            weights = bool(op.operands) and all(v.producer and v.producer.weight for v in op.operands)
            reason = constant_stays(op) if weights else "it depends on the input"
            if reason:
                if weights:
                    kept[op.loc] = reason
                ops.append(op)
                continue
            expr = op.operands[0].producer.weight  # type: ignore[union-attr]
            assert expr is not None
            builder = Builder(Module(module.name))
            builder.loc = op.loc
            numbers = {k: v for k, v in op.attrs.items() if isinstance(v, float)}
            rewire(module, op.result, builder.weight(maps.evaluated(expr, op.name, **numbers)))
            ops += [*builder.module.ops, op]
            folded += 1
        module.ops = ops
        EliminateDeadCode().run(module)
        module.notes[self.name] = {"folded": folded, "kept": kept}
        return folded


def constant_stays(op: Op) -> str:
    """Why an op on weights alone cannot be one itself, or ""."""
    if op.name not in maps.FOLDABLE:
        return f"{op.name} may round; only {' and '.join(maps.FOLDABLE)} are known not to"
    if op.name == "scale" and not maps.powers_of_two(_factor(op)):
        return f"the factor {op.attrs['factor']} is no power of two"
    return ""


def _factor(op: Op) -> Array:
    return np.asarray(op.attrs["factor"], np.float64)
