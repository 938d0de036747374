"""The roofline of a launch plan: the least time of every launch on the card that an arch is estimated on.

Costs of ops are those of `ir.cost`, sizes those of the compiler's report, figures those of `hardware.json`
without any efficiency: what comes out is a bound, no estimate of a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4c.runtime.container.costs import Needs, Rates, launch_needs
from dsv4c.runtime.container.launches import Launch
from dsv4c.runtime.container.plan import Plan
from dsv4c.runtime.container.sizes import size, symbols
from dsv4c.targets.hardware import Device
from dsv4c.targets.report import STEPS

Facts = dict[str, Any]
CONTEXT = 4096
"""Positions that states have room for, as in the compiler's report."""


def rates_of(device: Device) -> Rates:
    """The published figures of a device."""
    peaks = device.peaks
    return Rates(device.bandwidth, peaks.get("bf16"), peaks.get("f32"), peaks.get("fp8"), peaks.get("int8"))


def step_sizes(plan: Plan, batch: int, tokens: int, past: int, context: int) -> dict[str, int]:
    """Every symbol of a step's arguments, capacities such as `ctx_4` among them, with `past`; no images."""
    names = {n for b in plan.buffers if not b.part for text in b.shape for n in symbols(text)}
    capacities = {n: context // int(n.removeprefix("ctx_")) for n in names if n.startswith("ctx_")}
    given = {"B": batch, "T": tokens, "L": 1, "ctx": context, "past": past}
    return {**dict.fromkeys(names, 0), **given, **capacities}


def roofline(plan: Plan, calls: Sequence[Any], device: Device) -> Facts:
    """The least time of each step of `report.STEPS`.

    Args:
        calls: of each program, see `targets.calls`.

    Returns:
        `device` {"name", "bandwidth", "bf16", "f32", "fp8", "int8", "link"}; `steps`, name -> {"tokens",
        "past", "program", "seconds", "flops", "weight_bytes", "data_bytes", "launches"}: of each launch its
        microseconds, in order; "kernels", for each kernel of those programs {"kernel": its place, "launches",
        "flops", "weight_bytes", "data_bytes", "seconds", "bound"}; and "stages", for each device the same
        amounts with "launches", how many, "handed_bytes", what it is handed, and "link_seconds", how long
        that takes. A step goes through the devices one after the other, so its seconds are the sum of all of
        these. Seconds are null where the device does not publish what they need.
    """
    rates = rates_of(device)
    figures = {
        "bandwidth": rates.bandwidth, "bf16": rates.matrix, "f32": rates.vector, "fp8": rates.fp8,
        "int8": rates.int8, "link": device.link,
    }  # fmt: skip
    steps = {}
    for name, step in STEPS.items():
        sizes = step_sizes(plan, 1, step["tokens"], step["past"], CONTEXT)
        programs = [plan.program(sizes, "", stage) for stage in range(len(plan.stages))]
        needs = [launch_needs(plan, p, calls[plan.programs.index(p)], sizes) for p in programs]
        every = [launch for p in programs for launch in p.launches]
        found = _step(plan, every, [need for of_one in needs for need in of_one], rates)
        stages = [
            _stage(plan, stage, _step(plan, p.launches, need, rates), sizes, device)
            for stage, (p, need) in enumerate(zip(programs, needs, strict=True))
        ]
        found["seconds"] = _total([found["seconds"], *(one["link_seconds"] for one in stages)])
        steps[name] = {**step, "program": programs[0].name.rpartition(".")[2], **found, "stages": stages}
    return {"device": {"name": device.name, **figures}, "steps": steps}


def _stage(plan: Plan, stage: int, found: Facts, sizes: dict[str, int], device: Device) -> Facts:
    """What one device does in a step, and what it waits for before."""
    handed = handed_bytes(plan, stage, sizes)
    link = 0.0 if not handed else None if device.link is None else handed / device.link
    kept = ("seconds", "flops", "weight_bytes", "data_bytes")
    own = {name: found[name] for name in kept} | {"launches": len(found["launches"])}
    return {**own, "handed_bytes": handed, "link_seconds": link}


def handed_bytes(plan: Plan, stage: int, sizes: Mapping[str, int]) -> int:
    """Bytes that a stage is handed by earlier ones in a step."""
    return sum(size(h.buffer.elements, sizes) * h.buffer.item_bytes for h in plan.handed_to(stage))


def _step(plan: Plan, launches: Sequence[Launch], needs: Sequence[Needs], rates: Rates) -> Facts:
    by_kernel: dict[int, list[int]] = {}
    for index, launch in enumerate(launches):
        by_kernel.setdefault(launch.kernel, []).append(index)
    times = [
        rates.least(plan.kernels[launch.kernel], need)
        for launch, need in zip(launches, needs, strict=True)
    ]
    rows = []
    for kernel, indices in sorted(by_kernel.items()):
        bounds = [times[i][1] for i in indices]
        rows.append({
            "kernel": kernel, "launches": len(indices), **_amounts([needs[i] for i in indices]),
            "seconds": _total([times[i][0] for i in indices]), "bound": max(bounds, key=bounds.count),
        })  # fmt: skip
    microseconds = [None if s is None else round(1e6 * s, 3) for s, _ in times]
    total = _total([s for s, _ in times])
    return {"seconds": total, **_amounts(needs), "launches": microseconds, "kernels": rows}


def _amounts(needs: Sequence[Needs]) -> Mapping[str, int]:
    whole = sum(needs, Needs())
    return {
        "flops": round(whole.flops), "weight_bytes": round(whole.weight_bytes),
        "data_bytes": round(whole.data_bytes),
    }  # fmt: skip


def _total(seconds: Sequence[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return sum(known) if len(known) == len(seconds) else None
