"""Small fusions by pattern: the clamps of SwiGLU, and index scores with their top-k."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.rewrite import Bindings, Pat, Rule, any_, apply_rules

from .base import Pass
from .merge_projections import rewire


def _limits(bindings: Bindings, op: Op) -> str:
    gate, up = (bindings[k].producer for k in ("clamped_gate", "clamped_up"))
    assert gate is not None and up is not None
    limit = gate.attrs["high"]
    if gate.attrs["low"] != -inf or up.attrs["high"] != limit or up.attrs["low"] != -limit:  # type: ignore[operator]
        return f"the clamps are not (-inf, L] and [-L, L]: {gate.attrs} and {up.attrs}"
    return ""


def _clamped_swiglu(b: Builder, bindings: Bindings, op: Op) -> Value:
    gate = bindings["clamped_gate"].producer
    assert gate is not None
    return b.op("clamped_swiglu", bindings["gate"], bindings["up"], limit=gate.attrs["high"])


CLAMPED_SWIGLU = Rule(
    "clamped_swiglu",
    Pat("swiglu", (Pat("clamp", (any_("gate"),), "clamped_gate"), Pat("clamp", (any_("up"),), "clamped_up"))),
    _clamped_swiglu,
    _limits,
)


def _index_select(b: Builder, bindings: Bindings, op: Op) -> Value:
    scores = bindings["scores"].producer
    assert scores is not None
    attrs = {name: scores.attrs[name] for name in ("ratio", "rounding")}
    attrs |= {name: op.attrs[name] for name in ("k", "ascending")}
    return b.op("index_select", *scores.operands, **attrs)


INDEX_SELECT = Rule(
    "index_select", Pat("index_topk", (Pat("index_scores", bind="scores", single_use=True),)), _index_select
)


def _restricted_select(b: Builder, bindings: Bindings, op: Op) -> Value:
    scores, restrict = bindings["scores"].producer, bindings["restricted"].producer
    assert scores is not None and restrict is not None
    attrs = {name: scores.attrs[name] for name in ("ratio", "rounding")}
    attrs |= {name: op.attrs[name] for name in ("k", "ascending")}
    size = restrict.attrs["size"]
    return b.op("index_select", *scores.operands, bindings["blocks"], size=size, **attrs)


RESTRICTED_SELECT = Rule(
    "restricted_select",
    Pat("index_topk", (
        Pat("index_restrict", (Pat("index_scores", bind="scores", single_use=True), any_("blocks")),
            "restricted", single_use=True),
    )),
    _restricted_select,
)  # fmt: skip


@dataclass(frozen=True)
class FuseSwiglu(Pass):
    """clamp, clamp, swiglu -> clamped_swiglu; exact."""

    name: ClassVar[str] = "fuse_swiglu"
    doc: ClassVar[str] = "fold the two clamps of an MLP into its SwiGLU"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    rules: ClassVar[tuple[Rule, ...]] = (CLAMPED_SWIGLU,)


@dataclass(frozen=True)
class FuseIndexSelect(Pass):
    """index_scores, index_topk -> index_select, so that no score per entry is kept; exact.

    With index_restrict between them the restriction is part of the op, which then scores nothing outside the
    blocks; where candidate_blocks reads the same scores the three become index_candidates.
    """

    name: ClassVar[str] = "fuse_index_select"
    doc: ClassVar[str] = "select index entries without keeping every score"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    rules: ClassVar[tuple[Rule, ...]] = (INDEX_SELECT, RESTRICTED_SELECT)

    def run(self, module: Module) -> int:
        kept: dict[str, str] = {}
        made = self._candidates(module, kept) + apply_rules(module, self.rules)
        if kept:
            module.notes[self.name] = {"kept": kept}
        return made

    def explain(self, module: Module) -> list[str]:
        tried = clone(module)
        self._candidates(tried, {})  # what they take is no near miss of the rules
        return super().explain(tried)

    def _candidates(self, module: Module, kept: dict[str, str]) -> int:
        made = 0
        for scores in [op for op in module.ops if op.name == "index_scores"]:
            readers = {op.name: op for op in scores.result.users()}
            if "candidate_blocks" not in readers:
                continue
            if reason := _apart(module, scores, readers):
                kept[scores.loc] = reason
                continue
            _fuse_candidates(module, scores, readers["index_topk"], readers["candidate_blocks"])
            made += 1
        return made


def _apart(module: Module, scores: Op, readers: dict[str, Op]) -> str:
    """Why the scores, the selection and the candidates cannot be one op, or ""."""
    names, blocks = sorted(op.name for op in scores.result.users()), readers["candidate_blocks"]
    if names != ["candidate_blocks", "index_topk"]:
        return f"the scores are read by {', '.join(names)}"
    if scores.result in module.output_values():
        return "the scores are an output"
    if scores.attrs["rounding"] != "none":
        return "the scores are rounded"
    if readers["index_topk"].attrs["ascending"]:
        return "the selection is wanted in the order of its ids"
    if blocks.operands[1:] != scores.operands[3:] or blocks.attrs["ratio"] != scores.attrs["ratio"]:
        return "the candidates are of other entries than are scored"
    return ""


def _fuse_candidates(module: Module, scores: Op, topk: Op, blocks: Op) -> None:
    """Replace the three ops by one in place of the first."""
    builder = Builder(Module(module.name))
    builder.loc = scores.loc
    made = builder.multi(
        "index_candidates", *scores.operands, ratio=scores.attrs["ratio"], k=topk.attrs["k"],
        size=blocks.attrs["size"], count=blocks.attrs["count"],
    )  # fmt: skip
    for old, new in zip((topk.result, blocks.result), made.results, strict=True):
        rewire(module, old, new)
    module.ops[module.ops.index(scores)] = made
    for op in (topk, blocks, scores):
        op.drop()
    module.ops = [op for op in module.ops if op not in (topk, blocks)]
