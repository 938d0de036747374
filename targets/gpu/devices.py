"""What each device of a launch plan holds: layers, weights, states, temporaries, and what it is handed.

Bytes by the plan alone, at the sizes that its layers were spread for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Module
from dsv4c.runtime.container.launches import Buffer
from dsv4c.runtime.container.plan import Plan
from dsv4c.runtime.container.sizes import size
from dsv4c.targets.hardware import Device
from dsv4c.targets.placement import HEADROOM
from dsv4c.targets.report import STEPS

from .roofline import handed_bytes, step_sizes

Facts = dict[str, Any]


def device_facts(plan: Plan, module: Module) -> Facts:
    """Bytes of each device.

    Returns:
        `batch` and `context`, for which states and temporaries are counted; `devices`, each {"layers": the
        first and the last, "weight_bytes", "state_bytes", and by the steps of `report.STEPS` "arena_bytes",
        of the temporaries, and "handed_bytes"}; `handovers`, each {"name", "dtype", "shape", "source",
        "target"}.
    """
    spread = module.meta.get("spread")
    chosen = spread if isinstance(spread, dict) else {"batch": 1, "context": 4096}
    batch, context = int(chosen["batch"]), int(chosen["context"])
    steps = {
        name: step_sizes(plan, batch, step["tokens"], step["past"], context) for name, step in STEPS.items()
    }
    return {
        "batch": batch, "context": context,
        "devices": [_device(plan, module, stage, steps) for stage in range(len(plan.stages))],
        "handovers": [
            {
                "name": h.buffer.name, "dtype": h.buffer.dtype, "shape": list(h.buffer.shape),
                "source": h.source, "target": h.target,
            } for h in plan.handovers
        ],
    }  # fmt: skip


def check_fits(facts: Facts, device: Device) -> None:
    """Refuse what the memory of the card that an arch is estimated on does not hold, less `HEADROOM`.

    Args:
        facts: of `device_facts`.

    Raises:
        TargetError: the first device whose weights and states are too many.
    """
    if device.memory is None:
        return
    usable = int(device.memory * (1 - HEADROOM))
    for number, one in enumerate(facts["devices"]):
        held = one["weight_bytes"] + one["state_bytes"]
        if held > usable:
            first, last = one["layers"]
            raise TargetError(
                f"layers {first} to {last} take {held} bytes on device {number}", where=device.name,
                allowed=f"{usable}, {1 - HEADROOM:.0%} of its memory",
                hint="compile for more devices, or spread the layers for a smaller batch or context",
            )  # fmt: skip


def _device(plan: Plan, module: Module, stage: int, steps: Mapping[str, dict[str, int]]) -> Facts:
    held, where = plan.held(stage), plan.stages[stage]
    layers = module.meta.get("layers")
    last = where.last if where.last >= 0 else layers - 1 if isinstance(layers, int) else where.last
    any_step = next(iter(steps.values()))
    return {
        "layers": [where.first, last],
        "weight_bytes": sum(_bytes(b, {}) for b in held if b.kind == "weight"),
        "state_bytes": sum(_bytes(b, any_step) for b in held if b.kind == "state"),
        "arena_bytes": {
            name: sum(size(slot, sizes) for slot in plan.program(sizes, "", stage).slots)
            for name, sizes in steps.items()
        },
        "handed_bytes": {name: handed_bytes(plan, stage, sizes) for name, sizes in steps.items()},
    }  # fmt: skip


def _bytes(buffer: Buffer, sizes: Mapping[str, int]) -> int:
    return size(buffer.elements, sizes) * buffer.item_bytes
