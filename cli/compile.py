"""`dsv4c compile`: a checkpoint directory into one artifact file, with a summary at the end."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from dsv4c.errors import UsageError
from dsv4c.runtime import Artifact

from .base import Command, integer, json_option, load_compiler, plugin_option, read_text
from .progress import Bars
from .show import as_json, section, size, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory with config.json and *.safetensors"
    )
    parser.add_argument(
        "--target", required=True, metavar="T[:ARCH]",
        help="machine to compile for: dsv4c targets; cpu:A+B and cpu:portable hold code for several",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="artifact to write, e.g. m.dsv4"
    )
    parser.add_argument("--format", default="", metavar="F", help="tvm or onnx (default: the target's first)")
    parser.add_argument(
        "--numerics",
        default="",
        metavar="N",
        help="exact: FP32 arithmetic; reference: the published rounding points; fast: what the device does "
        "best (INT8; FP8 and FP4 on ascend:950); half: FP16 products. The arch's first by default: "
        "dsv4c targets",
    )
    parser.add_argument(
        "--passes", metavar="P,...",
        help="a pipeline instead of the target's own, or edits of it: default, without(a), with(a{k=v}), "
        "before(a, b{k=v}), after(a, b{k=v}); see dsv4c passes",
    )  # fmt: skip
    plugin_option(parser)
    parser.add_argument(
        "--devices", type=integer(1), metavar="N",
        help="cut the model over N equal devices, each with some of the layers (default: what the pipeline "
        "says, which is one)",
    )  # fmt: skip
    parser.add_argument(
        "--verify-passes", action="store_true",
        help="evaluate the graph on random inputs around every pass; stop at the first that breaks its word",
    )  # fmt: skip
    parser.add_argument(
        "--heldout", action="append", default=[], metavar="FILE",
        help="text to measure on: perplexity, KL divergence and top-1 agreement against the same model in "
        "exact numerics and without --passes go into the report, and the error by layer",
    )  # fmt: skip
    parser.add_argument(
        "--random-seeds", type=integer(0), default=0, metavar="N",
        help="with --heldout and prune_experts: also measure N prunings of equal size by chance",
    )  # fmt: skip
    parser.add_argument(
        "--export-checkpoint", metavar="DIR",
        help="also write the model as its passes at level MODEL left it, as a checkpoint",
    )  # fmt: skip
    parser.add_argument("--dump-ir", metavar="DIR", help="write the IR text after every pass into DIR")
    parser.add_argument(
        "--no-golden", action="store_true", help="leave out the vectors that dsv4c verify replays"
    )
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    api = load_compiler()
    if args.dump_ir and Path(args.dump_ir).exists() and not Path(args.dump_ir).is_dir():
        raise UsageError("is not a directory", where=args.dump_ir, allowed="a directory for --dump-ir")
    if args.random_seeds and not args.heldout:
        raise UsageError("--random-seeds without --heldout", where="dsv4c compile", hint="name a text")
    texts = [read_text(path) for path in args.heldout]
    started = time.perf_counter()
    with Bars() as bars:
        options: dict[str, Any] = {
            "target": args.target, "numerics": args.numerics, "format": args.format, "passes": args.passes,
            "plugins": args.plugin, "verify_passes": args.verify_passes, "golden": not args.no_golden,
            "devices": args.devices, "dump_ir": args.dump_ir, "progress": bars, "output": args.output,
        }  # fmt: skip
        if args.export_checkpoint:
            _export(args)
        if texts:
            quality = load_compiler("dsv4c.quality")
            seeds = args.random_seeds
            path = quality.compile_measured(args.checkpoint, *texts, random_seeds=seeds, **options)
        else:
            path = api.compile(args.checkpoint, **options)
    facts = summary(Artifact.open(path), time.perf_counter() - started)
    print(as_json(facts) if args.json else _text(facts))
    return 0


def _export(args: argparse.Namespace) -> None:
    """The checkpoint first: it is the quicker, and it refuses a directory that is in use."""
    api = load_compiler()
    lowered = api.lower(
        api.load_checkpoint(args.checkpoint), args.target, args.format, args.passes, args.plugin
    )
    done = api.export(lowered.model, args.export_checkpoint, args.checkpoint)
    padded = f", padded in {', '.join(done.padded)}" if done.padded else ""
    left = f"; left out: {len(done.dropped)} tensors, the first {done.dropped[0]}" if done.dropped else ""
    print(
        f"{args.export_checkpoint}: {done.tensors} tensors, {size(done.bytes)}, {done.experts} experts"
        f" a layer{padded}{left}",
        file=sys.stderr,
    )


def summary(artifact: Artifact, seconds: float) -> dict[str, Any]:
    """What a compilation made: sizes in bytes, op counts, seconds in all."""
    meta = artifact.meta
    golden = sum(t.nbytes for t in artifact.tensors.values() if t.name.startswith("golden."))
    return {
        "path": str(artifact.path),
        "target": f"{meta['target']}:{meta['arch']['name']}",
        "format": meta["format"],
        "numerics": meta["numerics"],
        "bytes": {
            "file": artifact.path.stat().st_size,
            "weights": artifact.weight_bytes - golden,
            "golden": golden,
            "sections": {s.name: s.nbytes for s in artifact.sections.values()},
        },
        "ops": meta["report"]["ops"],
        "pipeline": meta["report"]["pipeline"],
        "passes": meta["report"]["passes"],
        "seconds": round(seconds, 3),
    }


def _text(facts: dict[str, Any]) -> str:
    sizes = facts["bytes"]
    rows = [("weights", size(sizes["weights"])), *((name, size(n)) for name, n in sizes["sections"].items())]
    if sizes["golden"]:
        rows.append(("golden vectors", size(sizes["golden"])))
    ops = " -> ".join(f"{count} at {level}" for level, count in facts["ops"].items())
    return (
        f"{facts['path']}: {size(sizes['file'])}, {facts['target']}, {facts['format']}, {facts['numerics']}, "
        f"{facts['seconds']:.1f} s" + section("sizes", table(rows, right=[1])) + section("ops", ops)
    )


COMPILE = Command(
    name="compile",
    summary="compile a checkpoint into one artifact file",
    about="Compile a DeepSeek-V4 checkpoint directory into one artifact file. The file appears whole or not\n"
    "at all; the checkpoint is not needed any more to run or to verify it.",
    examples=(
        "dsv4c compile CHECKPOINT --target cpu -o m.dsv4",
        "dsv4c compile CHECKPOINT --target cpu:portable -o m.dsv4",
        "dsv4c compile CHECKPOINT --target cpu:x86-64-v3 --format onnx -o m.dsv4",
        "dsv4c compile CHECKPOINT --target cpu -o m.dsv4 --dump-ir ir/ --verify-passes",
        'dsv4c compile CHECKPOINT --target cpu -o m.dsv4 --passes "without(fuse_index_select)"',
        "dsv4c compile CHECKPOINT --target cuda:sm_90a --devices 8 -o m.dsv4",
    ),
    arguments=_arguments,
    run=_run,
)
