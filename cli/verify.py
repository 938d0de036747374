"""`dsv4c verify`: replays an artifact's golden vectors here and names the first layer that differs."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv4c.errors import UsageError
from dsv4c.runtime import Artifact
from dsv4c.runtime.archs import archs_of, taken
from dsv4c.runtime.rehearsal import rehearse
from dsv4c.runtime.static_backend import provider_opener
from dsv4c.runtime.verify import Check, failures, verify

from .base import Command, arch_option, json_option, threads_option
from .show import as_json, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="artifact")
    parser.add_argument("--full", action="store_true", help="first check every byte against its checksum")
    parser.add_argument(
        "--on", default="cpu", metavar="WHERE",
        help="cpu (default): this machine's processor, which also runs the models made for devices; device: "
        "the device they were made for, from converted programs, by its provider of ONNX Runtime, or by the "
        "launch plan, of which cpu checks every launch and computes none",
    )  # fmt: skip
    parser.add_argument("--programs", metavar="DIR", help="with --on device: the converted programs")
    threads_option(parser)
    arch_option(parser)
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    artifact = Artifact.open(args.file, check="full" if args.full else "code")
    if artifact.meta["format"] == "plan" and args.on == "cpu":
        return _rehearse(args, artifact)
    checks = verify(artifact, args.threads, _opener(args, artifact), args.arch)
    failed = failures(checks)
    arch = args.arch or taken(artifact)
    print(as_json({"arch": arch, **_facts(checks, failed)}) if args.json else _text(checks, failed))
    if not args.json and len(archs_of(artifact)) > 1:
        print(f"by the code for {arch}")
    return 1 if failed else 0


def _rehearse(args: argparse.Namespace, artifact: Artifact) -> int:
    """A launch plan without its device: every launch is checked, and nothing is computed."""
    found = rehearse(artifact)
    print(as_json({"ok": True, "computed": False, **asdict(found)}) if args.json else (
        f"ok: {found.launches} launches of {found.kernels} kernels in {found.steps} steps on {found.devices} "
        "device(s) checked, nothing computed\nverify --on device compares numbers where the device is"
    ))  # fmt: skip
    return 0


def _opener(args: argparse.Namespace, artifact: Artifact) -> Any:
    """Who runs the programs; None is this machine."""
    if args.on not in ("cpu", "device"):
        raise UsageError(f"--on {args.on}", where="dsv4c verify", allowed="cpu, device")
    if args.on == "cpu":
        if args.programs:
            raise UsageError("--programs without --on device", where="dsv4c verify")
        return None
    if artifact.meta["format"] == "plan":
        return None
    if artifact.meta.get("onnx", {}).get("static", {}).get("provider"):
        if args.programs:
            raise UsageError(
                f"--programs for {artifact.meta['target']}", where="dsv4c verify",
                allowed="--on device alone", hint="nothing is converted: ONNX Runtime reads the artifact",
            )  # fmt: skip
        return provider_opener(artifact)
    if artifact.meta["target"] != "ascend":
        raise UsageError(
            f"--on device for {artifact.meta['target']}", where="dsv4c verify",
            allowed="targets ascend, cuda, rocm", hint="verify --on cpu runs the same models here",
        )  # fmt: skip
    if not args.programs:
        raise UsageError(
            "--on device without --programs", where="dsv4c verify",
            hint="dsv4c unpack, run build.sh there, and name the folder om/",
        )  # fmt: skip
    from dsv4c.runtime.acl_programs import acl_opener

    return acl_opener(Path(args.programs))


def _facts(checks: list[Check], failed: list[Check]) -> dict[str, Any]:
    return {
        "ok": not failed,
        "first": failed[0].name if failed else None,
        "layer": layer_of(failed[0]) if failed else None,
        "checks": [
            {
                "name": c.name, "error": c.error, "tolerance": c.tolerance, "ok": c not in failed,
                "rows": c.rows, "undecided": c.undecided, "astray": c.astray,
                "off": c.off, "may_be_off": c.may_be_off,
            }
            for c in checks
        ],
    }  # fmt: skip


def _text(checks: list[Check], failed: list[Check]) -> str:
    rows = [
        (c.name, f"{c.error:.2e}" if c.decided else "-", f"{c.tolerance:.0e}",
         "FAILED" if c in failed else "ok" if c.decided else "undecided", _left_out(c))
        for c in checks
    ]  # fmt: skip
    lines = table(rows, ("check", "error", "allowed", "", ""), right=[1, 2])
    return f"{lines}\n\n{_verdict(checks, failed)}"


def _left_out(check: Check) -> str:
    if not check.undecided:
        return ""
    off = f"{check.off} of them off" + (f" by {check.astray:.1e}" if check.off else "")
    return f"{check.undecided} of {check.rows} left out, {off} (at most {check.may_be_off})"


def _verdict(checks: list[Check], failed: list[Check]) -> str:
    if not failed:
        return _passed(checks)
    count, first = f"{len(failed)} of {len(checks)} checks", failed[0]
    if all(c.ok for c in failed):
        return f"FAILED: {count} have no position that is decided, so nothing was judged"
    layer = layer_of(first)
    if layer is None:
        place = "after the last layer's state" if first.name == "logits" else "outside the layers"
    else:
        # Queries, outputs and experts of a layer leave no state of their own; the next layer's shows them.
        place = f"in layer {layer}" + (
            f", or in layer {layer - 1} after its state was written" if layer else ""
        )
    return f"FAILED: {count}; the first is {first.name}: the difference begins {place}"


def _passed(checks: list[Check]) -> str:
    best = f"ok: {len(checks)} checks, the largest error is {max(c.error for c in checks):.2e}"
    if not any(c.undecided for c in checks):
        return best
    count, none = sum(c.undecided for c in checks), sum(not c.decided for c in checks)
    more = f"; in {none} checks these are all" if none else ""
    return f"{best}\n{count} positions hang on a choice that rounding decides and were left out{more}"


def layer_of(check: Check) -> int | None:
    """The layer whose state a check compares; None for the logits and the position."""
    found = re.search(r"layers\.(\d+)\.", check.name)
    return int(found[1]) if found else None


VERIFY = Command(
    name="verify",
    summary="check an artifact where it runs",
    about="Run the golden prompt of an artifact and compare every layer's state and the logits with the\n"
    "results of the slow evaluator that were compiled in. Exit code 1 when they differ; an artifact that is\n"
    "damaged so that it cannot be opened is an error, exit code 2. Positions that hang on a route or a\n"
    "selection which rounding decides are left out of the error, and counted.",
    examples=(
        "dsv4c verify m.dsv4",
        "dsv4c verify m.dsv4 --full --json",
        "dsv4c verify m.dsv4 --on device",
        "dsv4c verify m.dsv4 --on device --programs device/om",
    ),
    arguments=_arguments,
    run=_run,
)
