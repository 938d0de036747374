"""Rounding points in front of matrix products whose weights are integers, so that both factors are.

Knows which linears qualify; what a rounding point does is the op `round_values`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.errors import PassError, unknown
from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.packed import packed_form

from .base import Effect, Pass
from .weight_classes import weight_class


@dataclass(frozen=True)
class Rule:
    """How inputs are rounded (`round_values`), and in front of weights of which scheme.

    Attributes:
        around: the rule that inputs are rounded by before that, and results after; "" for neither.
    """

    rounding: str
    block: int
    weights: str
    around: str = ""


RULES = {"int8_token": Rule("int8", 0, "int8"), "int8_token_bf16": Rule("int8", 0, "int8", "bf16")}
"""Rule by name. With `int8_token` one scale covers a token's whole input row and one a whole weight row, so a
product is the int32 dot product of the codes times two scales. `int8_token_bf16` is the same for devices that
quantise from BF16 and whose product of codes gives BF16."""


@dataclass(frozen=True)
class QuantiseActivations(Pass):
    """Rounds the input of every `linear` whose weight is stored in the rule's scheme.

    Linears that read one value share one rounding. The experts' are left out: their inner product would
    need a rounding in the middle of what `fuse_expert_gemms` makes one op of.

    Notes: `linears`, how many read rounded inputs, and `roundings`, how many ops that took.
    """

    name: ClassVar[str] = "quantise_activations"
    doc: ClassVar[str] = "round the inputs of linear maps whose weights are integers"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})
    rule: str = "int8_token"

    def effect(self) -> Effect:
        return Effect(changes=("*",), measure="loss on held-out text before and after")

    def run(self, module: Module) -> int:
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES, PassError, self.name)
        rule, rounded, linears = RULES[self.rule], dict[Value, Value](), 0
        ops: list[Op] = []
        for op in module.ops:
            if op.name == "linear" and _qualifies(op, rule):
                x = op.operands[0]
                if not _is_rounded(x, rule):
                    if x not in rounded:
                        made = _rounded(x, rule, op.loc)
                        rounded[x] = made[-1].result
                        ops += made
                    op.set_operand(0, rounded[x])
                    ops.append(op)
                    ops += _results_rounded(op, rule, module)
                    linears += 1
                    continue
            ops.append(op)
        module.ops = ops
        module.notes[self.name] = {"linears": linears, "roundings": len(rounded)}
        return linears


def _rounded(x: Value, rule: Rule, loc: str) -> list[Op]:
    """The ops that round an input, the last one as the rule says."""
    scratch = Builder(Module("scratch"))
    scratch.loc = loc
    before = scratch.op("round_values", x, rule=rule.around) if rule.around else x
    scratch.op("round_values", before, rule=rule.rounding, block=rule.block)
    return scratch.module.ops


def _results_rounded(op: Op, rule: Rule, module: Module) -> list[Op]:
    """What rounds the result of a linear, now read in its place."""
    if not rule.around:
        return []
    readers, outputs = list(op.result.uses), [n for n, v in module.outputs.items() if v is op.result]
    scratch = Builder(Module("scratch"))
    scratch.loc = op.loc
    after = scratch.op("round_values", op.result, rule=rule.around)
    for reader, index in readers:
        reader.set_operand(index, after)
    module.outputs.update(dict.fromkeys(outputs, after))
    return scratch.module.ops


def _qualifies(op: Op, rule: Rule) -> bool:
    producer = op.operands[1].producer
    if producer is None or producer.weight is None or weight_class(producer) == "experts":
        return False
    held = packed_form(producer.weight)
    return held is not None and held.scheme.name == rule.weights


def _is_rounded(x: Value, rule: Rule) -> bool:
    """Whether `x` comes from the very rounding that the rule asks for."""
    op = x.producer
    if op is None or op.name != "round_values" or op.attrs["channels"] != 0:
        return False
    return (op.attrs["rule"], op.attrs["block"]) == (rule.rounding, rule.block)
