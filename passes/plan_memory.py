"""Memory of the temporaries of a step by liveness: who may share a place, and the peak that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx

from dsv4c.errors import PassError
from dsv4c.ir.analysis import live_ranges
from dsv4c.ir.cost import Sizes, bytes_of
from dsv4c.ir.graph import Module, Op, Value

from .base import Pass

ALIGN = 64
VIEWS = frozenset({"split_heads"})
"""Ops whose result is their operand under another shape."""


@dataclass(frozen=True)
class Place:
    """Where one temporary lies: bytes from the start of the arena, and its size, rounded up to 64."""

    value: Value
    offset: int
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """A placement of all temporaries of one step.

    Attributes:
        places: no two that are live together overlap.
        peak: bytes of the arena.
        bound: the most bytes live at one op; no placement can do with less.
        total: bytes if nothing were shared.
        timeline: bytes live at each op that computes.
    """

    places: tuple[Place, ...]
    peak: int
    bound: int
    total: int
    timeline: tuple[tuple[Op, int], ...]


def plan(module: Module, sizes: Sizes) -> Plan:
    """Place every temporary, largest first, at the lowest offset that is free over its whole life.

    Weights, arguments and state successors (written in place) need no place; a view shares its operand's.
    """
    ranges = _lives(module)
    sized = {v: -(-bytes_of(v, sizes) // ALIGN) * ALIGN for v in ranges}
    conflicts = _conflicts(ranges)
    at: dict[Value, int] = {}
    for value in sorted(ranges, key=lambda v: (-sized[v], ranges[v][0])):
        taken = sorted((at[o], at[o] + sized[o]) for o in conflicts[value] if o in at)
        offset = 0
        for start, stop in taken:
            if offset + sized[value] <= start:
                break
            offset = max(offset, stop)
        at[value] = offset
    places = tuple(Place(v, at[v], sized[v], *ranges[v]) for v in ranges)
    timeline = []
    for index, op in enumerate(module.ops):
        if op.weight is None:
            timeline.append((op, sum(p.nbytes for p in places if p.first <= index <= p.last)))
    return Plan(
        places,
        max((p.offset + p.nbytes for p in places), default=0),
        max((live for _, live in timeline), default=0),
        sum(p.nbytes for p in places),
        tuple(timeline),
    )


def _lives(module: Module) -> dict[Value, tuple[int, int]]:
    """Live ranges of the values that need memory of their own; a view prolongs the life of what it shows."""
    ranges = live_ranges(module)
    home: dict[Value, Value] = {}
    for op in module.ops:
        if op.name in VIEWS:
            home[op.result] = home.get(op.operands[0], op.operands[0])
    for view, shown in home.items():
        if shown in ranges:
            ranges[shown] = ranges[shown][0], max(ranges[shown][1], ranges[view][1])
    return {
        v: r for v, r in ranges.items()
        if v not in home and v.producer is not None and v.producer.weight is None
        and not (v.producer.definition.consumes is not None and v is v.producer.results[0])
    }  # fmt: skip


def _conflicts(ranges: dict[Value, tuple[int, int]]) -> nx.Graph[Value]:
    """Values that are live at one op together."""
    graph: nx.Graph[Value] = nx.Graph()
    graph.add_nodes_from(ranges)
    active: list[Value] = []
    for value in sorted(ranges, key=lambda v: ranges[v][0]):
        active = [v for v in active if ranges[v][1] >= ranges[value][0]]
        graph.add_edges_from((value, other) for other in active)
        active.append(value)
    return graph


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Plans the temporaries of a decode step and of a prefill step and leaves the peaks for the report.

    Nothing in the graph changes. `tokens` is the length of the prefill step, `batch` of both.
    """

    name: ClassVar[str] = "plan_memory"
    doc: ClassVar[str] = "place the temporaries of a step by liveness; the planned peak goes to the report"
    tokens: int = 256
    batch: int = 1

    def run(self, module: Module) -> int:
        if self.tokens < 1 or self.batch < 1:
            raise PassError(
                f"tokens = {self.tokens}, batch = {self.batch}", where=self.name, allowed="1 or more"
            )
        steps = [self._facts(module, tokens) for tokens in sorted({1, self.tokens})]
        module.notes[self.name] = {"steps": steps}
        return 0

    def _facts(self, module: Module, tokens: int) -> dict[str, Any]:
        found = plan(module, _sizes(self.batch, tokens))
        return {
            "batch": self.batch, "tokens": tokens,
            "peak": found.peak, "bound": found.bound, "total": found.total,
            "temporaries": len(found.places),
            "timeline": [{"op": op.name, "loc": op.loc, "live": live} for op, live in found.timeline],
        }  # fmt: skip


def _sizes(batch: int, tokens: int) -> Sizes:
    """One row of logits; a context of 4096 where a temporary depends on it."""
    return {"B": batch, "T": tokens, "L": 1, "ctx": 4096, "routed rows": max(1, batch * tokens)}
