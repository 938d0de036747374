"""What a target is: a frozen value that validates itself, with its legal ops, passes and emitters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4c.errors import TargetError, unknown
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.weights import TensorStore

if TYPE_CHECKING:
    from dsv4c.runtime.container import ArtifactWriter

    from .onnx.dialect import Dialect

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

Emitter = Callable[[Module, TensorStore, "ArtifactWriter", "Arch", Progress], None]
"""Writes code and weights of a TARGET-level module into an artifact."""


@dataclass(frozen=True)
class Arch:
    """One kind of machine of a target.

    Attributes:
        attributes: what the code generator is told (LLVM `mcpu`, `mtriple`).
        requires: CPU feature flags the machine must have to run the code, as the kernel spells them.
        machine: `platform.machine()` of the machine; "" where the code runs on a device beside it.
        device: the name of the device in `hardware.json`; "" where nothing is estimated.
        numerics: what it offers in place of its target's numerics; None where it offers those.
        dialect: the ONNX it takes, where that is not its target's.
        members: where it stands for several, those, the best first; else nothing.
    """

    name: str
    attributes: Mapping[str, str]
    requires: tuple[str, ...] = ()
    machine: str = "x86_64"
    device: str = ""
    numerics: Mapping[str, str] | None = None
    dialect: Callable[[], Dialect] | None = None
    members: tuple[Arch, ...] = ()

    def each(self) -> tuple[Arch, ...]:
        """The archs it stands for, the best first; itself where it is one."""
        return self.members or (self,)

    def facts(self) -> dict[str, Any]:
        """What an artifact says of it; a session chooses by it."""
        own = {"name": self.name, "machine": self.machine, "requires": list(self.requires)}
        return own | ({"archs": [m.facts() for m in self.members]} if self.members else {})

    def sold_as(self, name: str) -> bool:
        """Whether its attributes name a machine so, in whatever case: "h100", "RTX 4090"."""
        known = (word.strip() for text in self.attributes.values() for word in text.lower().split(","))
        wanted = name.lower()
        return any(wanted in (word, word.replace(" ", ""), word.rpartition(" ")[2]) for word in known)


@dataclass(frozen=True)
class Format:
    """An artifact format: how the weights are stored, which packages it needs, and its emitter.

    Attributes:
        passes: the pipeline from MODEL to TARGET, as text.
        packages: import name -> what to install, looked for before any long work.
        load: imports the emitter; late, because it needs those packages.
        extra_ops: ops that this format's emitter takes beyond the target's own.
        shows_blocks: whether its programs can hand out the residual streams after every layer, for checks.
        emits_parts: whether its emitter writes `Module.parts`; others drop them.
        roundings: values of the attribute `rounding`, and of `round_values.rule`, that its emitter takes.
        numerics: what it offers in place of its arch's; None where it offers those.
        hints: op that its emitter refuses -> what to do instead.
    """

    name: str
    passes: str
    packages: Mapping[str, str]
    load: Callable[[], Emitter]
    extra_ops: frozenset[str] = frozenset()
    shows_blocks: bool = False
    emits_parts: bool = False
    roundings: frozenset[str] = frozenset(
        {"none", "bf16", "e4m3", "e2m1", "e2m1_e4m3", "int8", "bf16_rows", "int8_rows", "reference"}
    )
    numerics: Mapping[str, str] | None = None
    hints: Mapping[str, str] = field(default_factory=dict)

    def takes(self, op: Op) -> bool:
        """Whether an op rounds in a way that the emitter knows, or not at all."""
        name = op.attrs.get("rule") if op.name == "round_values" else op.attrs.get("rounding", "none")
        return name in self.roundings


@dataclass(frozen=True)
class Target:
    """A family of machines. Raises `TargetError` when it contradicts itself.

    Attributes:
        archs: where an artifact may hold code for several, the best first.
        ops: what may reach an emitter, whatever the format.
        numerics: name -> passes to run in front of a format's pipeline, as text; behind the word `default`
            may stand edits of that pipeline. An arch may have its own, and so may a format.
        dialect: the ONNX it takes, where it takes any of fixed shapes; an arch may have its own.
        sets: names for several archs of one artifact, all with the target's own numerics; None where an
            artifact holds code for one arch.
    """

    name: str
    doc: str
    archs: tuple[Arch, ...]
    ops: frozenset[str]
    formats: tuple[Format, ...]
    default_arch: Callable[[], str]
    numerics: Mapping[str, str] = field(default_factory=lambda: {"exact": ""})
    dialect: Callable[[], Dialect] | None = None
    sets: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        for what, names in (
            ("arch", [a.name for a in self.archs] + list(self.sets or ())),
            ("format", [f.name for f in self.formats]),
        ):
            if not names or len(set(names)) != len(names):
                raise TargetError(f"{what}s must be distinct and at least one, got {names}", where=self.name)
        for name in self.sets or ():
            self.arch(name)

    def numerics_of(self, arch: Arch, form: Format | None = None) -> Mapping[str, str]:
        """The numerics of an arch in a format, the default first; None is the first format."""
        form = form or self.formats[0]
        if form.numerics is not None:
            return form.numerics
        return self.numerics if arch.numerics is None else arch.numerics

    def dialect_of(self, arch: Arch) -> Dialect | None:
        """The ONNX of fixed shapes that an arch takes."""
        found = arch.dialect or self.dialect
        return found() if found else None

    def arch(self, name: str) -> Arch:
        """The arch of that name; "" is the default one, and "a+b", or the name of a set, several in one.

        Raises:
            TargetError: a name is unknown or stands twice, or an artifact holds code for one arch only.
        """
        name = name or self.default_arch()
        if "+" in name or name in (self.sets or ()):
            return self._several(name)
        return self._one(name)

    def _several(self, text: str) -> Arch:
        if self.sets is None:
            raise TargetError(
                f"several archs: {text}", where=self.name, allowed="one, as an artifact holds code for one",
                hint="compile an artifact for each",
            )  # fmt: skip
        parts = text.split("+")
        names = [name for part in parts for name in self.sets.get(part, (part,))]
        wanted = {self._one(name).name for name in names}
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise TargetError(
                f"arch {min(twice)} stands twice in {text}", where=self.name, allowed="each arch once"
            )
        members = tuple(a for a in self.archs if a.name in wanted)
        called = text if len(parts) == 1 else "+".join(a.name for a in members)
        return Arch(called, {}, machine="", members=members)

    def _one(self, name: str) -> Arch:
        for arch in self.archs:
            if arch.name == name:
                return arch
        known = [*(a.name for a in self.archs), *(self.sets or ())]
        error = unknown("arch", name, known, TargetError, self.name)
        meant = [a for a in self.archs if a.sold_as(name)]
        raise error if not meant else TargetError(
            f"unknown arch {name!r}", where=self.name, allowed=error.allowed,
            hint=f"{name} is {' or '.join(f'{self.name}:{a.name}' for a in meant)}",
        )  # fmt: skip

    def legal(self, format: str) -> frozenset[str]:
        """The ops that may reach the emitter of a format."""
        return self.ops | self.format(format).extra_ops

    def elsewhere(self, op: str, form: Format | None = None) -> str:
        """What to say to whom a format refuses an op: its hint, or who takes it; "" where nobody does."""
        if form is not None and op in form.hints:
            return form.hints[op]
        takers = [f.name for f in self.formats if op in self.legal(f.name)]
        return f"--format {takers[0]} takes it" if takers else ""

    def format(self, name: str) -> Format:
        """The format of that name; "" is the first."""
        name = name or self.formats[0].name
        for candidate in self.formats:
            if candidate.name == name:
                return candidate
        raise unknown("format", name, [f.name for f in self.formats], TargetError, self.name)
