"""`dsv4c targets`: machines with their published figures, and formats; or `--check`, the tools found here."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .base import Command, json_option, load_compiler, plugin_option
from .show import as_json, section, table

if TYPE_CHECKING:
    from dsv4c.targets import Arch, Target
    from dsv4c.targets.hardware import Device

LINKERS = ("cc", "gcc", "clang")
"""Programs, beside $CC, that can link compiled code; the ziglang package is the one that pip installs."""

UNKNOWN = "?"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true",
        help="which tools each target uses, which are found here, and how to get the others",
    )  # fmt: skip
    plugin_option(parser)
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    load_compiler()
    from dsv4c.targets import known_devices, known_targets

    known = known_targets(args.plugin)
    if args.check:
        facts = check_facts(known)
        print(as_json(facts) if args.json else check_text(facts))
        return 0
    devices = known_devices(args.plugin)
    facts = {"targets": [_target_facts(t, devices) for t in known.values()], "linkers": _linkers()}
    print(as_json(facts) if args.json else _text(facts))
    return 0


# ------------------------------------------------------------------------------------- the table


def _target_facts(target: Target, devices: Mapping[str, Device]) -> dict[str, Any]:
    default = target.default_arch()
    return {
        "name": target.name,
        "doc": target.doc,
        "numerics": list(target.numerics),
        "archs": [
            {**_arch_facts(a, devices), "numerics": list(target.numerics_of(a)), "default": a.name == default}
            for a in target.archs
        ],
        "sets": {name: list(names) for name, names in (target.sets or {}).items()},
        "formats": [
            {
                "name": f.name,
                "passes": f.passes,
                "packages": {p: _version(m, p) for m, p in f.packages.items()},
            }
            for f in target.formats
        ],
    }


def _arch_facts(arch: Arch, devices: Mapping[str, Device]) -> dict[str, Any]:
    """`device` is null where the code runs on the host, `figures` where nobody has them."""
    known = devices.get(arch.device)
    return {
        "name": arch.name,
        "machine": arch.machine,
        "requires": list(arch.requires),
        "device": arch.device or None,
        "figures": asdict(known) if known else None,
    }


def _version(module: str, package: str) -> str | None:
    """The installed version; None when the package is missing, "?" when it does not say."""
    from dsv4c.targets.toolchains import package as finder

    found = finder(module, package)()
    return found.version if found else None


def _linkers() -> dict[str, str | None]:
    """What could link compiled code -> where it is, or its version; None when it is missing."""
    named = {"$CC": shutil.which(os.environ["CC"])} if os.environ.get("CC") else {}
    programs = {name: shutil.which(name) for name in LINKERS}
    return {**named, **programs, "ziglang": _version("ziglang", "ziglang")}


def _text(facts: dict[str, Any]) -> str:
    from dsv4c.targets.hardware import FORMATS

    archs = [_row(t["name"], a, FORMATS) for t in facts["targets"] for a in t["archs"]]
    header = ("target", "runs on", "memory", "bandwidth", *FORMATS)
    formats = [
        (t["name"], f["name"], ", ".join(f"{p} {v or 'MISSING'}" for p, v in f["packages"].items()))
        for t in facts["targets"] for f in t["formats"]
    ]  # fmt: skip
    docs = "\n".join(f"{t['name']}: {t['doc']}; numerics {_numerics(t)}" for t in facts["targets"])
    sets = [(f"{t['name']}:{n}", "+".join(names)) for t in facts["targets"] for n, names in t["sets"].items()]
    linkers = table([(name, found or "not found") for name, found in facts["linkers"].items()])
    return (
        docs
        + section(
            f"archs, with published figures; peaks in T operations/s, {UNKNOWN} is not known",
            table(archs, (*header, ""), right=range(2, len(header))),
        )
        + section("several archs in one artifact, also A+B", table(sets))
        + section("formats", table(formats, ("target", "format", "needs")))
        + section("linkers (one is enough)", linkers)
    )


def _numerics(target: Mapping[str, Any]) -> str:
    """Those of the target, and of the archs that have others."""
    own = target["numerics"]
    others = [f"{a['name']}: {', '.join(a['numerics'])}" for a in target["archs"] if a["numerics"] != own]
    return "; ".join([", ".join(own), *others])


def _row(target: str, arch: Mapping[str, Any], formats: tuple[str, ...]) -> list[str]:
    """Figures stand for devices only: the host's are not published by its arch."""
    mark = "default here" if arch["default"] else ""
    head = [f"{target}:{arch['name']}", arch["device"] or arch["machine"]]
    if not arch["device"]:
        return [*head, *[""] * (len(formats) + 2), mark]
    figures = arch["figures"] or {}
    peaks = figures.get("peaks", {})
    cells = [_figure(figures.get("memory"), 1e9, " GB"), _figure(figures.get("bandwidth"), 1e9, " GB/s")]
    return [*head, *cells, *(_figure(peaks.get(name), 1e12) for name in formats), mark]


