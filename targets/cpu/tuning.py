"""What is best on one processor and not on another, and where that is written: numbers, never results.

`tunings.json` beside this file has what was measured for some processors; `dsv4c tune` measures this one and
writes a file of the same form for the user, which goes first. Nothing here changes a bit of what an artifact
computes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dsv4c.errors import TargetError, unknown

SHIPPED = Path(__file__).with_name("tunings.json")
VARIABLE = "DSV4C_TUNING"
"""The user's file; empty for none."""


@dataclass(frozen=True)
class Tuning:
    """Of products of stored matrices.

    Attributes:
        ahead: lines of 64 bytes by which kernels of few rows request stored codes ahead; 0 for never.
        strip: columns of a panel that are decoded before rows are multiplied by them.
        few: rows up to which stored codes go from memory into products, four rows at a time; more share codes
            that are decoded before.
    """

    ahead: int = 192
    strip: int = 256
    few: int = 8


DEFAULT = Tuning()
_BY_ARCH = {"x86-64-v4-amx": Tuning(few=2)}
"""Where the default is another one: tile registers pay from three rows on."""

ALLOWED: dict[str, tuple[int, ...]] = {
    "ahead": (0, 64, 128, 192, 256, 384),
    "strip": (128, 256, 512),
    "few": (1, 2, 3, 4, 8),
}
"""What a search tries; kernels take these and no others."""


def tuning_for(arch: str, model: str) -> Tuning:
    """What is known for an arch on a processor, see `runtime.cpu.cpu_model`; else the default.

    Raises:
        TargetError: the user's file cannot be read, or says what no kernel takes.
    """
    user = user_file()
    for path in (user, SHIPPED):
        if path is not None and (path == SHIPPED or path.exists()):
            found = read(path).get(model, {}).get(arch)
            if found is not None:
                return found
    return default_for(arch)


def default_for(arch: str) -> Tuning:
    """Of an arch, for processors of which nothing is known."""
    return _BY_ARCH.get(arch, DEFAULT)


def user_file() -> Path | None:
    """Where `dsv4c tune` writes: $DSV4C_TUNING, else `dsv4c/tuning.json` in the user's configuration."""
    said = os.environ.get(VARIABLE)
    if said is not None:
        return Path(said) if said else None
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "dsv4c" / "tuning.json"


@cache
def _parsed(path: Path, _: int) -> dict[str, dict[str, Tuning]]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot be read: {error}", where=str(path), hint=_HINT) from None
    if not isinstance(data, dict) or not all(isinstance(archs, dict) for archs in data.values()):
        raise TargetError("is no table of processors", where=str(path), allowed=_FORM, hint=_HINT)
    return {
        model: {a: checked(values, f"{path}: {model}: {a}", default_for(a)) for a, values in archs.items()}
        for model, archs in data.items()
    }


_FORM = '{"PROCESSOR": {"ARCH": {"ahead": N, "strip": N, "few": N}}}'
_HINT = f"run `dsv4c tune`, or delete the file, or set {VARIABLE} to nothing"


def read(path: Path) -> dict[str, dict[str, Tuning]]:
    """Processor -> arch -> tuning.

    Raises:
        TargetError: see `tuning_for`.
    """
    return _parsed(path, path.stat().st_mtime_ns if path.exists() else 0)


def checked(values: object, where: str, default: Tuning = DEFAULT) -> Tuning:
    """The tuning that a table of numbers says; what it leaves out is that of `default`.

    Raises:
        TargetError: a name or a number that no kernel takes.
    """
    if not isinstance(values, Mapping):
        raise TargetError("is no table of numbers", where=where, allowed=_FORM, hint=_HINT)
    for name, value in values.items():
        if name not in ALLOWED:
            raise unknown("number", str(name), ALLOWED, TargetError, where)
        if value not in ALLOWED[name] or isinstance(value, bool):
            allowed = ", ".join(str(n) for n in ALLOWED[name])
            raise TargetError(f"{name} is {value!r}", where=where, allowed=allowed, hint=_HINT)
    return replace(default, **values)


def merged(path: Path, model: str, arch: str, tuning: Tuning) -> str:
    """The text of a file with one entry more; the others stay.

    Raises:
        TargetError: see `tuning_for`.
    """
    table: dict[str, dict[str, Any]] = {}
    if path.exists():
        table = {m: {a: asdict(t) for a, t in archs.items()} for m, archs in read(path).items()}
    table.setdefault(model, {})[arch] = asdict(tuning)
    return json.dumps(table, indent=1, sort_keys=True) + "\n"
