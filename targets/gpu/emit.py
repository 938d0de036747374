"""The emitter of launch plans: TARGET module -> objects of its kernels, weights as they are stored, the plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv4c.errors import CompileError
from dsv4c.ir.dtypes import Array, DType
from dsv4c.ir.graph import Module
from dsv4c.ir.weights import TensorStore, WeightExpr, describe, stream
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.container.plan import Plan
from dsv4c.targets.base import Arch, Progress
from dsv4c.targets.calls import calls_meta
from dsv4c.targets.hardware import Device, load_devices

from .arch import gpu
from .build import build
from .devices import check_fits, device_facts
from .near import check_near
from .plan import Draft, built, draft
from .roofline import roofline


def emit_plan(
    module: Module, store: TensorStore, writer: ArtifactWriter, arch: Arch, progress: Progress,
    cache: Path | None = None,
) -> None:  # fmt: skip
    """Write sections `code` and `plan`, the weights, and meta `plan` with what is known of every kernel.

    Args:
        cache: where objects of kernels are kept; None is the user's cache.

    Raises:
        TargetError: an op has no kernel, the arch is unknown, or a device of several has no room.
        ToolchainError: Triton is missing.
        CompileError: a kernel does not fit the GPU, or a hot one spills; or scales of an FP4 weight lie too
        far apart for products of codes.
    """
    target = gpu(arch.name)
    found, card = draft(module, target), known_device(arch)
    if card and len(found.plan.stages) > 1:
        check_fits(device_facts(found.plan, module), card)
    objects = build(found.plan.kernels, target, cache, progress)
    plan = built(found.plan, objects.kernels, 1000 * objects.toolkit)
    writer.add_section("code", objects.code)
    _write(plan, found, store, writer, progress)
    writer.set_meta("plan", plan_report(plan, module, found, card))


def emit_draft(
    module: Module, store: TensorStore, writer: ArtifactWriter, arch: Arch, progress: Progress
) -> None:
    """A plan without code, for the interpreter: sections and tensors as `emit_plan` writes them, but "code".
    """
    found = draft(module, gpu(arch.name))
    _write(found.plan, found, store, writer, progress)


def _write(plan: Plan, found: Draft, store: TensorStore, writer: ArtifactWriter, progress: Progress) -> None:
    for weight in found.near:
        check_near(weight, store)
    writer.add_section("plan", json.dumps(plan.as_json(), separators=(",", ":")).encode())
    total, done = sum(e.nbytes for e in found.weights.values()), 0
    for name, expr in found.weights.items():
        if isinstance(expr, WeightExpr):
            writer.add_tensor(name, expr.dtype.value, expr.shape, _known(expr, store))
        else:
            writer.add_tensor(name, f"i{8 * expr.itemsize}", expr.shape, expr)
        done += expr.nbytes
        progress("weights", done, total)


def plan_report(plan: Plan, module: Module, found: Draft, device: Device | None) -> dict[str, Any]:
    """What a reader of the artifact may want to know of its code, without the plan itself.

    Returns:
        `arch`, `vendor`, `driver`; `kernels`, each with its name, sizes, constants and what the compiler
        said; `programs`, each with what it holds and its `calls`, see `targets.calls`; of a language model
        `memory`, see `devices.device_facts`, and `roofline`, see `roofline.roofline`, where the arch names a
        device.
    """
    kernels = [
        {
            "name": k.name, "warps": k.warps, "stages": k.stages, "shared": k.shared, "bytes": k.nbytes,
            "constants": k.constants, **k.facts,
        } for k in plan.kernels
    ]  # fmt: skip
    names = [[plan.kernels[launch.kernel].name for launch in p.launches] for p in plan.programs]
    modules = [module.parts[p.part] if p.part else module for p in plan.programs]
    calls = [calls_meta(*given) for given in zip(modules, found.callers, names, strict=True)]
    programs = [
        {
            "name": p.name, "device": p.stage, "launches": len(p.launches), "temporaries": len(p.temporaries),
            "slots": len(p.slots), "calls": made,
        } for p, made in zip(plan.programs, calls, strict=True)
    ]  # fmt: skip
    bound: dict[str, Any] = {"memory": device_facts(plan, module)} if _is_step(plan) else {}
    if device and _is_step(plan):
        bound["roofline"] = roofline(plan, calls, device)
    head = {"arch": plan.arch, "vendor": plan.vendor, "driver": plan.driver}
    return {**head, "kernels": kernels, "programs": programs, **bound}


def _is_step(plan: Plan) -> bool:
    """Whether it is a language model's, whose steps have the sizes that a report is about."""
    return {"tokens", "n_valid", "rows"} <= {b.name for b in plan.of_kind("input")}


def known_device(arch: Arch) -> Device | None:
    """The device that an arch is estimated on."""
    return load_devices().get(arch.device)


_NAN = {
    DType.F8E4M3: lambda a: (a.view(np.uint8) & 0x7F) == 0x7F,
    DType.F8E4M3FNUZ: lambda a: a.view(np.uint8) == 0x80,
    DType.F8E8M0: lambda a: a.view(np.uint8) == 0xFF,
}
"""Codes that stand for NaN, which kernels decode without looking for them."""


def _known(expr: WeightExpr, store: TensorStore) -> Iterator[Array]:
    """The bytes of a weight; CompileError where a code is NaN."""
    is_nan = _NAN.get(expr.dtype)
    for piece in stream(expr, store):
        if is_nan is not None and is_nan(piece).any():
            raise CompileError(
                f"a code of {expr.dtype.value} is NaN", where=describe(expr), hint="mend the checkpoint"
            )
        yield piece
