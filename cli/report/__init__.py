"""`dsv4c report`: one self-contained HTML page about how an artifact was made and what it will cost to run.

Sections appear where the artifact carries their facts; the page loads nothing and runs no script.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dsv4c.cli.base import Command, check_directory_of
from dsv4c.errors import ToolchainError, UsageError
from dsv4c.runtime import Artifact

from .ceilings import Ceilings, measure


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="FILE", help="artifact made by dsv4c compile")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="page to write, e.g. r.html")
    parser.add_argument(
        "--ceilings", metavar="GFLOPS,GB/S",
        help="what the machine can do, for the roofline (default: measured here with NumPy, under a second)",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    check_directory_of(args.output, "the page")
    ceilings = _ceilings(args.ceilings)
    artifact = Artifact.open(args.artifact)
    write_report(artifact, args.output, ceilings)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1024:.0f} KiB")
    return 0


def _ceilings(text: str | None) -> Ceilings | None:
    if text is None:
        return None
    try:
        flops, bandwidth = (float(part) for part in text.split(","))
    except ValueError:
        flops = bandwidth = 0.0
    if not (0 < flops < float("inf") and 0 < bandwidth < float("inf")):
        raise UsageError(f"ceilings {text!r}", where="report", allowed="two positive numbers, e.g. 500,40")
    return Ceilings(flops * 1e9, bandwidth * 1e9, "as given")


def write_report(
    artifact: Artifact, output: str | os.PathLike[str], ceilings: Ceilings | None = None
) -> Path:
    """Write the page, whole or not at all.

    Args:
        ceilings: what the machine can do; None measures this one.

    Raises:
        ToolchainError: matplotlib is missing.
        UsageError: the page cannot be written.
    """
    try:
        from .page import render
    except ImportError as error:
        raise ToolchainError(
            f"the report needs matplotlib: {error}", hint='pip install "dsv4c[report]"'
        ) from error
    text = render(artifact, ceilings or measure())
    path = Path(output)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot be written: {error.strerror or error}", where=str(path)) from None
    return path


REPORT = Command(
    name="report",
    summary="write an HTML page about how an artifact was made",
    about="Write one self-contained HTML page: the pipeline, weights before and after, planned memory, the\n"
    "roofline of a step, and, where the artifact carries them, pruned experts, requantisation errors,\n"
    "quality on held-out text and Engram tiers. It needs no network to be read.",
    examples=("dsv4c report m.dsv4 -o report.html", "dsv4c report m.dsv4 -o r.html --ceilings 500,40"),
    arguments=_arguments,
    run=_run,
)

__all__ = ["REPORT", "write_report"]
