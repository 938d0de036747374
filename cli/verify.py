"""`dsv4c verify`: replays an artifact's golden vectors here and names the first layer that differs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from dsv4c.errors import UsageError
from dsv4c.runtime import Artifact
from dsv4c.runtime.verify import Check, verify

from .base import Command, json_option, threads_option
from .show import as_json, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="artifact")
    parser.add_argument("--full", action="store_true", help="first check every byte against its checksum")
    parser.add_argument(
        "--on", default="cpu", metavar="WHERE",
        help="cpu (default): this machine's processor, which also runs the models made for devices; device: "
        "the device they were made for, from converted programs",
    )  # fmt: skip
    parser.add_argument("--programs", metavar="DIR", help="with --on device: the converted programs")
    threads_option(parser)
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    artifact = Artifact.open(args.file, check="full" if args.full else "code")
    checks = verify(artifact, args.threads, _opener(args, artifact))
    first = next((check for check in checks if not check.ok), None)
    print(as_json(_facts(checks, first)) if args.json else _text(checks, first))
    return 1 if first else 0


def _opener(args: argparse.Namespace, artifact: Artifact) -> Any:
    """Who runs the programs; None is this machine."""
    if args.on not in ("cpu", "device"):
        raise UsageError(f"--on {args.on}", where="dsv4c verify", allowed="cpu, device")
    if args.on == "cpu":
        if args.programs:
            raise UsageError("--programs without --on device", where="dsv4c verify")
        return None
    if artifact.meta["target"] != "ascend":
        raise UsageError(
            f"--on device for {artifact.meta['target']}", where="dsv4c verify", allowed="target ascend",
            hint="verify --on cpu runs the same models here",
        )  # fmt: skip
    if not args.programs:
        raise UsageError(
            "--on device without --programs", where="dsv4c verify",
            hint="dsv4c unpack, run build.sh there, and name the folder om/",
        )  # fmt: skip
    from dsv4c.runtime.acl_programs import acl_opener

    return acl_opener(Path(args.programs))


def _facts(checks: list[Check], first: Check | None) -> dict[str, Any]:
    return {
        "ok": first is None,
        "first": first.name if first else None,
        "layer": layer_of(first) if first else None,
        "checks": [{"name": c.name, "error": c.error, "tolerance": c.tolerance, "ok": c.ok} for c in checks],
    }


def _text(checks: list[Check], first: Check | None) -> str:
    rows = [(c.name, f"{c.error:.2e}", f"{c.tolerance:.0e}", "ok" if c.ok else "FAILED") for c in checks]
    lines = table(rows, ("check", "error", "allowed", ""), right=[1, 2])
    return f"{lines}\n\n{_verdict(checks, first)}"


def _verdict(checks: list[Check], first: Check | None) -> str:
    if first is None:
        return f"ok: {len(checks)} checks, the largest error is {max(c.error for c in checks):.2e}"
    failed, layer = sum(not c.ok for c in checks), layer_of(first)
    if layer is None:
        place = "after the last layer's state" if first.name == "logits" else "outside the layers"
    else:
        # Queries, outputs and experts of a layer leave no state of their own; the next layer's shows them.
        place = f"in layer {layer}" + (
            f", or in layer {layer - 1} after its state was written" if layer else ""
        )
    count = f"{failed} of {len(checks)} checks"
    return f"FAILED: {count}; the first is {first.name}: the difference begins {place}"


def layer_of(check: Check) -> int | None:
    """The layer whose state a check compares; None for the logits and the position."""
    found = re.search(r"layers\.(\d+)\.", check.name)
    return int(found[1]) if found else None


VERIFY = Command(
    name="verify",
    summary="check an artifact where it runs",
    about="Run the golden prompt of an artifact and compare every layer's state and the logits with the\n"
    "results of the slow evaluator that were compiled in. Exit code 1 when they differ; an artifact that is\n"
    "damaged so that it cannot be opened is an error, exit code 2.",
    examples=(
        "dsv4c verify m.dsv4",
        "dsv4c verify m.dsv4 --full --json",
        "dsv4c verify m.dsv4 --on device --programs device/om",
    ),
    arguments=_arguments,
    run=_run,
)
