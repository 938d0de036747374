"""`dsv4c inspect`: what an artifact or a checkpoint directory is, without running it."""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dsv4c.errors import ToolchainError, UsageError
from dsv4c.runtime import Artifact
from dsv4c.runtime.archs import archs_of, taken
from dsv4c.runtime.backends import dimension
from dsv4c.runtime.container.several import section_names
from dsv4c.runtime.cpu import lacks
from dsv4c.runtime.session import DEFAULT_CONTEXT

from . import devices
from .base import Command, integer, json_option
from .devices import device_rows, device_sentences, estimate_sentence, published_rows
from .kernels import HEAD, NUMBERS, kernel_rows, step_sentences
from .show import as_json, section, size, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="artifact, checkpoint directory, or directory with config.json"
    )
    parser.add_argument("--context", type=integer(1), metavar="N", help="positions to count state bytes for")
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if not path.exists():
        raise UsageError("no such file or directory", where=args.path, allowed="an artifact or a checkpoint")
    if path.is_dir():
        facts, text = _directory(path)
    else:
        facts = artifact_facts(Artifact.open(path), args.context)
        text = _text(facts)
    print(as_json(facts) if args.json else text)
    return 0


def _directory(path: Path) -> tuple[dict[str, Any], str]:
    try:
        from . import inspect_checkpoint as reader  # the front end is no part of a run-time installation
    except ImportError as error:
        raise ToolchainError(
            f"the compiler is not installed: {error}", hint='pip install "dsv4c[compile]"'
        ) from error
    facts = reader.directory_facts(path)
    return facts, reader.text(facts)


def artifact_facts(artifact: Artifact, context: int | None = None) -> dict[str, Any]:
    """Everything an artifact says about itself; sizes in bytes, state for one sequence at `context`."""
    meta, model = artifact.meta, artifact.meta["model"]
    longest = int(model["max_positions"])
    if context is not None and context > longest:
        raise UsageError(f"context = {context}", where="dsv4c inspect", allowed=f"1 to {longest}")
    positions = context or min(longest, DEFAULT_CONTEXT)
    states = _states(meta["step"]["states"], positions)
    weights, golden = _weights(artifact)
    return {
        "kind": "artifact",
        "path": str(artifact.path),
        "file_bytes": artifact.path.stat().st_size,
        **{key: meta[key] for key in ("format", "target", "arch", "numerics", "identity", "model")},
        "code": _code(artifact),
        "sections": {s.name: s.nbytes for s in artifact.sections.values()},
        "weights": {"bytes": sum(w["bytes"] for w in weights.values()), "dtypes": weights},
        "golden": {"bytes": golden, **meta.get("golden", {})} if golden else None,
        "states": {
            "context": positions,
            "bytes": sum(s["bytes"] for s in states.values()),
            "buffers": states,
        },
        "report": meta["report"],
        "plan": meta.get("plan"),
    }


def _code(artifact: Artifact) -> list[dict[str, Any]]:
    """The archs that an artifact of format tvm holds code for, the best first; `lacks` is null where it
    runs here."""
    archs = archs_of(artifact) if artifact.meta["format"] == "tvm" else []
    chosen, rows = taken(artifact), []
    for a in archs:
        name, _ = section_names(a["name"], a["machine"], len(archs) > 1)
        lacking = lacks(a["machine"], a["requires"]) or None
        nbytes = artifact.sections[name].nbytes
        rows.append({**a, "bytes": nbytes, "lacks": lacking, "taken": a["name"] == chosen})
    return rows


def _weights(artifact: Artifact) -> tuple[dict[str, dict[str, int]], int]:
    """dtype -> tensors and bytes, and the bytes of the golden vectors, which are no weights."""
    dtypes: dict[str, dict[str, int]] = {}
    golden = 0
    for tensor in artifact.tensors.values():
        if tensor.name.startswith("golden."):
            golden += tensor.nbytes
            continue
        entry = dtypes.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dtypes, golden


def _states(declared: dict[str, Any], context: int) -> dict[str, dict[str, Any]]:
    sizes = {"B": 1, "ctx": context}
    return {
        name: {
            "dtype": s["dtype"],
            "shape": s["shape"],
            "bytes": prod(dimension(d, sizes) for d in s["shape"]) * np.dtype(s["dtype"]).itemsize,
        }
        for name, s in declared.items()
    }


