"""`dsv4c unpack`: an artifact for a device as the files that the vendor's converter reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4c.runtime import Artifact
from dsv4c.runtime.unpack import unpack

from .base import Command, json_option
from .show import as_json, size, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="artifact")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--link", action="store_true", help="do not copy the weights: a second name for the artifact's bytes"
    )
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    artifact, directory = Artifact.open(args.file), Path(args.output)
    made = unpack(artifact, directory, args.link)
    files = [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in made]
    facts = {"directory": str(directory), "files": [{"name": n, "bytes": b} for n, b in files]}
    rows = [(name, size(count)) for name, count in files]
    print(as_json(facts) if args.json else table(rows, ("file", "size"), right=[1]))
    return 0


UNPACK = Command(
    name="unpack",
    summary="the files of an artifact that a vendor's converter reads",
    about="Take an artifact for a device apart: models, weights, and the scripts that convert them where\n"
    "the vendor's toolchain is installed.",
    examples=("dsv4c unpack m.dsv4 -o device/", "dsv4c unpack m.dsv4 -o device/ --link --json"),
    arguments=_arguments,
    run=_run,
)
