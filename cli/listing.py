"""`dsv4c passes`: the table of passes, for people and programs; that of targets is in `targets.py`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from .base import Command, json_option, load_compiler, plugin_option
from .show import as_json

if TYPE_CHECKING:
    from dsv4c.passes import Pass


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


PASSES = Command(
    name="passes",
    summary="list passes with their options and levels",
    about="List what a pipeline may name: options with their types and defaults, and the levels of the\n"
    "IR that a pass takes and gives.",
    examples=("dsv4c passes", "dsv4c passes --json"),
    arguments=_passes_arguments,
    run=_passes,
)
