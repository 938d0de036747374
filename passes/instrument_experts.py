"""Counting how text uses the experts: a state and an `expert_statistics` beside every `expert_mlp`.

What becomes of the counts is the business of who runs the result; see `passes/statistics.py` for the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.levels import Level
from dsv4c.ir.types import f32

from .base import Pass

PREFIX = "statistics."
"""A layer's counts are the state of this name followed by the layer's location."""


@dataclass(frozen=True)
class InstrumentExperts(Pass):
    """Every `expert_mlp` gets a state f32 [E,3] that each step adds to: per expert the tokens that chose it,
    the sum of their routing weights, and the sum of the norms of its weighted outputs; exact for everything
    that was there before.

    A float32 stops counting at 2^24: who runs the result takes the counts out and zeroes them in between.
    """

    name: ClassVar[str] = "instrument_experts"
    doc: ClassVar[str] = "count how often and how strongly text uses each expert"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED

    def run(self, module: Module) -> int:
        added, ops = 0, list[Op]()
        for op in module.ops:
            ops.append(op)
            if op.name == "expert_mlp" and PREFIX + op.loc not in module.states:
                ops.append(_count(module, op))
                added += 1
        module.ops = ops
        return added


def _count(module: Module, experts: Op) -> Op:
    count = experts.operands[4].type.shape[0]
    counts = Builder(module).state(PREFIX + experts.loc, f32(count, 3))
    builder = Builder(Module(module.name))
    builder.loc = experts.loc
    op = builder.multi("expert_statistics", counts, *experts.operands[:6], limit=experts.attrs["limit"])
    module.outputs[counts.name] = op.result
    return op
