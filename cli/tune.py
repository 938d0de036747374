"""`dsv4c tune`: measures what is best on this processor, and keeps it for artifacts compiled here."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv4c.errors import UsageError
from dsv4c.runtime.cpu import cpu_model, lacks

from .base import Command, integer, json_option, load_compiler
from .progress import Bars
from .show import as_json, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", default="cpu", metavar="cpu[:ARCH]", help="an arch of the CPU (default: this machine's)"
    )
    parser.add_argument(
        "--rounds", type=integer(1), default=7, metavar="N", help="times each candidate (default 7)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where to keep it (default: the user's file)")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="default: every core")
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    if args.threads:
        os.environ["TVM_NUM_THREADS"] = str(args.threads)  # read when TVM's runtime loads
    tuning = load_compiler("dsv4c.targets.cpu.tuning")
    target, arch = load_compiler("dsv4c.targets").parse_target(args.target)
    if target.name != "cpu":
        raise UsageError(f"target {args.target!r}", where="dsv4c tune", allowed="cpu, cpu:ARCH")
    if arch.members:
        raise UsageError(f"several archs: {arch.name}", where="dsv4c tune", allowed="one at a time")
    if why := lacks(arch.machine, arch.requires):
        raise UsageError(
            why, where=f"dsv4c tune --target cpu:{arch.name}",
            allowed="an arch that runs here", hint="dsv4c targets lists archs",
        )  # fmt: skip
    model = cpu_model()
    output = Path(args.output) if args.output else tuning.user_file()
    if not model or output is None:
        what = f"{tuning.VARIABLE} is empty" if model else "this system does not say which processor it has"
        raise UsageError(what, where="dsv4c tune", hint="name a file with -o")
    before = tuning.tuning_for(arch.name, model)
    tuning.merged(output, model, arch.name, before)  # complains before the long work
    with Bars(not args.json) as bar:
        found, trials = load_compiler("dsv4c.targets.cpu.tvm.search").search(arch, args.rounds, bar)
    text = tuning.merged(output, model, arch.name, found)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(output)
    facts = {
        "path": str(output), "processor": model, "arch": arch.name, "before": asdict(before),
        "found": asdict(found), "trials": [asdict(t) for t in trials],
    }  # fmt: skip
    print(as_json(facts) if args.json else _words(facts))
    return 0


def _words(facts: dict[str, Any]) -> str:
    rows = [(t["name"], t["value"], f"{t['ratio']:.3f}") for t in facts["trials"]]
    found = ", ".join(f"{k} {v}" for k, v in facts["found"].items())
    was = ", ".join(f"{k} {v}" for k, v in facts["before"].items())
    return "\n".join([
        table(rows, ("number", "value", "time over the one before"), right=(1, 2)), "",
        f"{facts['processor']}, {facts['arch']}: {found} (so far {was})", f"kept in {facts['path']}",
    ])  # fmt: skip


TUNE = Command(
    name="tune",
    summary="measure what kernels do best with on this processor",
    about="Time matrix products with more and less memory requested ahead, decoded at a time, and rows that"
    "\ndecode for themselves; the best numbers are kept in a file that `dsv4c compile` reads. They change no"
    "\nresult. It takes a few minutes; leave the machine alone meanwhile.",
    examples=("dsv4c tune", "dsv4c tune --target cpu:x86-64-v3 --rounds 15 -o tuning.json --json"),
    arguments=_arguments,
    run=_run,
)
