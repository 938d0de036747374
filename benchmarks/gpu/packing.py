"""Makes the folder that is carried to a machine with a GPU: this program, the runtime, plans and objects.

The one file here that needs the compiler. Weights of the real shape stay out: its artifact has the plan, the
objects, and the few numbers that follow from the configuration alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsv4c import api
from dsv4c.cli.estimate_source import module_of
from dsv4c.errors import UsageError
from dsv4c.frontend.generate_config import published_config
from dsv4c.ir.graph import Module
from dsv4c.ir.weights import WeightExpr, stream
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.targets import TARGETS, parse_target
from dsv4c.targets.gpu import emit
from dsv4c.targets.gpu.arch import gpu
from dsv4c.targets.gpu.plan import built, draft

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden" / "v4"
CONFIG = ROOT / "tests" / "data" / "configs" / "v4-flash" / "config.json"
MOST = 64 << 20
"""Bytes of the folder, about what one may carry to a lent machine."""


def pack_bundle(
    archs: Sequence[str],
    output: Path,
    golden: Path | None = None,
    config: Path | None = None,
    layers: int = 0,
    numerics: str = "bf16",
) -> int:
    """Write the folder anew and return its bytes.

    Args:
        archs: of targets cuda and rocm.
        golden: a small checkpoint, compiled with its golden vectors.
        config: the config.json whose shape is measured; `layers` keeps the first ones only.
        numerics: of plans, of both.

    Raises:
        UsageError: an arch is unknown, the folder is not one of these, or it would be too large.
        ToolchainError, CompileError: see `targets.gpu.build`.
    """
    targets = {arch: _target_of(arch) for arch in archs}
    if output.exists():
        if any(output.iterdir()) and not (output / "bundle.json").is_file():
            raise UsageError("the folder holds something else", where=str(output), hint="name another one")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    for file in HERE.glob("*.py"):
        if file.name != Path(__file__).name:
            shutil.copyfile(file, output / file.name)
    _copy_runtime(output / "dsv4c")
    module = shape_module(config or CONFIG, layers)
    facts = {}
    for arch, target in targets.items():
        path = output / f"golden-{arch}.dsv4"
        api.compile(golden or GOLDEN, target=target, format="plan", output=path, numerics=numerics)
        facts[arch] = write_shape(module, target, output / f"shape-{arch}.dsv4", numerics)
    made = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"), "shape": module.name, "numerics": numerics,
        "archs": facts,
    }  # fmt: skip
    (output / "bundle.json").write_text(json.dumps(made, indent=1) + "\n")
    total = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    if total > MOST:
        raise UsageError(f"the folder has {total >> 20} MiB", where=str(output), allowed=f"{MOST >> 20} MiB")
    return total


def _target_of(arch: str) -> str:
    known = [f"{t.name}:{a.name}" for t in TARGETS.values() if t.name in ("cuda", "rocm") for a in t.archs]
    found = next((name for name in known if name.endswith(f":{arch}")), None)
    if found is None:
        allowed = ", ".join(name.partition(":")[2] for name in known)
        raise UsageError(f"arch {arch!r}", where="pack", allowed=allowed)
    return found


def _copy_runtime(package: Path) -> None:
    """What runs an artifact; it imports nothing else of dsv4c."""
    left_out = shutil.ignore_patterns("__pycache__", "*.md")
    shutil.copytree(ROOT / "runtime", package / "runtime", ignore=left_out)
    for name in ("__init__.py", "errors.py", "py.typed"):
        shutil.copyfile(ROOT / name, package / name)


def shape_module(config: Path, layers: int) -> Module:
    """The graph of a configuration; its weights have names, shapes and formats, and no bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = json.loads(config.read_text(encoding="utf-8"))
        cut = published_config(raw, "published", True, None, layers)
        file = Path(scratch) / "config.json"
        file.write_text(json.dumps(cut), encoding="utf-8")
        module, _ = module_of(file)
    module.store = None  # so that passes measure nothing
    module.name = config.resolve().parent.name
    return module


class NoBytes:
    """The store of a model that is a shape only."""

    def read(self, name: str) -> Any:
        raise UsageError(f"{name} has no bytes: the model is a shape only", where="pack")


def write_shape(module: Module, target: str, path: Path, numerics: str = "bf16") -> dict[str, Any]:
    """Plan and objects of a module for one arch; what is known of the card it is estimated on."""
    family, arch = parse_target(target)
    _, passes = api.in_numerics(family, arch, family.format("plan"), numerics)
    lowered = api.lower(module, target, "plan", passes=passes).module
    found = draft(lowered, gpu(arch.name))
    objects = emit.build(found.plan.kernels, gpu(arch.name), None, None)
    plan = built(found.plan, objects.kernels, 1000 * objects.toolkit)
    device = emit.known_device(arch)
    with ArtifactWriter(path) as writer:
        writer.add_section("plan", json.dumps(plan.as_json(), separators=(",", ":")).encode())
        writer.add_section("code", objects.code)
        writer.set_meta("plan", emit.plan_report(plan, lowered, found, device))
        for name, expr in found.weights.items():
            if not isinstance(expr, WeightExpr):
                writer.add_tensor(name, f"i{8 * expr.itemsize}", expr.shape, expr)
            elif not any(expr.sources()):
                writer.add_tensor(name, expr.dtype.value, expr.shape, stream(expr, NoBytes()))
    peaks = device.peaks if device else {}
    return {
        "golden": f"golden-{arch.name}.dsv4", "shape": path.name, "device": device.name if device else "",
        "figures": {
            "bandwidth": device.bandwidth if device else None, "bf16": peaks.get("bf16"),
            "f32": peaks.get("f32"), "fp8": peaks.get("fp8"), "int8": peaks.get("int8"),
        },
    }  # fmt: skip
