"""Compiles V4-Flash in its real shape for a device, from a checkpoint that is all holes, and measures it.

Time, memory and the sizes of files hardly depend on what the weights are, so they are zeros: neither
checkpoint nor artifact takes room on a disk that knows holes, though together they are 450 GB. The command is
the real one, in a process of its own; afterwards the artifact is opened and what it holds is looked at.

    python benchmarks/flash_shape.py --layers 4          # a cut-down model; without --layers all of it
    python benchmarks/flash_shape.py --target cuda:sm_90a --format plan --stages 8
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CONFIG = HERE.parent / "tests" / "data" / "configs" / "v4-flash" / "config.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json (default: V4-Flash)")
    parser.add_argument("--layers", type=int, default=0, help="the first N layers only (default: all)")
    parser.add_argument("--target", default="ascend:910c", help="ascend:910c, mlu:590, ...")
    parser.add_argument("--format", default="onnx", help="onnx, or plan for GPUs (default: onnx)")
    parser.add_argument("--stages", type=int, default=16, help="devices; no more than layers are used")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--work", type=Path, help="where checkpoint and artifact are made")
    parser.add_argument("--check", action="store_true", help="also hash every byte of the artifact")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and artifact there")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="flash-shape-", dir=options.work))
    try:
        report = measure(work, options)
    finally:
        if options.keep:
            print(work)
        else:
            shutil.rmtree(work)
    print(table(report))
    from run import machine

    given = {**vars(options), "config": options.config.resolve().parent.name, "work": None}
    stamp, name = datetime.now(UTC).strftime("%Y-%m-%d"), options.target.replace(":", "-")
    (HERE / "results").mkdir(exist_ok=True)
    name += "-plan" if options.format == "plan" else ""
    cut = f"-{options.layers}-layers" if options.layers else ""
    file = HERE / "results" / f"{stamp}-flash-shape-{name}{cut}.json"
    file.write_text(json.dumps({"machine": machine(), "options": given, **report}, indent=1) + "\n")
    if report["wrong"]:
        raise SystemExit("\n".join(report["wrong"]))


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Checkpoint, compilation and what was found in the artifact; sizes in bytes."""
    checkpoint, artifact = work / "checkpoint", work / "m.dsv4"
    layers = options.layers or json.loads(options.config.read_text())["num_hidden_layers"]
    stages = min(options.stages, layers)
    made = run(
        "dsv4c.frontend.generate", str(checkpoint), "--config", str(options.config), "--sparse",
        "--layers", str(options.layers), "--shards", str(max(2, layers)),
    )  # fmt: skip
    cutting = "spread_layers{devices" if options.format == "plan" else "bind_shapes{stages"
    compiled = run(
        "dsv4c", "compile", str(checkpoint), "--target", options.target, "--format", options.format,
        "-o", str(artifact), "--no-golden",
        "--passes", f"with({cutting}={stages}, context={options.context}}})",
    )  # fmt: skip
    found = look(artifact, checkpoint, stages, options.check)
    return {
        "layers": layers, "stages": stages, "checkpoint": {**made, **room(checkpoint)},
        "compile": {**compiled, **room(artifact)}, **found,
    }  # fmt: skip


def run(module: str, *arguments: str) -> dict[str, Any]:
    """Seconds by the clock, seconds of processors, which a busy machine does not prolong, and the peak of the
    process's own memory, mapped files left out.
    """
    start, before, peak = time.perf_counter(), processor_seconds(), 0
    process = subprocess.Popen([sys.executable, "-m", module, *arguments])
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {
        "seconds": time.perf_counter() - start, "cpu_seconds": processor_seconds() - before,
        "peak_own_bytes": peak,
    }  # fmt: skip


