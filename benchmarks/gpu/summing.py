"""From times of launches to a table by kind of kernel, and to goals. Pure arithmetic: knows no device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsv4c.runtime.container.costs import Needs, Rates, codes_of
from dsv4c.runtime.container.plan import Plan, Program

COPY_GOAL, MATRIX_GOAL = 0.8, 0.6
"""Shares of measured ceilings: of copies for kernels that wait for memory in decode, of one large product of
the same numbers for grouped products of many tokens."""
MANY_TOKENS = 4096
MATTERS = 0.02
"""Kernels below this share of a step have no goal: they take microseconds."""
GROUPED = ("expert_up", "expert_down", "expert_up_codes", "expert_down_codes")


@dataclass(frozen=True)
class Row:
    """All launches of one kind of kernel in a step.

    Attributes:
        seconds: together; None where nothing was measured.
        flops, bytes: by the meaning of ops, see `ir.cost`; of experts those that were chosen.
        least: the seconds of the roofline; None where a figure is not known.
        bound: what most of `least` goes to.
        factors: what its matrix units multiply, "bf16", "fp8" or "int8".
    """

    kernel: str
    launches: int
    seconds: float | None
    flops: float
    bytes: float
    least: float | None
    bound: str
    factors: str = "bf16"

    @property
    def bandwidth(self) -> float | None:
        return self.bytes / self.seconds if self.seconds else None

    @property
    def rate(self) -> float | None:
        return self.flops / self.seconds if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_per_second": self.bandwidth, "flops_per_second": self.rate}


def rows_of(
    plan: Plan, program: Program, needs: Sequence[Needs], seconds: Sequence[float], rates: Rates
) -> list[Row]:
    """A row per kind of kernel, those first that take longest.

    Args:
        seconds: of each launch; empty where nothing was measured.
    """
    groups: dict[str, list[int]] = {}
    for index, launch in enumerate(program.launches):
        groups.setdefault(plan.kernels[launch.kernel].name, []).append(index)
    rows = []
    for name, indices in groups.items():
        kernels = [plan.kernels[program.launches[i].kernel] for i in indices]
        found = [rates.least(k, needs[i]) for k, i in zip(kernels, indices, strict=True)]
        spent = dict.fromkeys(("memory", "compute", "unknown"), 0.0)
        for one, bound in found:
            spent[bound] += one or 1.0
        whole = sum((needs[i] for i in indices), Needs())
        taken = sum(seconds[i] for i in indices) if seconds else None
        least = sum(one or 0.0 for one, _ in found) if not spent["unknown"] else None
        bound = max(spent, key=lambda key: spent[key])
        factors = codes_of(kernels[0].constants) or "bf16"
        rows.append(Row(name, len(indices), taken, whole.flops, whole.bytes, least, bound, factors))
    return sorted(rows, key=lambda row: -(row.seconds or row.least or 0.0))


@dataclass(frozen=True)
class Goal:
    """What was wanted and what was reached, both as shares of a ceiling; None where nothing was measured."""

    name: str
    wanted: float
    reached: float | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.reached is None else "met" if self.reached >= self.wanted else "missed"


def goals_of(kind: str, tokens: int, rows: Sequence[Row], rates: Rates) -> list[Goal]:
    """The goals of a step: of its memory-bound kernels in decode, of grouped products at many tokens."""
    whole = sum(row.seconds or row.least or 0.0 for row in rows) or 1.0
    out = []
    if kind == "decode":
        for row in rows:
            if row.bound == "memory" and (row.seconds or row.least or 0.0) >= MATTERS * whole:
                reached = _share(row.bandwidth, rates.bandwidth)
                out.append(Goal(f"{row.kernel}: of copy bandwidth", COPY_GOAL, reached))
    elif tokens >= MANY_TOKENS:
        for factors in dict.fromkeys(row.factors for row in rows if row.kernel in GROUPED):
            grouped = [row for row in rows if row.kernel in GROUPED and row.factors == factors]
            seconds = sum(row.seconds or 0.0 for row in grouped)
            rate = sum(row.flops for row in grouped) / seconds if seconds else None
            name = f"grouped products at {tokens} tokens: of the {factors.upper()} matrix peak"
            out.append(Goal(name, MATRIX_GOAL, _share(rate, rates.of(factors))))
    return out


def _share(value: float | None, ceiling: float | None) -> float | None:
    return value / ceiling if value is not None and ceiling else None


# ---------------------------------------------------------------------------------------- for readers


def table(rows: Sequence[Row], rates: Rates) -> str:
    """Times, what was reached, and the least time, as Markdown."""
    head = ("kernel", "launches", "ms", "GB/s", "of copy", "TFLOP/s", "of peak", "bound", "least ms", "roof")
    lines = [head, ("---",) * len(head)]
    for row in [*rows, total(rows)]:
        roof = row.least / row.seconds if row.least is not None and row.seconds else None
        peak = rates.of(row.factors)
        lines.append((
            row.kernel, str(row.launches), _number(row.seconds, 1e3), _number(row.bandwidth, 1e-9),
            _percent(_share(row.bandwidth, rates.bandwidth)), _number(row.rate, 1e-12),
            _percent(_share(row.rate, peak)), row.bound, _number(row.least, 1e3), _percent(roof),
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def total(rows: Sequence[Row]) -> Row:
    """All rows together."""
    return Row(
        "together", sum(r.launches for r in rows), _sum(r.seconds for r in rows), sum(r.flops for r in rows),
        sum(r.bytes for r in rows), _sum(r.least for r in rows), "",
    )  # fmt: skip


def goals_table(goals: Sequence[Goal]) -> str:
    lines = ["| goal | wanted | reached | |", "|---|---|---|---|"]
    lines += [f"| {g.name} | {_percent(g.wanted)} | {_percent(g.reached)} | {g.verdict} |" for g in goals]
    return "\n".join(lines)


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [v for v in found if v is not None]
    return sum(known) if len(known) == len(found) else None


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{factor * value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
