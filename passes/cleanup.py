"""Clean-up passes: dead code and common subexpressions. They run at every change of level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.text import print_weight

from .base import Pass


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Removes ops whose results nobody reads. State writes are outputs, so they stay."""

    name: ClassVar[str] = "eliminate_dead_code"
    doc: ClassVar[str] = "remove ops whose results nobody reads"

    def run(self, module: Module) -> int:
        outputs, kept = module.output_values(), []
        for op in reversed(module.ops):
            if any(v.uses or v in outputs for v in op.results):
                kept.append(op)
            else:
                op.drop()
        removed = len(module.ops) - len(kept)
        module.ops = kept[::-1]
        return removed


@dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Replaces an op by an earlier one that computes the same. State-consuming ops are left alone."""

    name: ClassVar[str] = "merge_common_subexpressions"
    doc: ClassVar[str] = "compute equal values once"

    def run(self, module: Module) -> int:
        seen: dict[object, Op] = {}
        merged, outputs = 0, module.output_values()
        for op in module.ops:
            if op.definition.consumes is not None or op.name == "dispatch":
                continue
            twin = seen.setdefault(_key(op), op)
            if twin is not op and not outputs.intersection(op.results):
                for old, new in zip(op.results, twin.results, strict=True):
                    old.replace_with(new)
                merged += 1
        return merged + (EliminateDeadCode().run(module) if merged else 0)


def _key(op: Op) -> object:
    operands: tuple[Value, ...] = tuple(op.operands)
    return op.name, operands, tuple(op.attrs.items()), print_weight(op.weight) if op.weight else None