def processor_seconds() -> float:
    """What processes that have ended, and those that they started, took of all processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def room(path: Path) -> dict[str, int]:
    """What files look as long as, and what they take of the disk."""
    stats = [p.stat() for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
    apparent, disk = sum(s.st_size for s in stats), sum(512 * s.st_blocks for s in stats)
    return {"apparent_bytes": apparent, "disk_bytes": disk}


# ------------------------------------------------------------------------- what the artifact holds


def look(path: Path, checkpoint: Path, stages: int, full: bool) -> dict[str, Any]:
    """Counts, and whatever is not as it should be."""
    from dsv4c.runtime import Artifact

    start = time.perf_counter()
    artifact = Artifact.open(path, check="full" if full else "code")
    seconds = time.perf_counter() - start
    codes = [t for t in artifact.tensors.values() if t.dtype == "i8"]
    return {
        "open": {"check": "full" if full else "code", "seconds": seconds},
        "tensors": len(artifact.tensors), "weight_bytes": artifact.weight_bytes,
        "int8_tensors": len(codes), "int8_bytes": sum(t.nbytes for t in codes),
        **(plan_facts(artifact) if "plan" in artifact.meta else static_facts(artifact)),
        "golden": "golden" in artifact.meta,
        "wrong": list(wrong(artifact, checkpoint, stages)),
    }  # fmt: skip


def static_facts(artifact: Any) -> dict[str, Any]:
    """Of an artifact of fixed shapes."""
    return {"programs": sum(len(bucket["programs"]) for bucket in artifact.meta["onnx"]["static"]["buckets"])}


def plan_facts(artifact: Any) -> dict[str, Any]:
    """Of a launch plan: its devices, its roofline without single launches, and a dry run on cards of the size
    that its arch is estimated on, where every launch and every handover of two steps is checked.
    """
    from dsv4c.runtime.gpu.dry_run import DryRunDevice
    from dsv4c.runtime.gpu_backend import GpuBackend
    from dsv4c.runtime.session import Session
    from dsv4c.targets.hardware import load_devices

    plan, known = artifact.meta["plan"], load_devices()
    card = known[plan["roofline"]["device"]["name"]].memory
    steps = {
        name: {key: value for key, value in step.items() if key not in ("launches", "kernels")}
        for name, step in plan["roofline"]["steps"].items()
    }
    devices = [DryRunDevice(card) for _ in plan["memory"]["devices"]]
    backend = GpuBackend(artifact, devices, check=True, resident=True)
    session = Session(artifact, context=plan["memory"]["context"], backend=backend)
    start = time.perf_counter()
    for tokens in (1, 512):
        session.step(np.zeros((1, tokens), np.int32))
    return {
        "programs": len(plan["programs"]), "kernels": len(plan["kernels"]), "memory": plan["memory"],
        "roofline": steps, "estimate": artifact.meta["report"].get("estimate"),
        "dry_run": {
            "seconds": time.perf_counter() - start, "launches": sum(len(d.launches) for d in devices),
            "handed_bytes": sum(sum(d.taken) for d in devices),
            "free_bytes": [d.free_bytes() for d in devices],
        },
    }  # fmt: skip


def wrong(artifact: Any, checkpoint: Path, stages: int) -> Iterator[str]:
    """One sentence per tensor that is not what zeros become: codes 0, scales 1 or some power of two, expert
    ids as they were.

    Of stacks the first and the last matrix are looked at, of other matrices the first and the last row.
    """
    from dsv4c.frontend.safetensors import TensorFiles

    files = TensorFiles.open(checkpoint)
    planned = "plan" in artifact.meta
    kinds = 2 if planned else len(artifact.meta["onnx"]["static"]["buckets"])
    held = plan_programs(artifact) if planned else static_facts(artifact)["programs"]
    if held != stages * kinds:
        yield f"{held} programs for {stages} stages"
    for name, entry in artifact.tensors.items():
        array = artifact.array(name)
        ends = array[[0, -1]]
        if entry.dtype == "f8e8m0":
            good = not (array == 255).any()  # which is NaN
        elif name.endswith(".scales"):
            good = bool((array == 1).all())
        elif entry.dtype == "i8":
            good = not ends.any() and name + ".scales" in artifact.tensors
        elif name.endswith("tid2eid"):
            good = np.array_equal(array, files.read(name))
        else:
            good = bool(np.isfinite(ends).all()) and (name.startswith("rope") or not ends.any())
        if not good:
            yield f"{name} {entry.dtype}{list(entry.shape)} is not what zeros become"


def plan_programs(artifact: Any) -> int:
    return len(artifact.meta["plan"]["programs"])


def table(r: dict[str, Any]) -> str:
    """The figures of a report, for a reader."""
    made, done = r["checkpoint"], r["compile"]
    return (
        "| | seconds | of processors | own memory, GB | apparent GB | on disk, MB |\n"
        "|---|---|---|---|---|---|\n"
        + "".join(
            f"| {what} | {x['seconds']:.1f} | {x['cpu_seconds']:.1f} | {x['peak_own_bytes'] / 1e9:.2f} "
            f"| {x['apparent_bytes'] / 1e9:.1f} | {x['disk_bytes'] / 1e6:.1f} |\n"
            for what, x in (("checkpoint", made), ("compile", done))
        )
        + f"\n{r['layers']} layers over {r['stages']} devices: {r['programs']} programs, {r['tensors']} "
        f"tensors, {r['weight_bytes'] / 1e9:.1f} GB, {r['int8_bytes'] / 1e9:.1f} GB of them INT8; opened "
        f"({r['open']['check']}) in {r['open']['seconds']:.1f} s, {len(r['wrong'])} tensors are wrong"
        + devices(r)
    )


def devices(r: dict[str, Any]) -> str:
    """The devices of a launch plan, a row each; nothing for other artifacts."""
    if "memory" not in r:
        return ""
    rows = [
        f"| {n} | {d['layers'][0]} to {d['layers'][1]} | {d['weight_bytes'] / 1e9:.2f} "
        f"| {d['state_bytes'] / 1e6:.1f} | {d['arena_bytes']['decode'] / 1e6:.2f} "
        f"| {d['arena_bytes']['prefill'] / 1e6:.1f} |"
        + "".join(f" {1e3 * r['roofline'][s]['stages'][n]['seconds']:.3g} |" for s in ("decode", "prefill"))
        for n, d in enumerate(r["memory"]["devices"])
    ]
    least = "".join(f" {1e3 * r['roofline'][s]['seconds']:.3g} |" for s in ("decode", "prefill"))
    return "\n".join([
        "\n\n| device | layers | weights, GB | states, MB | arena of decode, MB | of prefill "
        "| least ms of decode | of prefill |\n|---|---|---|---|---|---|---|---|",
        *rows, f"| all | | | | | |{least}",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
