"""Targets by name: the project's own, those of installed packages, and those of files on the command line.

Owns what makes a stranger's target acceptable, where figures of its devices come from, and the parsing of
`target[:arch]`. Knows no target itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from dsv4c.errors import TargetError, unknown
from dsv4c.ir.ops import OPS
from dsv4c.passes.plugins import entries, load_plugin, passes_in

from .base import Arch, Target
from .golden import TOLERANCES
from .hardware import Device, load_devices
from .table import TARGETS

GROUP = "dsv4c.targets"
"""The entry point group; an entry is a `Target`, a `Device`, or a module that holds some."""

Files = Sequence[str | os.PathLike[str]]
Named = TypeVar("Named", Target, Device)

GUIDE = "docs/adding-a-target.md shows a whole target"


def known_targets(plugins: Files = ()) -> dict[str, Target]:
    """The targets of the project, of installed packages, and of the given files, by name.

    A file may bring passes, targets and devices; `passes.known_passes` takes the passes of the same files.

    Raises:
        TargetError: a file or entry cannot be imported, holds nothing of use, holds a target that names ops
            or devices that do not exist, or uses a name that is taken.
    """
    found, devices = dict(TARGETS), known_devices(plugins)
    _collect("target", found, plugins, lambda value, origin: _check(value, devices, origin))
    return found


def known_devices(plugins: Files = ()) -> dict[str, Device]:
    """The devices of `hardware.json`, of installed packages, and of the given files, by name.

    Raises:
        TargetError: see `known_targets`.
    """
    found = load_devices()
    _collect("device", found, plugins, lambda value, origin: None)
    return found


def _collect(what: str, known: dict[str, Named], plugins: Files, check: Callable[[Named, str], None]) -> None:
    """Add what `plugins` and entry points bring of the kind that `known` has."""
    own = list(known.values())
    kind, places = type(own[0]), dict.fromkeys(known, "dsv4c itself")
    for origin, brought in _brought(plugins):
        for value in brought:
            if not isinstance(value, kind) or value in own:
                continue
            check(value, origin)
            if known.setdefault(value.name, value) is not value:
                raise TargetError(
                    f"a {what} is already called {value.name!r}", where=origin, allowed="a name of its own",
                    hint=f"the other one is of {places[value.name]}",
                )  # fmt: skip
            places.setdefault(value.name, origin)


def _brought(plugins: Files) -> Iterator[tuple[str, list[object]]]:
    """The values of every entry point and file, each with its origin in words."""
    for origin, loaded in entries(GROUP, TargetError):
        values = (
            [loaded]
            if isinstance(loaded, Target | Device)
            else list(getattr(loaded, "__dict__", {}).values())
        )
        if not _of_use(values):
            raise TargetError("is no target and holds none", where=origin, allowed="a Target", hint=GUIDE)
        yield origin, values
    for path in plugins:
        module = load_plugin(path, TargetError)
        values = list(vars(module).values())
        if not _of_use(values) and not passes_in(module):
            raise TargetError(
                "defines neither a pass nor a target", where=str(path), hint=GUIDE,
                allowed="subclasses of dsv4c.passes.Pass, values of dsv4c.targets.Target",
            )  # fmt: skip
        yield str(path), values


def _of_use(values: Collection[object]) -> bool:
    """Whether there is a target among them, or figures of a device; one of the project's own is no news."""
    own = [*TARGETS.values(), *load_devices().values()]
    return any(isinstance(v, Target | Device) and v not in own for v in values)


def parse_target(text: str, plugins: Files = ()) -> tuple[Target, Arch]:
    """`cpu` or `cpu:x86-64-v4` -> the target and its arch.

    Raises:
        TargetError: either name is unknown; lists the known ones. Or see `known_targets`.
    """
    name, _, arch = text.partition(":")
    known = known_targets(plugins)
    if name not in known:
        raise unknown("target", name, known, TargetError)
    return known[name], known[name].arch(arch)


def _check(target: Target, devices: Collection[str], origin: str) -> None:
    where = f"{origin}, target {target.name!r}"
    if not re.fullmatch(r"[a-z][\w-]*", target.name):
        raise TargetError("the name is no word", where=where, allowed="words like toyboard, or toy-board")
    missing = target.ops.union(*(f.extra_ops for f in target.formats)) - OPS.keys()
    if missing:
        raise unknown("op", min(missing), OPS, TargetError, where)
    for arch in target.archs:
        if arch.device and arch.device not in devices:
            raise unknown("device", arch.device, devices, TargetError, f"{where}, arch {arch.name!r}")
    each = [target.numerics_of(a, f) for a in target.archs for f in target.formats]
    for numerics in (target.numerics, *each):
        strange = numerics.keys() - {*TOLERANCES, "reference"}
        if strange or not numerics:
            allowed = f"some of {', '.join(TOLERANCES)}, reference: artifacts are held to what these promise"
            raise TargetError(f"numerics {', '.join(strange) or 'of no kind'}", where=where, allowed=allowed)
    target.arch("")
