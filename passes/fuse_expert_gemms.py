"""From single-expert sub-graphs to one `expert_mlp`: dispatch, every expert, combine.

The experts' weights become one lazy stack, so that a back end can index them by expert id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir import weights as w
from dsv4c.ir.attrs import Attr
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.levels import Level
from dsv4c.ir.rewrite import Bindings, Pat, match
from dsv4c.ir.weights import WeightExpr

from .base import Pass
from .cleanup import EliminateDeadCode


@dataclass(frozen=True)
class _Expert:
    """One expert: its weights, and the attributes of the `expert_mlp` that it can be part of."""

    w1: WeightExpr
    w3: WeightExpr
    w2: WeightExpr
    attrs: tuple[tuple[str, Attr], ...]


@dataclass(frozen=True)
class FuseExpertGemms(Pass):
    """Each dispatch whose experts are all clamped SwiGLU MLPs of one shape becomes an `expert_mlp`; exact.

    `module.notes["fuse_expert_gemms"]` says which stay apart and why.
    """

    name: ClassVar[str] = "fuse_expert_gemms"
    doc: ClassVar[str] = "merge the experts of a layer into one grouped MLP"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED

    def run(self, module: Module) -> int:
        fused, ops = 0, []
        kept: dict[str, str] = {}
        for op in module.ops:
            found = recognise(op) if op.name == "combine" else ""
            if isinstance(found, tuple):
                ops += _replace(module, op, *found)
                fused += 1
            elif found:
                kept[op.loc] = found
            ops.append(op)
        module.ops = ops
        EliminateDeadCode().run(module)
        module.notes[self.name] = {"fused": fused, "kept": kept}
        return fused


def _round(x: Pat, rule: str, *block: int, bind: str = "") -> Pat:
    """round_values of whole rows by `rule`, in blocks of that many values where it says so."""
    attrs: tuple[tuple[str, Attr], ...] = (("rule", rule), *(("block", b) for b in block), ("channels", 0))
    return Pat("round_values", (x,), bind, attrs)


def _as_is(x: Pat) -> Pat:
    return x


def _to_bf16(x: Pat) -> Pat:
    return _round(x, "bf16", 0)


def _to_fp16(x: Pat) -> Pat:
    return _round(x, "fp16", 0)


def _expert_of(product: Callable[[Pat], Pat], hidden: Callable[[Pat], Pat]) -> Pat:
    """A clamped SwiGLU MLP whose products and hidden values pass through the given roundings."""
    return product(Pat("linear", (
        hidden(Pat("scale_rows", (
            Pat("clamped_swiglu", (
                product(Pat("linear", (Pat(bind="x"), Pat("weight", bind="w1")))),
                product(Pat("linear", (Pat(bind="x"), Pat("weight", bind="w3")))),
            ), bind="act"),
            Pat(bind="gate"),
        ))),
        Pat("weight", bind="w2"),
    )))  # fmt: skip


_EXPERTS = {
    "none": _expert_of(_as_is, _as_is),
    "bf16": _expert_of(_to_bf16, _to_bf16),
    "e4m3": _expert_of(_to_bf16, lambda x: _round(_to_bf16(x), "e4m3", bind="codes")),
    "fp16": _expert_of(_to_fp16, _to_fp16),
    "mxfp8": _expert_of(_as_is, lambda x: _round(x, "e4m3", 32)),
    "bf16_rows": _expert_of(_as_is, _to_bf16),
    "int8_rows": _expert_of(_as_is, lambda x: _round(x, "int8", 32)),
    "e4m3_rows": _expert_of(_as_is, lambda x: _round(x, "e4m3", bind="codes")),
    "int8_token": _expert_of(_as_is, lambda x: _round(x, "int8", 0)),
}
"""What an expert looks like, by the `rounding` of the `expert_mlp` that it becomes."""


def recognise(combine: Op) -> tuple[Op, list[_Expert]] | str:
    """The dispatch and experts behind a combine, or why they cannot be fused."""
    experts: list[_Expert] = []
    source: Op | None = None
    for index, y in enumerate(combine.operands[2:]):
        outcomes = {rounding: match(pattern, y) for rounding, pattern in _EXPERTS.items()}
        rounding, outcome = max(outcomes.items(), key=lambda o: (o[1].bindings is not None, o[1].depth))
        if outcome.bindings is None:
            return f"expert {index} is no clamped SwiGLU MLP: {outcome.reason}"
        found = outcome.bindings
        producer = found["x"].producer
        if producer is None or producer.name != "dispatch" or (source or producer) is not producer:
            return f"expert {index} does not read the dispatch of the others"
        source = producer
        if found["x"] is not source.results[2 * index] or found["gate"] is not source.results[2 * index + 1]:
            return f"expert {index} reads the rows of another expert"
        experts.append(_expert(found, rounding))
    if source is None or len(experts) != source.attrs["experts"]:
        return "the combine does not take every expert of its dispatch"
    if combine.operands[0] is not source.operands[1] or combine.operands[1] is not source.operands[3]:
        return "the combine scatters by other ids or padding than the dispatch gathered by"
    if len({(e.w1.shape, e.w3.shape, e.w2.shape, e.attrs) for e in experts}) != 1:
        return "the experts differ in shape, limit or rounding"
    return source, experts


def _expert(found: Bindings, rounding: str) -> _Expert:
    w1, w3, w2, act = (found[name].producer for name in ("w1", "w3", "w2", "act"))
    assert w1 and w3 and w2 and act
    assert w1.weight and w3.weight and w2.weight
    attrs: dict[str, Attr] = {"limit": act.attrs["limit"], "rounding": rounding}
    if "codes" in found:
        codes = found["codes"].producer
        assert codes is not None
        attrs["block"] = codes.attrs["block"]
    return _Expert(w1.weight, w3.weight, w2.weight, tuple(attrs.items()))


def _replace(module: Module, combine: Op, dispatch: Op, experts: list[_Expert]) -> list[Op]:
    common = _common_dtype(experts)
    builder = Builder(Module(module.name))
    builder.loc = combine.loc
    pairs = tuple(w.concat((w.cast(e.w1, common), w.cast(e.w3, common))) for e in experts)
    w13 = builder.weight(w.stack(pairs), f"{combine.loc}.experts.w13")
    w2 = builder.weight(w.stack(tuple(w.cast(e.w2, common) for e in experts)), f"{combine.loc}.experts.w2")
    fused = builder.op("expert_mlp", *dispatch.operands, w13, w2, **dict(experts[0].attrs))
    combine.result.replace_with(fused)
    for name, value in module.outputs.items():
        if value is combine.result:
            module.outputs[name] = fused
    return builder.module.ops


def _common_dtype(experts: list[_Expert]) -> DType:
    """The experts' own dtype when they share one, else F32, which holds every format exactly."""
    found = {x.dtype for e in experts for x in (e.w1, e.w3, e.w2)}
    return found.pop() if len(found) == 1 else DType.F32
