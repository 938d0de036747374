"""For which processors an artifact holds code, and which of it this machine takes.

`select` makes of an artifact for several one for a single arch, so that nothing else need know of several.
Knows no executing package.
"""

from __future__ import annotations

import platform
from dataclasses import replace

from dsv4c.errors import ArtifactError, unknown

from .container import Artifact
from .container.several import Facts, facts_of, section_names
from .cpu import cpu_flags, lacks


def archs_of(artifact: Artifact) -> list[Facts]:
    """What an artifact holds code for, the best first: `name`, `machine`, `requires` of each."""
    arch = artifact.meta["arch"]
    found: list[Facts] = arch.get("archs", [arch])
    return found


def select(artifact: Artifact, name: str = "") -> Artifact:
    """The artifact as this machine runs it: with the code of one arch, and the facts of it.

    Args:
        name: the arch to take; "" is the best that this machine has.

    Raises:
        ArtifactError: the artifact has no such code, or this machine cannot run it, or any of it.
    """
    archs, where = archs_of(artifact), str(artifact.path)
    if name:
        if name not in [a["name"] for a in archs]:
            raise unknown("arch", name, [a["name"] for a in archs], ArtifactError, where)
        archs = [a for a in archs if a["name"] == name]
    if artifact.meta["format"] != "tvm":  # code is made where it runs
        return artifact
    found = _fitting(archs)
    if found is None:
        raise _nothing_fits(artifact, archs)
    return _for_arch(artifact, found) if "archs" in artifact.meta["arch"] else artifact


def taken(artifact: Artifact) -> str:
    """The arch that `select` takes here; "" where none fits."""
    if artifact.meta["format"] != "tvm":
        return str(artifact.meta["arch"]["name"])
    found = _fitting(archs_of(artifact))
    return found["name"] if found else ""


def _fitting(archs: list[Facts]) -> Facts | None:
    """The first that fits; the last where nobody knows what this processor can do, for it needs least."""
    fitting = [a for a in archs if not lacks(a["machine"], a["requires"])]
    if not fitting:
        return None
    return fitting[0] if cpu_flags() else fitting[-1]


def _nothing_fits(artifact: Artifact, archs: list[Facts]) -> ArtifactError:
    why = [f"{a['name']}: {lacks(a['machine'], a['requires'])}" for a in archs]
    have, where = archs_of(artifact), str(artifact.path)
    if len(archs) < len(have):  # one was asked for
        here = [a["name"] for a in have if not lacks(a["machine"], a["requires"])]
        allowed = ", ".join(here) or "no other either"
        return ArtifactError(f"does not run here as {why[0]}", where=where, allowed=allowed)
    if len(have) > 1:
        return ArtifactError(
            f"none of its code runs here ({'; '.join(why)})", where=where,
            hint="name this machine's arch, too, in --target cpu:A+B; dsv4c targets marks it there",
        )  # fmt: skip
    (arch,) = have
    named = arch["name"] if arch["machine"] == platform.machine() else arch["machine"]
    return ArtifactError(
        f"compiled for {named}, {lacks(arch['machine'], arch['requires'])}",
        where=where, hint="compile with --target cpu on this machine, or with --target cpu:portable",
    )  # fmt: skip


def _for_arch(artifact: Artifact, arch: Facts) -> Artifact:
    """One arch's view of an artifact for several; file and weights are shared."""
    every = [section_names(a["name"], a["machine"], several=True) for a in archs_of(artifact)]
    hidden = {name for pair in every for name in pair}
    sections = {name: entry for name, entry in artifact.sections.items() if name not in hidden}
    own = section_names(arch["name"], arch["machine"], several=True)
    for short, long in zip(section_names("", "", several=False), own, strict=True):
        if long in artifact.sections:
            sections[short] = artifact.sections[long]
    facts = facts_of(artifact.meta["tvm"], arch["name"])
    return replace(artifact, meta={**artifact.meta, "arch": arch, "tvm": facts}, sections=sections)
