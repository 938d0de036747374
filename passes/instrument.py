"""Counting how text uses a model: states that gather what its experts do and what its matrices are fed.

What becomes of the counts is the business of who runs the result; see `passes/statistics.py` for the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.types import f32

from .base import Pass

PREFIX = "statistics."
"""A layer's counts are the state of this name followed by the layer's location."""

INPUTS = "inputs."
"""Sums of squares are the state of this name followed by the location of the first weight that they meet."""


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


@dataclass(frozen=True)
class InstrumentInputs(Pass):
    """Every value [B,T,K] that `linear` or `expert_mlp` multiplies with weights gets a state f32 [K], to
    which each step adds the squares of its columns over all tokens; exact for what was there before.

    Experts are fed what the router sees: all tokens count for each of them, and their hidden values do not.
    `module.notes["instrument_inputs"]` has "states", per state the locations of the weights (`*` is every
    expert's number), and "kept", the products that are not measured and why.
    """

    name: ClassVar[str] = "instrument_inputs"
    doc: ClassVar[str] = "sum the squares of what every matrix is multiplied with"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED

    def run(self, module: Module) -> int:
        readers: dict[Value, list[Op]] = {}
        kept: dict[str, str] = {}
        for op in module.ops:
            if reason := _unmeasured(module, op):
                kept[op.loc] = reason
            elif op.name in ("linear", "expert_mlp"):
                readers.setdefault(op.operands[0], []).append(op)
        found = {ops[0]: [loc for op in ops for loc in _weights(op)] for ops in readers.values()}
        found = {op: locs for op, locs in found.items() if INPUTS + locs[0] not in module.states}
        ops = list[Op]()
        for op in module.ops:
            ops.append(op)
            if op in found:
                ops.append(_square(module, op, found[op][0]))
        module.ops = ops
        earlier = module.notes.get(self.name, {}).get("states", {})
        states = {INPUTS + locs[0]: locs for locs in found.values()}
        module.notes[self.name] = {"states": earlier | states, "kept": kept}
        return len(found)


def _unmeasured(module: Module, op: Op) -> str:
    """Why what a product is fed cannot be summed over tokens, or ""; "" for other ops too."""
    if op.name not in ("linear", "grouped_linear", "expert_mlp"):
        return ""
    if op.name == "grouped_linear":
        return "every group of rows has columns of its own"
    matrix = op.operands[1].producer
    if op.name == "linear" and (matrix is None or matrix.weight is None):
        return "its matrix is no weight"
    tokens = module.inputs.get("tokens")
    if tokens is None or "n_valid" not in module.inputs:
        return "the module has no inputs tokens and n_valid"
    shape = op.operands[0].type.shape
    return "" if len(shape) == 3 and shape[:2] == tokens.type.shape else "its rows are not the tokens"


def _weights(op: Op) -> list[str]:
    """The locations of the weights that are multiplied with the first operand."""
    if op.name == "expert_mlp":
        return [f"{op.loc}.experts.*.{matrix}.weight" for matrix in ("w1", "w3")]
    matrix = op.operands[1].producer
    assert matrix is not None
    return [matrix.loc]


def _square(module: Module, reader: Op, loc: str) -> Op:
    x = reader.operands[0]
    sums = Builder(module).state(INPUTS + loc, f32(x.type.shape[-1]))
    builder = Builder(Module(module.name))
    builder.loc = reader.loc
    op = builder.multi("input_statistics", sums, x, module.inputs["n_valid"])
    module.outputs[sums.name] = op.result
    return op
