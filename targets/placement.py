"""Splits a model over equal devices: a pipeline of stages, and inside a stage experts side by side.

Every device of a stage holds the stage's dense weights and the state of its own share of the sequences; each
routed expert of a layer lives on exactly one of them. Knows bytes and loads, no times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from dsv4c.errors import TargetError
from dsv4c.passes.statistics import Statistics

from .workload import Workload

MOST_DEVICES = 2048
"""How far the search for the smallest number of devices that fits goes."""

HEADROOM = 0.1
"""Share of a device's memory that is left to activations, buffers of exchanges and the run time."""

Shares = Mapping[int, Sequence[float]]
"""Layer -> for each expert the share of tokens that choose it (they sum to the experts per token)."""

Held = tuple[tuple[int, ...], ...]
"""For each device of a stage the experts of one layer that it holds, ascending."""


@dataclass(frozen=True)
class Stage:
    """Consecutive layers on some devices.

    Attributes:
        first, last: layers, both included.
        devices: numbers of the devices.
        experts: for each layer the experts of each device.
    """

    first: int
    last: int
    devices: tuple[int, ...]
    experts: tuple[Held, ...]

    def layers(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Memory:
    """What one device holds, in bytes: `dense` weights (replicated in its stage), `experts`, `state`."""

    dense: int
    experts: int
    state: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.state


@dataclass(frozen=True)
class Placement:
    """Where everything is.

    Attributes:
        memory: of each device.
        usable: bytes a device may fill; None where its memory is not known.
    """

    stages: tuple[Stage, ...]
    memory: tuple[Memory, ...]
    usable: int | None

    @property
    def width(self) -> int:
        """Devices of one stage."""
        return len(self.stages[0].devices)

    @property
    def fullest(self) -> Memory:
        return max(self.memory, key=lambda m: m.total)

    @property
    def fits(self) -> bool | None:
        """Whether every device holds its part; None where the memory of a device is not known."""
        return None if self.usable is None else self.fullest.total <= self.usable

    def as_json(self) -> dict[str, Any]:
        """JSON values; experts as ranges like "0-3,7", bytes as numbers."""
        memory = [
            {"device": i, "dense": m.dense, "experts": m.experts, "state": m.state, "total": m.total}
            for i, m in enumerate(self.memory)
        ]
        return {
            "stages": [_stage_json(stage) for stage in self.stages],
            "experts_side_by_side": self.width,
            "usable_bytes": self.usable,
            "fits": self.fits,
            "memory": memory,
        }


def _stage_json(stage: Stage) -> dict[str, Any]:
    experts = [
        {"layer": layer, "by_device": [ranges(ids) for ids in held]}
        for layer, held in zip(stage.layers(), stage.experts, strict=True)
    ]
    return {"layers": [stage.first, stage.last], "devices": list(stage.devices), "experts": experts}


def ranges(ids: Sequence[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@dataclass(frozen=True)
class Demand:
    """What has to be placed.

    Attributes:
        batch: sequences, all of them held at once.
        context: positions each of them may have.
        item: bytes of a float of the state.
        shares: how often each expert is chosen; layers that are missing count as even.
    """

    workload: Workload
    batch: int
    context: int
    item: int
    shares: Shares

    @cached_property
    def state(self) -> tuple[int, ...]:
        """Bytes of one sequence in each layer."""
        w = self.workload
        return tuple(w.state_bytes(layer, self.context, self.item) for layer in range(len(w.layers)))

    @cached_property
    def dense(self) -> int:
        """Bytes of all weights but the routed experts."""
        w = self.workload
        return w.ahead + w.behind + sum(layer.dense for layer in w.layers)

    def rows(self, width: int) -> int:
        """Sequences of each of `width` devices that share them."""
        return -(-self.batch // width)


def place(
    demand: Demand, devices: int, memory: int | None, stages: int = 0, headroom: float = HEADROOM
) -> Placement:
    """A split over `devices` equal devices.

    Args:
        memory: bytes of one device; None where it is not known, and then nothing can fail to fit.
        stages: pipeline stages; 0 takes the fewest that fit, since each one adds to the time of a token.
        headroom: share of the memory that stays free.

    Raises:
        TargetError: no split exists, or none fits; says what is needed, what there is and what would do.
    """
    usable = None if memory is None else int(memory * (1 - headroom))
    shapes = [s for s in _stage_counts(demand, devices) if stages in (0, s)]
    if not shapes:
        raise _no_split(demand, devices, stages)
    tried: list[Placement] = []
    for count in shapes:
        tried.append(_split(demand, devices, count, usable))
        if tried[-1].fits is not False:
            return tried[-1]
    assert usable is not None and memory is not None
    raise _does_not_fit(demand, devices, memory, usable, stages, tried)


def _stage_counts(demand: Demand, devices: int) -> list[int]:
    """Numbers of stages that divide the devices and leave no device without a layer or an expert."""
    layers = demand.workload.layers
    most = min(len(layer.experts) for layer in layers)
    return [s for s in range(1, len(layers) + 1) if devices % s == 0 and devices // s <= most]


def _no_split(demand: Demand, devices: int, stages: int) -> TargetError:
    layers = demand.workload.layers
    most = min(len(layer.experts) for layer in layers)
    what = f"{devices} devices in {stages} stages" if stages else f"{devices} devices"
    return TargetError(
        f"the model cannot be split over {what}", where="placement",
        allowed=f"stages x devices in a stage, at most {len(layers)} x {most} (layers, experts of a layer)",
        hint="try a number of devices with more divisors" if devices <= len(layers) * most else "",
    )  # fmt: skip


def _does_not_fit(
    demand: Demand, devices: int, memory: int, usable: int, stages: int, tried: Sequence[Placement]
) -> TargetError:
    best = min(tried, key=lambda p: p.fullest.total)
    needed = sum(m.total for m in best.memory)
    found = _smallest(demand, usable, devices + 1, stages)
    return TargetError(
        f"the model needs {needed} bytes on {devices} devices ({best.fullest.total} on the fullest), and "
        f"{devices} x {memory} leave {devices * usable} ({usable} each) "
        "after headroom",
        where="placement",
        allowed=f"at least {found} devices" if found else f"none up to {MOST_DEVICES} devices holds it",
        hint="store weights in fewer bits, or take a smaller batch or context",
    )


def _smallest(demand: Demand, usable: int, start: int, stages: int) -> int:
    """The smallest number of devices from `start` on that holds the model; 0 where none does."""
    for devices in range(start, MOST_DEVICES + 1):
        for count in _stage_counts(demand, devices):
            if stages not in (0, count) or _least(demand, devices, count) > usable:
                continue
            if _split(demand, devices, count, usable).fits:
                return devices
    return 0


def _least(demand: Demand, devices: int, stages: int) -> float:
    """Bytes that the fullest device has at least: the mean over the stages."""
    width = devices // stages
    experts = demand.workload.weight_bytes - demand.dense
    return (demand.dense + experts / width + demand.rows(width) * sum(demand.state)) / stages


def _split(demand: Demand, devices: int, stages: int, usable: int | None) -> Placement:
    w, width = demand.workload, devices // stages
    state = [demand.rows(width) * one for one in demand.state]
    sizes = [
        layer.dense + sum(layer.experts) / width + held for layer, held in zip(w.layers, state, strict=True)
    ]
    sizes[0], sizes[-1] = sizes[0] + w.ahead, sizes[-1] + w.behind
    made: list[Stage] = []
    memory: list[Memory] = []
    for number, (first, last) in enumerate(balanced_runs(sizes, stages)):
        span = range(first, last + 1)
        held = [0] * width
        experts = tuple(_place_experts(demand, layer, held) for layer in span)
        numbers = tuple(range(number * width, (number + 1) * width))
        made.append(Stage(first, last, numbers, experts))
        dense = sum(w.layers[layer].dense for layer in span)
        dense += w.ahead * (first == 0) + w.behind * (last == len(w.layers) - 1)
        memory += [Memory(dense, of_experts, sum(state[layer] for layer in span)) for of_experts in held]
    return Placement(tuple(made), tuple(memory), usable)


def balanced_runs(sizes: Sequence[float], count: int) -> list[tuple[int, int]]:
    """Cuts a sequence into `count` runs, none empty, so that the largest sum is as small as it can be.

    Returns:
        (first, last) of each run, both included.
    """
    sums = [0.0]
    for size in sizes:
        sums.append(sums[-1] + size)

    @cache
    def best(end: int, runs: int) -> tuple[float, int]:
        """The largest sum of the first `end` items in `runs` runs, and where the last run begins."""
        if runs == 1:
            return sums[end], 0
        options = (
            (max(best(start, runs - 1)[0], sums[end] - sums[start]), start) for start in range(runs - 1, end)
        )
        return min(options)

    return list(reversed(list(_runs(best, len(sizes), count))))


def _runs(best: Any, end: int, count: int) -> Iterator[tuple[int, int]]:
    while count:
        start = best(end, count)[1]
        yield start, end - 1
        end, count = start, count - 1


def _place_experts(demand: Demand, layer: int, held: list[int]) -> Held:
    """Experts of one layer by device; adds their bytes to `held`."""
    sizes = demand.workload.layers[layer].experts
    shares = demand.shares.get(layer)
    placed = by_blocks(sizes, held) if shares is None else by_load(sizes, shares, held)
    for device, ids in enumerate(placed):
        held[device] += sum(sizes[i] for i in ids)
    return placed


def by_blocks(sizes: Sequence[int], held: Sequence[int]) -> Held:
    """Runs of equal length; where they cannot be equal, the emptiest devices take one expert more."""
    each, more = divmod(len(sizes), len(held))
    emptiest = set(sorted(range(len(held)), key=lambda device: (held[device], device))[:more])
    out, at = [], 0
    for device in range(len(held)):
        end = at + each + (device in emptiest)
        out.append(tuple(range(at, end)))
        at = end
    return tuple(out)


def by_load(sizes: Sequence[int], shares: Sequence[float], held: Sequence[int]) -> Held:
    """The busiest expert first, each to the least busy device that has room; ties go to the emptiest.

    A device takes at most ceil(experts / devices) of a layer, so that memory stays even. Layers wait for
    their busiest device at every exchange, which is why loads are balanced in each layer by itself. The rule
    is Graham's longest processing time, with a limit on the number of pieces.
    """
    room = math.ceil(len(sizes) / len(held))
    load, full = [0.0] * len(held), list(held)
    out: list[list[int]] = [[] for _ in held]
    for expert in sorted(range(len(sizes)), key=lambda e: (-shares[e], e)):
        free = (d for d in range(len(held)) if len(out[d]) < room)
        device = min(free, key=lambda d: (load[d], len(out[d]), full[d], d))
        out[device].append(expert)
        load[device] += shares[expert]
        full[device] += sizes[expert]
    return tuple(tuple(sorted(ids)) for ids in out)


def shares_of(workload: Workload, statistics: Statistics) -> dict[int, list[float]]:
    """Layer -> for each expert the share of tokens that chose it in the calibration text.

    A share is that of all routes of the layer times the experts per token, at most 1.

    Raises:
        PassError: the statistics are of another model.
    """
    out: dict[int, list[float]] = {}
    for number, layer in enumerate(workload.layers):
        tokens = statistics.usage(f"layers.{number}.ffn", len(layer.experts)).tokens
        routes = int(tokens.sum())
        if routes:
            out[number] = [min(1.0, layer.chosen * int(t) / routes) for t in tokens]
    return out