def _text(facts: dict[str, Any]) -> str:
    arch, weights, states = facts["arch"], facts["weights"], facts["states"]
    head = [
        ("target", f"{facts['target']}:{arch['name']} ({_machines(arch)})"),
        ("format", f"{facts['format']}, numerics {facts['numerics']}"),
        ("identity", facts["identity"][:16]),
        *facts["model"].items(),
    ]
    dtypes = [(name, entry["tensors"], size(entry["bytes"])) for name, entry in weights["dtypes"].items()]
    buffers = [
        (n, s["dtype"], "[" + ", ".join(s["shape"]) + "]", size(s["bytes"]))
        for n, s in states["buffers"].items()
    ]
    golden = facts["golden"]
    vectors = f"{size(golden['bytes'])}, {len(golden['calls'])} calls" if golden else "none"
    return "".join((
        f"{facts['path']}: artifact, {size(facts['file_bytes'])}",
        section("model", table(head)),
        *([section("code for several processors", _archs(facts["code"]))] if len(facts["code"]) > 1 else []),
        section("sections", table([(n, size(b)) for n, b in facts["sections"].items()], right=[1])),
        section(
            f"weights: {size(weights['bytes'])}",
            table(dtypes, ("dtype", "tensors", "bytes"), right=[1, 2]),
        ),
        section(
            f"state: {size(states['bytes'])} per sequence at context {states['context']}",
            table(buffers, ("buffer", "dtype", "shape", "bytes"), right=[3]),
        ),
        section("golden vectors", vectors),
        *_planned(facts),
        section("report", _report(facts["report"])),
    ))  # fmt: skip


def _machines(arch: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(a["machine"] for a in arch.get("archs", [arch])))


def _archs(code: list[dict[str, Any]]) -> str:
    rows = [
        (a["name"], a["machine"], size(a["bytes"]),
         a["lacks"] or ("taken here" if a["taken"] else "runs here, too"))
        for a in code
    ]  # fmt: skip
    return table(rows, ("arch", "machine", "bytes", ""), right=[2])


def _planned(facts: dict[str, Any]) -> list[str]:
    """What a launch plan says of its devices and kernels, and what others measured on such a device."""
    plan, estimate = facts.get("plan"), facts["report"].get("estimate")
    if not plan:
        return []
    out = []
    if "memory" in plan:
        rows = table(device_rows(plan), devices.HEAD, right=sorted(devices.NUMBERS))
        out.append(section("devices", "\n".join([rows, *device_sentences(plan)])))
    if estimate:
        rows = published_rows(estimate)
        others = table(rows, devices.OTHERS_HEAD if rows else (), right=sorted(devices.OTHERS_NUMBERS))
        said = f"{estimate_sentence(estimate)}\n{others}"
        out.append(section("estimate, and what others have published", said))
    return [*out, section("kernels", _kernels(plan))]


def _kernels(plan: dict[str, Any]) -> str:
    rows = table(kernel_rows(plan), HEAD, right=sorted(NUMBERS))
    return "\n".join([rows, *step_sentences(plan)])


def _report(report: dict[str, Any]) -> str:
    rows = [
        (p["name"], p["changes"], p["ops_before"], p["ops_after"], f"{p['seconds']:.3f}")
        for p in report["passes"]
    ]
    lines = table(rows, ("pass", "changes", "ops before", "after", "seconds"), right=[1, 2, 3, 4])
    ops = ", ".join(f"{count} ops at {level}" for level, count in report["ops"].items())
    return f"{lines}\n{ops}; {report['seconds']:.1f} s on {report['compiled_on']}"


INSPECT = Command(
    name="inspect",
    summary="show what an artifact or a checkpoint is",
    about="Describe an artifact (target, sections, weights, state, how it was compiled) or a checkpoint\n"
    "directory (configuration, naming, sizes, parameters). A directory with only a config.json is enough to\n"
    "see what the released format of that model would need.",
    examples=(
        "dsv4c inspect m.dsv4",
        "dsv4c inspect m.dsv4 --context 65536 --json",
        "dsv4c inspect CHECKPOINT",
    ),
    arguments=_arguments,
    run=_run,
)
