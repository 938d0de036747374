"""`dsv4c targets` and `dsv4c passes`: the two tables of the compiler, for people and programs."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from .base import Command, json_option, load_compiler, plugin_option
from .show import as_json, section, table

if TYPE_CHECKING:
    from dsv4c.passes import Pass
    from dsv4c.targets import Target

LINKERS = ("cc", "gcc", "clang")
"""Programs, beside $CC, that can link compiled code; the ziglang package is the one that pip installs."""


def _targets(args: argparse.Namespace) -> int:
    load_compiler()
    from dsv4c.targets import TARGETS as known

    facts = {"targets": [_target_facts(t) for t in known.values()], "linkers": _linkers()}
    print(as_json(facts) if args.json else _targets_text(facts))
    return 0


def _target_facts(target: Target) -> dict[str, Any]:
    default = target.default_arch()
    return {
        "name": target.name,
        "doc": target.doc,
        "numerics": list(target.numerics),
        "archs": [
            {"name": a.name, "machine": a.machine, "requires": list(a.requires), "default": a.name == default}
            for a in target.archs
        ],
        "formats": [
            {
                "name": f.name,
                "passes": f.passes,
                "packages": {p: _version(m, p) for m, p in f.packages.items()},
            }
            for f in target.formats
        ],
    }


def _version(module: str, package: str) -> str | None:
    """The installed version; None when the package is missing, "?" when it does not say."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _linkers() -> dict[str, str | None]:
    """What could link compiled code -> where it is, or its version; None when it is missing."""
    named = {"$CC": shutil.which(os.environ["CC"])} if os.environ.get("CC") else {}
    programs = {name: shutil.which(name) for name in LINKERS}
    return {**named, **programs, "ziglang": _version("ziglang", "ziglang")}


def _targets_text(facts: dict[str, Any]) -> str:
    rows = []
    for target in facts["targets"]:
        for arch in target["archs"]:
            mark = "default here" if arch["default"] else ""
            rows.append((f"{target['name']}:{arch['name']}", arch["machine"], mark))
    formats = [
        (t["name"], f["name"], ", ".join(f"{p} {v or 'MISSING'}" for p, v in f["packages"].items()))
        for t in facts["targets"] for f in t["formats"]
    ]  # fmt: skip
    docs = "\n".join(
        f"{t['name']}: {t['doc']}; numerics {', '.join(t['numerics'])}" for t in facts["targets"]
    )
    linkers = table([(name, found or "not found") for name, found in facts["linkers"].items()])
    return (
        docs + section("archs", table(rows))
        + section("formats", table(formats, ("target", "format", "needs")))
        + section("linkers (one is enough)", linkers)
    )  # fmt: skip


def _passes_arguments(parser: argparse.ArgumentParser) -> None:
    plugin_option(parser)
    json_option(parser)


def _passes(args: argparse.Namespace) -> int:
    load_compiler()
    from dsv4c.passes import known_passes

    facts = [_pass_facts(p) for p in known_passes(args.plugin).values()]
    print(as_json({"passes": facts}) if args.json else "\n\n".join(map(_pass_text, facts)))
    return 0


def _pass_facts(kind: type[Pass]) -> dict[str, Any]:
    from dsv4c.ir.levels import Level

    options = [
        {"name": f.name, "type": str(f.type), "default": None if f.default is MISSING else f.default}
        for f in fields(kind)
    ]
    takes = [level.value for level in Level if level in kind.takes]
    return {
        "name": kind.name,
        "options": options,
        "takes": takes,
        "gives": kind.gives.value if kind.gives else None,
        "doc": kind.doc,
    }


def _pass_text(facts: dict[str, Any]) -> str:
    options = ", ".join(f"{o['name']}: {o['type']} = {o['default']!r}" for o in facts["options"])
    levels = f"{' or '.join(facts['takes'])} -> {facts['gives'] or 'the same'}"
    return f"{facts['name']}" + (f"{{{options}}}" if options else "") + f"\n  {facts['doc']}\n  {levels}"


TARGETS = Command(
    name="targets",
    summary="list targets, archs, formats and the tools they need",
    about="List what `dsv4c compile --target` takes, and which packages and tools are found on this machine.",
    examples=("dsv4c targets", "dsv4c targets --json"),
    arguments=json_option,
    run=_targets,
)

PASSES = Command(
    name="passes",
    summary="list passes with their options and levels",
    about="List what a pipeline may name: options with their types and defaults, and the levels of the\n"
    "IR that a pass takes and gives.",
    examples=("dsv4c passes", "dsv4c passes --json"),
    arguments=_passes_arguments,
    run=_passes,
)
