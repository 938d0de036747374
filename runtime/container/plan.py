"""A launch plan: the program form of artifacts for CUDA and ROCm, as values that JSON carries.

Owns everything that the emitter and the runtime must agree on: which kernels there are, what each touches,
which buffers there are and how long they live, and the launches in order. Knows no device and no compiler.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from dsv4c.errors import ArtifactError

from .sizes import size, symbols

VERSION = 1
VENDORS = ("cuda", "hip")
KINDS = ("input", "state", "weight", "temporary")
ITEM_BYTES = {
    "f32": 4, "i32": 4, "i64": 8, "bf16": 2, "f16": 2, "i8": 1, "u8": 1, "f8e4m3": 1, "f8e4m3fnuz": 1,
    "f8e8m0": 1,
    "f4e2m1x2": 1, "i4x2": 1,
}  # fmt: skip
"""Bytes of an element of a buffer, as it is stored."""

POINTERS = {
    "*fp32": ("f32",), "*i32": ("i32",), "*i64": ("i64",), "*bf16": ("bf16",), "*fp16": ("f16",),
    "*i8": ("i8",),
    "*u8": ("u8", "f8e4m3", "f8e4m3fnuz", "f8e8m0", "f4e2m1x2", "i4x2"),
}  # fmt: skip
"""Type of a pointer -> the buffers that it may point to."""
SCALARS = ("i32", "fp32")
ALIGN = 256
"""Bytes at whose multiples buffers begin."""

T = TypeVar("T")


@dataclass(frozen=True)
class Buffer:
    """A run of memory on the device.

    Attributes:
        shape: sizes; `elements` is their product.
        slot: for temporaries, the place in the arena that it shares with others; else -1.
        first, last: for temporaries, the launches between which it holds something; else -1.
        part: for inputs, the program of the artifact that takes it; "" is the step.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[str, ...]
    slot: int = -1
    first: int = -1
    last: int = -1
    part: str = ""

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS, self.name)
        one_of("dtype", self.dtype, ITEM_BYTES, self.name)
        if (self.kind == "temporary") != (self.slot >= 0 and 0 <= self.first <= self.last):
            raise ArtifactError("temporaries, and they alone, have a slot and a life", where=self.name)
        if self.part and self.kind != "input":
            raise ArtifactError(f"{self.kind}s belong to no part", where=self.name)

    @property
    def elements(self) -> str:
        return "*".join(f"({s})" for s in self.shape) or "1"

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Attributes:
        type: a key of `POINTERS`, or of `SCALARS`.
        access: "r", "w" or "rw" for pointers.
        elements: for pointers, how many elements from there on it may touch: a size over the constants and
            integer arguments of the kernel.
        divisible: whether the code relies on its being a multiple of 16 (a pointer: of 16 bytes).
    """

    name: str
    type: str
    access: str = ""
    elements: str = ""
    divisible: bool = False

    def __post_init__(self) -> None:
        one_of("type", self.type, (*POINTERS, *SCALARS), self.name)
        one_of("access", self.access, ("r", "w", "rw") if self.is_pointer else ("",), self.name)
        if self.is_pointer:
            symbols(self.elements)

    @property
    def is_pointer(self) -> bool:
        return self.type in POINTERS


@dataclass(frozen=True)
class Kernel:
    """One compiled function; `offset` and `nbytes` are of its object in the section "code".

    Attributes:
        name: of the function in its source, module `module`.
        entry: of the function in the object.
        warp: threads of a warp; a block has `warps` of them.
        stages: of the software pipeline that the compiler was asked for.
        shared: bytes of shared memory that a launch asks for.
        constants: compile-time constants, by name.
        facts: what the compiler said: registers, spills, occupancy, matrix instructions.
    """

    name: str
    module: str
    entry: str
    parameters: tuple[Parameter, ...]
    constants: dict[str, int | str]
    warps: int
    stages: int
    warp: int = 32
    shared: int = 0
    offset: int = 0
    nbytes: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [p.name for p in self.parameters]
        if len(set(names)) != len(names) or set(names) & set(self.constants):
            raise ArtifactError("a parameter is named twice", where=self.name)
        if self.warps < 1 or self.warps & (self.warps - 1) or self.warps * self.warp > 1024:
            raise ArtifactError(f"{self.warps} warps of {self.warp} threads", where=self.name)

    @property
    def threads(self) -> int:
        """Of one block."""
        return self.warps * self.warp


@dataclass(frozen=True)
class Argument:
    """What a launch passes: a buffer from an element on, an integer as a size, or a number."""

    buffer: str = ""
    offset: str = "0"
    integer: str = ""
    number: float | None = None

    def __post_init__(self) -> None:
        if bool(self.buffer) + bool(self.integer) + (self.number is not None) != 1:
            raise ArtifactError("an argument is a buffer, an integer or a number", where=repr(self))
        symbols(self.offset)
        if self.integer:
            symbols(self.integer)


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, over which grid (three sizes), with what, and for which op."""

    kernel: int
    grid: tuple[str, ...]
    arguments: tuple[Argument, ...]
    op: str = ""

    def __post_init__(self) -> None:
        if len(self.grid) != 3:
            raise ArtifactError(f"a grid has three sizes, got {list(self.grid)}", where=self.op)
        for text in self.grid:
            symbols(text)