def _figure(value: float | None, unit: float, name: str = "") -> str:
    return UNKNOWN if value is None else f"{value / unit:.4g}{name}"


# -------------------------------------------------------------------------------------- tool chains


def check_facts(targets: Mapping[str, Target]) -> dict[str, Any]:
    """Per target its tools and whether they were found; and the variables that name vendors' folders."""
    from dsv4c.targets.toolchains import HOMES, Tool, tools_of

    def facts(tool: Tool) -> dict[str, Any]:
        found = tool.find()
        return {
            "name": tool.name, "purpose": tool.purpose, "get": tool.get, "compiling": tool.compiling,
            "instead_of": tool.instead_of or None, "found": asdict(found) if found else None,
        }  # fmt: skip

    return {
        "targets": [{"name": t.name, "tools": [facts(x) for x in tools_of(t)]} for t in targets.values()],
        "homes": {name: os.environ.get(name) for name in HOMES},
    }


def check_text(facts: dict[str, Any]) -> str:
    homes = [(name, value or "not set") for name, value in facts["homes"].items()]
    parts = [section(f"{t['name']}: {_verdict(t['tools'])}", _tools(t["tools"])) for t in facts["targets"]]
    return "".join([*parts, section("vendors' folders", table(homes))]).strip()


def _verdict(tools: list[dict[str, Any]]) -> str:
    missing = [t["name"] for t in tools if t["compiling"] and not _served(t, tools)]
    if missing:
        return f"to compile, {', '.join(missing)} is missing here"
    return "artifacts can be compiled here"


def _served(tool: dict[str, Any], tools: list[dict[str, Any]]) -> bool:
    """Whether a tool, or one that does the same, is here."""
    kind = tool["instead_of"] or tool["name"]
    return any(t["found"] for t in tools if kind in (t["name"], t["instead_of"]))


def _tools(tools: list[dict[str, Any]]) -> str:
    rows = [
        (t["name"], *_found(t["found"]), "compile" if t["compiling"] else "", t["purpose"]) for t in tools
    ]
    places = dict.fromkeys(t["get"] for t in tools if not t["found"])
    missing = [
        f"to get {', '.join(t['name'] for t in tools if t['get'] == get and not t['found'])}: {get}"
        for get in places
    ]
    return "\n".join((table(rows, ("tool", "version", "found in", "needed to", "what for")), *missing))


def _found(found: dict[str, str] | None) -> tuple[str, str]:
    return (found["version"], found["where"]) if found else ("", "not found")


TARGETS = Command(
    name="targets",
    summary="list targets, archs, formats and the tools they need",
    about="List what `dsv4c compile --target` takes, with the published figures of each device and the\n"
    "packages of each format. With --check, list the tools that each target uses outside dsv4c: which are\n"
    "found on this machine, what for, and how to get the others. Artifacts for devices are compiled without\n"
    "their vendors' tools; it is a report, so the exit code is 0.",
    examples=(
        "dsv4c targets",
        "dsv4c targets --check",
        "dsv4c targets --plugin my_target.py --json",
    ),
    arguments=_arguments,
    run=_run,
)
