"""What a compilation reports: passes, weights by class and format, and the notes that passes left."""

from __future__ import annotations

import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dsv4c.ir.cost import module_cost
from dsv4c.ir.graph import Module
from dsv4c.passes import PassRecord
from dsv4c.passes.weight_classes import weight_class

Facts = dict[str, Any]

STEPS = {"decode": {"tokens": 1, "past": 1024}, "prefill": {"tokens": 512, "past": 0}}
"""The steps whose cost is estimated: one sequence, `tokens` new ones after `past`."""


def compile_report(
    module: Module,
    lowered: Module,
    records: Sequence[PassRecord],
    pipeline: str,
    stored: Mapping[str, tuple[str, int]],
    seconds: float,
) -> Facts:
    """The report of one compilation as JSON values.

    Args:
        module, lowered: before and after the passes.
        stored: tensor of the artifact -> its format and bytes.

    Returns:
        `pipeline`; `passes`, the fields of `PassRecord`; `ops` by level; `weights` {"before", "after"}, each
        a list of {"class", "format", "tensors", "bytes"}; `cost` of the steps of `STEPS` by op; `notes` by
        pass; `seconds`; `compiled_on`.
    """
    return {
        "pipeline": pipeline,
        "passes": [_record(r) for r in records],
        "ops": {"MODEL": len(module.ops), "TARGET": len(lowered.ops)},
        "weights": {"before": checkpoint_weights(module), "after": artifact_weights(lowered, stored)},
        "cost": {name: {**sizes, "ops": op_costs(lowered, sizes)} for name, sizes in STEPS.items()},
        "notes": lowered.notes,
        "seconds": round(seconds, 3),
        "compiled_on": platform.machine(),
    }


def _record(r: PassRecord) -> Facts:
    changed = {name: size if math.isfinite(size) else "differs" for name, size in r.changed.items()}
    return {**asdict(r), "seconds": round(r.seconds, 6), "changed": changed}


def checkpoint_weights(module: Module) -> list[Facts]:
    """Bytes that the graph reads from the checkpoint, by class and stored format; each tensor once."""
    rows: list[tuple[str, str, int]] = []
    seen: set[str] = set()
    for op in (op for one in (module, *module.parts.values()) for op in one.weights()):
        kind = weight_class(op)
        for leaf in op.weight.sources() if op.weight else ():
            name = str(leaf.attr("name"))
            if name not in seen:
                seen.add(name)
                rows.append((kind, leaf.dtype.value, leaf.nbytes))
    return _by_class(rows)


def artifact_weights(lowered: Module, stored: Mapping[str, tuple[str, int]]) -> list[Facts]:
    """Bytes in the artifact, by class and format; packed layouts and their padding included.

    A tensor belongs to the weight op whose location its name starts with.
    """
    modules = (lowered, *lowered.parts.values())
    kinds = {op.loc: weight_class(op) for one in modules for op in one.weights()}
    rows = []
    for name, (form, nbytes) in stored.items():
        home = name
        while home and home not in kinds:
            home = home[:-1]
        rows.append((kinds.get(home, "other"), form, nbytes))
    return _by_class(rows)


def op_costs(lowered: Module, sizes: Mapping[str, int]) -> Facts:
    """Op name -> {"count", "flops", "weight_bytes", "data_bytes"} of one step, by `ir.cost`."""
    symbols = {"B": 1, "T": sizes["tokens"], "L": 1, "ctx": 4096, "past": sizes["past"]}
    costs = module_cost(lowered, symbols)
    return {name: {"count": count, **asdict(cost)} for name, (count, cost) in sorted(costs.items())}


def _by_class(rows: Iterable[tuple[str, str, int]]) -> list[Facts]:
    tensors: dict[tuple[str, str], int] = defaultdict(int)
    total: dict[tuple[str, str], int] = defaultdict(int)
    for kind, form, nbytes in rows:
        tensors[kind, form] += 1
        total[kind, form] += nbytes
    return [
        {"class": kind, "format": form, "tensors": tensors[kind, form], "bytes": total[kind, form]}
        for kind, form in sorted(total, key=lambda key: (-total[key], key))
    ]
