"""The rounding points of the published inference code (`numerics=reference`), as ops and attributes.

Finds each place by what computes and what reads a value, never by its name. What a place rounds to stands in
`rounding_points`, by the generation that the module says it is of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from dsv4c.errors import PassError
from dsv4c.ir.attrs import Attr
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.ops import OPS
from dsv4c.ir.weights import WeightExpr

from .base import Effect, Pass
from .rounding_points import POINTS, Codes, Rules, Step, rules_of

_UNROUNDED = frozenset({
    "weight", "embed", "repeat_streams", "split_heads", "gather_rows", "positions", "entry_positions",
    "advance", "ring_write", "entries_append", "rope_angles", "position_bias", "hc_mix",
    "hc_head_mix", "sqrt_softplus", "route_topk", "route_hash", "dispatch", "clamp", "combine",
    "candidate_blocks", "index_restrict", "compress_tokens", "ngram_rows", "ngram_history", "engram_rows",
})  # fmt: skip
"""Ops whose results are exact, or FP32 in the reference too; rows of an Engram table are BF16 numbers."""

_FP32_READERS = frozenset({"sqrt_softplus", "compress", "position_bias"})
"""What reads a linear that the reference computes in FP32: router scores, compressor values and gates."""


@dataclass(frozen=True)
class ApplyReferenceRounding(Pass):
    """Inserts every rounding point of the reference.

    Attributes:
        without: points to leave out, separated by commas, to measure what each contributes.
    """

    name: ClassVar[str] = "apply_reference_rounding"
    doc: ClassVar[str] = "round where the reference implementation rounds"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL})
    without: str = ""

    def effect(self) -> Effect:
        return Effect(
            changes=("*",),
            measure="rows of the golden checkpoints against their official logits and streams,"
            " in tests/test_reference_numerics.py",
        )

    def run(self, module: Module) -> int:
        """Raises `PassError` on an unknown point or generation and on an op whose rounding is not known."""
        skipped = frozenset(filter(None, (w.strip() for w in self.without.split(","))))
        if skipped - POINTS.keys():
            names = ", ".join(sorted(skipped - POINTS.keys()))
            raise PassError(f"no rounding point {names}", where=self.name, allowed=", ".join(POINTS))
        rules = rules_of(module.meta.get("generation"))
        rounder = _Rounder(module, rules, frozenset(POINTS) - skipped)
        rounder.run()
        module.notes[self.name] = dict(sorted(rounder.counts.items()))
        return sum(rounder.counts.values())


@dataclass
class _Rounder:
    """One run over a module.

    Attributes:
        rules: of the module's generation.
        points: those to insert.
        after: what goes behind each op of the module.
        behind: an inserted value -> the op it goes behind.
        inputs: a linear's input -> its quantised form, made once for all its readers.
        done: those forms.
        rows: what a state grows by, rounded when the first of the layers that read it was seen.
        counts: places changed, by point.
    """

    module: Module
    rules: Rules
    points: frozenset[str]
    after: dict[Op, list[Op]] = field(default_factory=dict)
    behind: dict[Value, Op] = field(default_factory=dict)
    inputs: dict[Value, Value] = field(default_factory=dict)
    done: set[Value] = field(default_factory=set)
    rows: set[Value] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        ops = list(self.module.ops)
        for op in ops:
            if op.name in _RULES:
                _RULES[op.name](self, op)
            elif op.name not in _UNROUNDED:
                raise PassError(
                    f"{op.name} has no rounding in the reference's numerics",
                    where=f"apply_reference_rounding, {op.loc}",
                    allowed=", ".join(sorted({*_RULES, *_UNROUNDED})),
                )
        for op in ops:  # behind the roundings of their operands
            if op.name == "attention":
                self.round_kv(op)
            elif op.name == "index_scores":
                self.round_index(op)
        for op in ops:
            if op.name == "linear" and _quantised(op.operands[1]) and not _is_fp32(op):
                self.quantise_input(op)
        self.module.ops = [new for op in ops for new in (op, *self.after.get(op, ()))]

    # ------------------------------------------------------------------------- insertion

    def wants(self, point: str) -> bool:
        """Whether `point` is to be inserted; counts it."""
        if point in self.points:
            self.counts[point] = self.counts.get(point, 0) + 1
        return point in self.points

    def chain(self, value: Value, name: str, **attrs: Attr) -> Value:
        """`name` over `value`, standing behind what makes it."""
        anchor = self.behind.get(value) or value.producer
        assert anchor is not None
        op = Op(OPS[name], [value], attrs, anchor.loc)
        self.after.setdefault(anchor, []).append(op)
        self.behind[op.result] = anchor
        return op.result

    def round(self, point: str, value: Value, *steps: Step) -> Value:
        """Every reader of `value` reads it through `steps`; what they read."""
        if not self.wants(point):
            return value
        readers, new = list(value.uses), value
        for name, attrs in steps:
            new = self.chain(new, name, **attrs)
        for op, index in readers:
            op.set_operand(index, new)
        for key, output in self.module.outputs.items():
            if output is value:
                self.module.outputs[key] = new
        return new

    def bf16(self, point: str, value: Value) -> None:
        self.round(point, value, ("round_values", {"rule": "bf16"}))

    # ------------------------------------------------------------- places with two parts

    def round_kv(self, op: Op) -> None:
        """The keys of this call and the entries an attention reads."""
        rows = [(op.operands[1], self.rules.keys)]
        rows += [(_appended(e), self.rules.entries) for e in op.operands[6:7]]
        for value, codes in rows:
            channels = 0 if codes.rotated else _width(value) - _rotated(value)
            if codes.rotated or channels:
                self.round_rows("kv", value, ("round_values", _attrs(codes) | {"channels": channels}))

    def round_index(self, op: Op) -> None:
        for value in (op.operands[0], _appended(op.operands[2])):
            self.round_rows("index", value, *self.rules.index)

    def round_rows(self, point: str, value: Value, *steps: Step) -> None:
        """As `round`, unless another layer that reads the same state has seen to it."""
        if value not in self.rows:
            self.rows.add(self.round(point, value, *steps))

    def quantise_input(self, op: Op) -> None:
        """Behind a dispatch, the rows are rounded before they are gathered: the same, and once."""
        x, reader = op.operands[0], op
        if x.producer is not None and x.producer.name == "dispatch":
            if x.producer.operands[0] in self.done:
                return  # rounded when the first of its experts was seen
            dispatch = x.producer
            readers = [r for rows in dispatch.results[::2] for r in rows.users()]
            if all(r.name == "linear" and _quantised(r.operands[1]) for r in readers):
                x, reader = dispatch.operands[0], dispatch
        if x not in self.inputs and self.wants("linear_input"):
            self.inputs[x] = self.chain(x, "round_values", **_attrs(self.rules.linear_input))
            self.done.add(self.inputs[x])
        reader.set_operand(0, self.inputs.get(x, x))


def _linear(r: _Rounder, op: Op) -> None:
    if not _is_fp32(op) and op.result not in r.module.output_values():
        r.bf16("linear_output", op.result)


def _set(point: str, name: str, value: Attr) -> Callable[[_Rounder, Op], None]:
    def rule(r: _Rounder, op: Op) -> None:
        if r.wants(point):
            op.attrs[name] = value

    return rule


def _scale(r: _Rounder, op: Op) -> None:
    """Of index weights; router logits are FP32, and so is their temperature."""
    if not _read_in_fp32(op.result):
        r.bf16("index_weights", op.result)


def _topk(r: _Rounder, op: Op) -> None:
    if r.rules.ascending and r.wants("index_order"):
        op.attrs["ascending"] = True


def _route_weights(r: _Rounder, op: Op) -> None:
    if not r.rules.route_eps and r.wants("route_eps"):
        op.attrs["eps"] = 0.0


def _result(point: str) -> Callable[[_Rounder, Op], None]:
    return lambda r, op: r.bf16(point, op.result)


def _hidden(r: _Rounder, op: Op) -> None:
    """What enters w2; a SwiGLU that is still to be scaled by a routing weight stays FP32."""
    if any(user.name == "linear" for user in op.result.users()):
        r.bf16("hidden", op.result)


def _attention(r: _Rounder, op: Op) -> None:
    _set("probabilities", "rounding", "reference")(r, op)
    r.bf16("attention", op.result)


_RULES: dict[str, Callable[[_Rounder, Op], None]] = {
    "linear": _linear,
    "grouped_linear": _result("linear_output"),
    "rms_norm": _result("norm"),
    "unit_norm": _set("query_norm", "rounding", "reference"),
    "rotary": _result("rotary"),
    "compress": _result("entries"),
    "scale": _scale,
    "index_scores": _set("index_scores", "rounding", "reference"),
    "attention": _attention,
    "hc_collapse": _result("streams"),
    "hc_expand": _result("streams"),
    "swiglu": _hidden,
    "scale_rows": _hidden,
    "add": _result("experts_sum"),
    "route_weights": _route_weights,
    "index_topk": _topk,
    "merge_images": _result("images"),
    "engram_gate": _result("engram"),
}
"""What happens at each op."""


def _is_fp32(op: Op) -> bool:
    """Whether the reference computes this linear in FP32: router, compressor, and the logits."""
    x = op.operands[0].producer
    return (x is not None and x.name == "gather_rows") or _read_in_fp32(op.result)


def _read_in_fp32(value: Value) -> bool:
    return any(
        user.name in _FP32_READERS or (user.name == "scale" and _read_in_fp32(user.result))
        for user in value.users()
    )


def _attrs(codes: Codes) -> dict[str, Attr]:
    return {"rule": codes.rule, "block": codes.block}


def _quantised(weight: Value) -> bool:
    """Whether a weight is stored as FP8 or FP4 codes."""

    def stored(x: WeightExpr) -> bool:
        return x.op in ("decode_fp8", "decode_fp4") or (bool(x.args) and all(stored(a) for a in x.args))

    op = weight.producer
    return op is not None and op.weight is not None and stored(op.weight)


def _appended(entries: Value) -> Value:
    """The rows that a state of entries grows by."""
    op = entries.producer
    if op is None or op.name != "entries_append":
        made = op.name if op is not None else "an argument"
        raise PassError(
            f"entries are {made}", where="apply_reference_rounding", allowed="entries_append of this step"
        )
    return op.operands[1]


def _rotated(value: Value) -> int:
    """How many of the last channels a rotary turned."""
    op = value.producer
    while op is not None and op.name == "round_values":
        op = op.operands[0].producer
    return 2 * _width(op.operands[1]) if op is not None and op.name == "rotary" else 0


def _width(value: Value) -> int:
    width = value.type.shape[-1]
    assert isinstance(width, int)
    return width
