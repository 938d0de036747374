"""What launch plans are made of: buffers, kernels with what each parameter touches, and single launches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dsv4c.errors import ArtifactError

from .sizes import symbols
from .typed import one_of

KINDS = ("input", "state", "weight", "temporary", "handed")
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
    facts: dict[str, Any] = field(default_factory=dict)

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
