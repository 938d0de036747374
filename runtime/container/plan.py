"""A launch plan: the program form of artifacts for CUDA and ROCm, as values that JSON carries.

Owns everything that the emitter and the runtime must agree on: which kernels there are, what each touches,
which buffers there are and how long they live, the launches in order, and what passes between devices. Knows
no device and no compiler.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsv4c.errors import ArtifactError

from .launches import ALIGN, ITEM_BYTES, POINTERS, SCALARS, Argument, Buffer, Kernel, Launch, Parameter
from .sizes import size, symbols
from .typed import one_of, read_value

VERSION = 2
VENDORS = ("cuda", "hip")


@dataclass(frozen=True)
class Program:
    """One order of launches for a range of sizes.

    Attributes:
        rows: a size, and `most`, the largest for which the program is meant; 0 is no bound.
        temporaries: buffers of this program alone.
        slots: bytes of every slot of the arena, as sizes.
        outputs: name of a result -> the buffer that holds it at the end.
        part: what it is a program of: "" is the step, other names are `Artifact.meta["parts"]`.
        stage: on which device it runs; parts run on the first.
    """

    name: str
    rows: str
    most: int
    temporaries: tuple[Buffer, ...]
    slots: tuple[str, ...]
    launches: tuple[Launch, ...]
    outputs: dict[str, str]
    part: str = ""
    stage: int = 0

    def __post_init__(self) -> None:
        symbols(self.rows)
        for buffer in self.temporaries:
            if buffer.kind != "temporary" or buffer.slot >= len(self.slots):
                raise ArtifactError(f"{buffer.name} is no temporary with a slot", where=self.name)
        for text in self.slots:
            symbols(text)


@dataclass(frozen=True)
class Stage:
    """What one device does in a step: its layers, both included; 0 and -1 where a plan is not cut."""

    first: int = 0
    last: int = -1

    def __str__(self) -> str:
        return f"layers {self.first} to {self.last}" if self.last >= 0 else "all layers"


@dataclass(frozen=True)
class Handover:
    """A value that a stage makes and a later one reads: copied from device to device between their programs.

    Attributes:
        source: the stage each of whose programs has it among its outputs, by the name of the buffer.
        target: the stage whose programs read the buffer, in memory of its own there; none writes to it.
    """

    source: int
    target: int
    buffer: Buffer

    def __post_init__(self) -> None:
        if self.buffer.kind != "handed":
            raise ArtifactError(f"a {self.buffer.kind} is handed over", where=self.buffer.name)


@dataclass(frozen=True)
class Plan:
    """The whole: `buffers` are inputs, states and weights, each in the order of their declaration.

    Programs of the step come first, stage by stage, then those of every other part; weights belong to all of
    them. A step runs one program of every stage, in order. A stage has on its device the buffers that its
    programs take: inputs are given to each that takes them, and a state that several take each of them keeps
    and writes to.

    Attributes:
        arch: what the kernels were compiled for, as the target calls it.
        capability: what a device must report: "9.0" on CUDA (equal major, or equal where `exact`), or a gfx
            name on ROCm.
        driver: the lowest version of the driver that loads the code; CUDA only, else 0.
    """

    version: int
    vendor: str
    arch: str
    capability: str
    exact: bool
    driver: int
    shared_limit: int
    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]
    programs: tuple[Program, ...]
    stages: tuple[Stage, ...] = (Stage(),)
    handovers: tuple[Handover, ...] = ()

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ArtifactError(
                f"its launch plan has version {self.version}", where=self.arch, allowed=str(VERSION),
                hint="compile it with the dsv4c that runs it",
            )  # fmt: skip
        one_of("vendor", self.vendor, VENDORS, self.arch)
        for program in self.programs:
            if not 0 <= program.stage < (1 if program.part else len(self.stages)):
                raise ArtifactError(f"there is no stage {program.stage}", where=f"program {program.name}")
        for part, stage in [*(("", n) for n in range(len(self.stages))), *((p, 0) for p in self.parts)]:
            found = [p.most for p in self.programs_of(stage, part)]
            if not found or found[-1]:
                raise ArtifactError("the last program must be for any size", where=self._where(part, stage))
        _check_handovers(self)
        for program in self.programs:
            _check_names(self, program)

    def _where(self, part: str, stage: int) -> str:
        if part:
            return f"{self.arch}, {part}"
        return f"{self.arch}, stage {stage}" if len(self.stages) > 1 else self.arch

    def of_kind(self, kind: str) -> tuple[Buffer, ...]:
        return tuple(b for b in self.buffers if b.kind == kind)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts but the step."""
        return tuple(dict.fromkeys(p.part for p in self.programs if p.part))

    def inputs(self, part: str = "") -> tuple[Buffer, ...]:
        """What a part takes, in order."""
        return tuple(b for b in self.of_kind("input") if b.part == part)

    def programs_of(self, stage: int, part: str = "") -> tuple[Program, ...]:
        """The programs of a part that run in a stage, in the order in which they are tried."""
        return tuple(p for p in self.programs if p.part == part and p.stage == stage)

    def program(self, sizes: dict[str, int], part: str = "", stage: int = 0) -> Program:
        """The first program of a stage of a part that is meant for these sizes."""
        programs = self.programs_of(stage, part)
        return next(p for p in programs if not p.most or size(p.rows, sizes) <= p.most)

    def handed_to(self, stage: int) -> tuple[Handover, ...]:
        """What a stage takes from earlier ones."""
        return tuple(h for h in self.handovers if h.target == stage)

    def known_to(self, program: Program) -> dict[str, Buffer]:
        """Every buffer that a program may name: the plan's, what its stage is handed, its own."""
        handed = (h.buffer for h in self.handed_to(program.stage))
        return {b.name: b for b in (*self.buffers, *handed, *program.temporaries)}

    def held(self, stage: int) -> tuple[Buffer, ...]:
        """The inputs, states and weights that programs of a stage take, in order; of all parts."""
        programs = (p for p in self.programs if p.stage == stage)
        taken = {a.buffer for p in programs for launch in p.launches for a in launch.arguments}
        return tuple(b for b in self.buffers if b.name in taken)

    def results(self, part: str = "") -> dict[str, int]:
        """What a part gives, and the stage that makes it; what is handed over is none of it."""
        programs = (p for p in self.programs if p.part == part)
        return {name: p.stage for p in programs for name in _given(self, p)}

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any, where: str) -> Plan:
        """The plan that `as_json` wrote.

        Raises:
            ArtifactError: a field is missing, unknown or of the wrong type, with its place in the plan.
        """
        return typing.cast(Plan, read_value(cls, data, where))


