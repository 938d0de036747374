"""Rounding points in front of matrix products whose weights are narrow numbers, so that both factors are.

Knows which products qualify; what a rounding point does is the op `round_values`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dsv4c.errors import PassError, unknown
from dsv4c.ir.dtypes import DType
from dsv4c.ir.formats import SCHEMES
from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.packed import is_bf16, packed_form

from .base import Effect, Pass
from .weight_classes import weight_class


@dataclass(frozen=True)
class Rule:
    """How inputs are rounded (`round_values`), and in front of weights of which schemes.

    Attributes:
        weights: names of `ir.formats.SCHEMES`.
        before: the rule that inputs are rounded by ahead of that; "" for none.
        after: the rule that results are rounded by; "" for none.
        experts: what `expert_mlp.rounding` calls the same roundings in routed experts; "" leaves those alone.
        ops: the products that take part.
        inputs: what the attribute of that name says of these products.
        spares: weight classes whose products do not take part.
    """

    rounding: str
    block: int
    weights: frozenset[str]
    before: str = ""
    after: str = ""
    experts: str = ""
    ops: frozenset[str] = frozenset({"linear"})
    inputs: str = "any"
    spares: frozenset[str] = frozenset()


_INT8 = frozenset({"int8"})
_INTEGERS = frozenset({"int8", "int4", "int4_g64", "int4_g128", "mxfp4", "nvfp4"})
"""Schemes whose codes are integers, or halves of them."""
_PLAIN = ("bf16", "fp16")
"""Roundings without a scale."""

RULES = {
    "int8_token": Rule("int8", 0, _INT8),
    "int8_token_bf16": Rule("int8", 0, _INT8, before="bf16", after="bf16"),
    "int8": Rule(
        "int8", 32, _INTEGERS, experts="int8_rows", inputs="int8",
        ops=frozenset({"linear", "grouped_linear"}), spares=frozenset({"router"}),
    ),
    "mxfp8": Rule("e4m3", 32, frozenset({"fp8", "fp8_f32", "mxfp8", "mxfp4"}), experts="mxfp8"),
    "e4m3": Rule(
        "e4m3", 128, frozenset({"fp8", "fp8_f32", "fp8_fnuz", "mxfp8", "mxfp4"}), experts="e4m3_rows"
    ),
    "w8a8": Rule("int8", 0, _INT8, experts="int8_token"),
    "fp16": Rule(
        "fp16", 0, frozenset({"fp16"}), after="fp16", experts="fp16",
        ops=frozenset({"linear", "grouped_linear"}),
    ),
    "bf16_fp8": Rule(
        "bf16", 0, frozenset({"fp8", "mxfp8", "mxfp4"}), after="bf16", experts="bf16",
        ops=frozenset({"linear", "grouped_linear"}),
    ),
    "bf16": Rule(
        "bf16", 0, frozenset(SCHEMES) - {"f32", "fp16"}, experts="bf16_rows", inputs="bf16",
        ops=frozenset({"linear", "grouped_linear"}), spares=frozenset({"router"}),
    ),
}  # fmt: skip
"""Rule by name. With `int8_token` one scale covers a token's whole input row and one a whole weight row, so a
product is the int32 dot product of the codes times two scales. `int8_token_bf16` is the same for devices that
quantise from BF16 and whose product of codes gives BF16. `int8` has a scale for every 32 channels of a token,
so that a block's product is an integer, times two scales; products whose rows another rule has rounded stay
what they are, so that `bf16` behind it takes what is left. `mxfp8` rounds inputs to E4M3 with a power of two
for every 32 channels (specification 3.2 with smaller blocks); like the published code it leaves the input of
the grouped product alone. `e4m3` is the same in blocks of 128, as the published code has it, and `w8a8` is
`int8_token` with routed experts: both for kernels that multiply codes. `fp16` is a product of FP16 numbers
whose result is one. `bf16_fp8` rounds inputs and results of products with E4M3 and E2M1 matrices to BF16, for
nodes that take and give that. `bf16` rounds inputs to BF16, as the published code does, for products of BF16
numbers with FP32 sums, and leaves the choice of experts alone. Rules without scales leave inputs alone that
another rule has made codes of."""


@dataclass(frozen=True)
class QuantiseActivations(Pass):
    """Rounds the inputs of every product whose weight is stored in one of the rule's schemes.

    Products that read one value share one rounding. Routed experts take part only under rules that say what
    `fuse_expert_gemms` is to make of them; their rows are rounded before they are dispatched.

    Notes: `linears`, how many read rounded inputs, and `roundings`, how many ops that took.
    """

    name: ClassVar[str] = "quantise_activations"
    doc: ClassVar[str] = "round the inputs of matrix products whose weights are narrow numbers"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})
    rule: str = "int8_token"

    def effect(self) -> Effect:
        return Effect(changes=("*",), measure="loss on held-out text before and after")

    def run(self, module: Module) -> int:
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES, PassError, self.name)
        run = _Run(module, RULES[self.rule])
        for op in module.ops:
            run.take(op)
        module.ops = run.ops
        module.notes[self.name] = {"linears": run.linears, "roundings": len(run.rounded)}
        return run.linears


@dataclass
class _Run:
    """One run over a module.

    Attributes:
        rounded: a value -> what it is rounded to.
        dispatches: those whose rows have become rounded.
        ops: the module's, with roundings between them.
    """

    module: Module
    rule: Rule
    rounded: dict[Value, Value] = field(default_factory=dict)
    dispatches: set[Op] = field(default_factory=set)
    ops: list[Op] = field(default_factory=list)
    linears: int = 0

    def take(self, op: Op) -> None:
        rule, done = self.rule, True
        if op.name == "dispatch" and self._feeds_products(op):
            self._round_input(op)
            self.dispatches.add(op)
        elif op.name == "expert_mlp" and _experts_qualify(op, rule):
            if not _is_rounded(op.operands[0], rule):
                self._round_input(op)
            op.attrs["rounding"] = rule.experts
            self.linears += 1
        elif (
            op.name in rule.ops and op.attrs["inputs"] in ("any", rule.inputs) and _qualifies(op, rule)
            and not _is_coded(op.operands[0], rule)
        ):  # fmt: skip
            source = op.operands[0].producer
            there = _is_rounded(op.operands[0], rule) or _is_rounded_dispatch(source, rule)
            done = there and source not in self.dispatches and _result_is_rounded(op, rule)
            if not there:
                self._round_input(op)
            if op.attrs["inputs"] != rule.inputs:
                op.attrs["inputs"], done = rule.inputs, False
        self.ops.append(op)
        if not done:
            self.ops += _results_rounded(op, rule, self.module)
            self.linears += 1

    def _round_input(self, op: Op) -> None:
        x = op.operands[0]
        if x not in self.rounded:
            made = _rounded(x, self.rule, op.loc)
            self.rounded[x] = made[-1].result
            self.ops += made
        op.set_operand(0, self.rounded[x])

    def _feeds_products(self, dispatch: Op) -> bool:
        """Whether nothing but products that qualify reads the rows, which are not rounded yet."""
        readers = [use for rows in dispatch.results[::2] for use in rows.uses]
        return (
            bool(readers)
            and not _is_rounded(dispatch.operands[0], self.rule)
            and not _is_coded(dispatch.operands[0], self.rule)
            and all(at == 0 and op.name == "linear" and _qualifies(op, self.rule) for op, at in readers)
        )


def _rounded(x: Value, rule: Rule, loc: str) -> list[Op]:
    """The ops that round an input, the last one as the rule says."""
    scratch = Builder(Module("scratch"))
    scratch.loc = loc
    before = scratch.op("round_values", x, rule=rule.before) if rule.before else x
    scratch.op("round_values", before, rule=rule.rounding, block=rule.block)
    return scratch.module.ops


def _results_rounded(op: Op, rule: Rule, module: Module) -> list[Op]:
    """What rounds the result of a product, now read in its place."""
    if not rule.after:
        return []
    readers, outputs = list(op.result.uses), [n for n, v in module.outputs.items() if v is op.result]
    scratch = Builder(Module("scratch"))
    scratch.loc = op.loc
    after = scratch.op("round_values", op.result, rule=rule.after)
    for reader, index in readers:
        reader.set_operand(index, after)
    module.outputs.update(dict.fromkeys(outputs, after))
    return scratch.module.ops


def _qualifies(op: Op, rule: Rule) -> bool:
    """Whether a product's weight is stored in a scheme of the rule, and no expert's that the rule leaves."""
    producer = op.operands[1].producer
    if producer is None or (weight_class(producer) == "experts" and not rule.experts):
        return False
    return weight_class(producer) not in rule.spares and _scheme(producer) in rule.weights


def _experts_qualify(op: Op, rule: Rule) -> bool:
    if not rule.experts or op.attrs["rounding"] != "none":
        return False
    matrices = [value.producer for value in op.operands[4:6]]
    return all(matrix is not None and _scheme(matrix) in rule.weights for matrix in matrices)


def _scheme(op: Op) -> str:
    """What a `weight` op is stored in, as far as rules ask for it; "" for anything else."""
    if op.weight is None:
        return ""
    held = packed_form(op.weight)
    if held is not None:
        return held.scheme.name
    if op.weight.dtype is DType.F16:
        return "fp16"
    return "bf16" if is_bf16(op.weight) else ""


def _is_rounded(x: Value, rule: Rule) -> bool:
    """Whether `x` comes from the very rounding that the rule asks for."""
    op = x.producer
    if op is None or op.name != "round_values" or op.attrs["channels"] != 0:
        return False
    return (op.attrs["rule"], op.attrs["block"]) == (rule.rounding, rule.block)


def _is_coded(x: Value, rule: Rule) -> bool:
    """Whether `x` is codes by another rule, which one without scales must not round again."""
    op = x.producer
    if op is not None and op.name == "dispatch":
        op = op.operands[0].producer
    coded = op is not None and op.name == "round_values" and op.attrs["rule"] not in _PLAIN
    return coded and rule.rounding in _PLAIN


def _result_is_rounded(op: Op, rule: Rule) -> bool:
    users = op.result.users()
    by_rule = (u.name == "round_values" and u.attrs["rule"] == rule.after for u in users)
    return not rule.after or (bool(users) and all(by_rule))


def _is_rounded_dispatch(op: Op | None, rule: Rule) -> bool:
    return op is not None and op.name == "dispatch" and _is_rounded(op.operands[0], rule)