@dataclass(frozen=True)
class Program:
    """One order of launches for a range of sizes.

    Attributes:
        rows: a size, and `most`, the largest for which the program is meant; 0 is no bound.
        temporaries: buffers of this program alone.
        slots: bytes of every slot of the arena, as sizes.
        outputs: name of a result -> the buffer that holds it at the end.
        part: what it is a program of: "" is the step, other names are `Artifact.meta["parts"]`.
    """

    name: str
    rows: str
    most: int
    temporaries: tuple[Buffer, ...]
    slots: tuple[str, ...]
    launches: tuple[Launch, ...]
    outputs: dict[str, str]
    part: str = ""

    def __post_init__(self) -> None:
        symbols(self.rows)
        for buffer in self.temporaries:
            if buffer.kind != "temporary" or buffer.slot >= len(self.slots):
                raise ArtifactError(f"{buffer.name} is no temporary with a slot", where=self.name)
        for text in self.slots:
            symbols(text)


@dataclass(frozen=True)
class Plan:
    """The whole: `buffers` are inputs, states and weights, each in the order of their declaration.

    Programs of the step come first, then those of every other part; weights belong to all of them.

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

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ArtifactError(
                f"its launch plan has version {self.version}", where=self.arch, allowed=str(VERSION),
                hint="compile it with the dsv4c that runs it",
            )  # fmt: skip
        one_of("vendor", self.vendor, VENDORS, self.arch)
        for part in ("", *self.parts):
            found = [p.most for p in self.programs if p.part == part]
            if not found or found[-1]:
                where = f"{self.arch}, {part}" if part else self.arch
                raise ArtifactError("the last program must be for any size", where=where)
        for program in self.programs:
            _check_names(self, program)

    def of_kind(self, kind: str) -> tuple[Buffer, ...]:
        return tuple(b for b in self.buffers if b.kind == kind)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts but the step."""
        return tuple(dict.fromkeys(p.part for p in self.programs if p.part))

    def inputs(self, part: str = "") -> tuple[Buffer, ...]:
        """What a part takes, in order."""
        return tuple(b for b in self.of_kind("input") if b.part == part)

    def program(self, sizes: dict[str, int], part: str = "") -> Program:
        """The first program of a part that is meant for these sizes."""
        programs = (p for p in self.programs if p.part == part)
        return next(p for p in programs if not p.most or size(p.rows, sizes) <= p.most)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any, where: str) -> Plan:
        """The plan that `as_json` wrote.

        Raises:
            ArtifactError: a field is missing, unknown or of the wrong type, with its place in the plan.
        """
        return typing.cast(Plan, _read(cls, data, where))


def one_of(what: str, value: str, allowed: typing.Iterable[str], where: str) -> None:
    """Raise ArtifactError unless the value is allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ArtifactError(f"{what} {value!r}", where=where, allowed=", ".join(allowed))


def _check_names(plan: Plan, program: Program) -> None:
    """ArtifactError unless launches name kernels and buffers that exist, and pass what they take."""
    buffers = (*plan.buffers, *program.temporaries)
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


def _read(kind: Any, data: Any, where: str) -> Any:
    """JSON as a value of the type of a field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_class(typing.cast(type[Any], kind), data, where)
    if origin is tuple:
        _expect(isinstance(data, list | tuple), data, "a list", where)
        return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), data, "an object", where)
        return {str(k): _read(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if origin is types.UnionType:
        allowed = tuple(a for a in args)
        _expect(isinstance(data, allowed) and not isinstance(data, bool), data, str(kind), where)
        return data
    if kind is Any:
        return data
    right = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    _expect(right, data, kind.__name__, where)
    return data


def _read_class(kind: type[T], data: Any, where: str) -> T:
    _expect(isinstance(data, dict), data, "an object", where)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    needed = {
        n for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }  # fmt: skip
    wrong = sorted((set(data) - set(fields)) | (needed - set(data)))
    if wrong:
        raise ArtifactError(
            f"fields missing or unknown: {', '.join(wrong)}", where=where, allowed=", ".join(fields)
        )
    return kind(**{n: _read(hints[n], v, f"{where}.{n}") for n, v in data.items()})


def _expect(right: bool, data: Any, what: str, where: str) -> None:
    if not right:
        raise ArtifactError(f"{str(data)[:60]!r} is no {what}", where=where)