def _check_handovers(plan: Plan) -> None:
    """ArtifactError unless every value is made by an earlier stage, whichever of its programs runs, and comes
    from one place.
    """
    seen = set[tuple[int, str]]()
    for h in plan.handovers:
        name, where = h.buffer.name, f"handover of {h.buffer.name}, stage {h.source} to {h.target}"
        if not 0 <= h.source < h.target < len(plan.stages):
            raise ArtifactError(
                "a value goes to a later stage", where=where, allowed=f"{len(plan.stages)} stages"
            )
        if (h.target, name) in seen:
            raise ArtifactError("the value comes from two stages", where=where)
        seen.add((h.target, name))
        for program in plan.programs_of(h.source):
            what, known = f"{where}, program {program.name}", plan.known_to(program)
            one_of("output", name, program.outputs, what)
            one_of("buffer", program.outputs[name], known, what)
            one_of("an output of dtype", known[program.outputs[name]].dtype, (h.buffer.dtype,), what)
    made_by: dict[tuple[str, str], int] = {}
    for program in plan.programs:
        for name in _given(plan, program):
            if made_by.setdefault((program.part, name), program.stage) != program.stage:
                raise ArtifactError(
                    f"stages {made_by[program.part, name]} and {program.stage} both give {name}",
                    where=plan.arch,
                )


def _given(plan: Plan, program: Program) -> Iterable[str]:
    """The outputs of a program that are not handed over."""
    handed = {h.buffer.name for h in plan.handovers if h.source == program.stage and not program.part}
    return (name for name in program.outputs if name not in handed)


def _check_names(plan: Plan, program: Program) -> None:
    """ArtifactError unless launches name kernels and buffers that exist, and pass what they take."""
    handed = (h.buffer for h in plan.handed_to(program.stage))
    buffers = (*plan.buffers, *handed, *program.temporaries)
    if len({b.name for b in buffers}) != len(buffers):
        raise ArtifactError("two buffers share a name", where=program.name)
    known = {b.name: b for b in buffers if b.kind != "input" or b.part == program.part}
    for index, launch in enumerate(program.launches):
        where = f"{program.name}, launch {index} for {launch.op}"
        if not 0 <= launch.kernel < len(plan.kernels):
            raise ArtifactError(f"kernel {launch.kernel} does not exist", where=where)
        kernel = plan.kernels[launch.kernel]
        if len(kernel.parameters) != len(launch.arguments):
            raise ArtifactError(
                f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(launch.arguments)}",
                where=where,
            )
        for parameter, argument in zip(kernel.parameters, launch.arguments, strict=True):
            _check_argument(parameter, argument, known, f"{where}, {kernel.name}.{parameter.name}")
    for name in program.outputs.values():
        one_of("buffer", name, known, f"{program.name}, outputs")


def _check_argument(parameter: Parameter, argument: Argument, known: dict[str, Buffer], where: str) -> None:
    if parameter.is_pointer:
        if not argument.buffer:
            raise ArtifactError("a pointer needs a buffer", where=where)
        one_of("buffer", argument.buffer, known, where)
        buffer = known[argument.buffer]
        one_of(f"buffer {buffer.name} of dtype", buffer.dtype, POINTERS[parameter.type], where)
    elif (parameter.type == "i32") != bool(argument.integer) or argument.buffer:
        raise ArtifactError(f"{argument} is no {parameter.type}", where=where)


__all__ = [
    "ALIGN",
    "ITEM_BYTES",
    "SCALARS",
    "VERSION",
    "Argument",
    "Buffer",
    "Handover",
    "Kernel",
    "Launch",
    "Parameter",
    "Plan",
    "Program",
    "Stage",
]
