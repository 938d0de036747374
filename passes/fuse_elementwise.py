"""Small fusions by pattern: the clamps of SwiGLU, and index scores with their top-k."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from dsv4c.ir.graph import Builder, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.rewrite import Bindings, Pat, Rule, any_

from .base import Pass


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
    return b.op("index_select", *scores.operands, k=op.attrs["k"], **attrs)


INDEX_SELECT = Rule(
    "index_select", Pat("index_topk", (Pat("index_scores", bind="scores", single_use=True),)), _index_select
)


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
    """index_scores, index_topk -> index_select, so that no score per entry is kept; exact."""

    name: ClassVar[str] = "fuse_index_select"
    doc: ClassVar[str] = "select index entries without keeping every score"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    rules: ClassVar[tuple[Rule, ...]] = (INDEX_SELECT,)
