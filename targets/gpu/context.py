"""What a lowering writes to: the launches of one program, its buffers, and the kernels of all programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import TargetError
from dsv4c.ir.dims import Dim
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op, Value
from dsv4c.ir.types import TensorType
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime.container.plan import Argument, Buffer, Kernel, Launch, Parameter

from .arch import Gpu
from .near import Near
from .table import source
from .tiles import Tiles, tiles

if TYPE_CHECKING:
    from .lowering_codes import Coded

NUMBERS = {DType.F32: "f32", DType.I32: "i32", DType.BF16: "bf16", DType.F16: "f16", DType.I8: "i8"}
"""How buffers of these are called; everything else is bytes."""

_LENGTHS = frozenset({"K", "N", "XS", "ZS", "QS", "KS", "GS", "WS"})
"""Integers by which rows lie apart: kernels that know them for multiples of 16 move wider pieces."""

UNUSED = "unused"
"""A weight of one element for parameters that a kernel does not read."""


@dataclass(frozen=True)
class Ref:
    """Rows in a buffer: from element `offset` on, `stride` elements apart. Offsets are multiples of nothing.
    """

    buffer: str
    offset: int = 0
    stride: int = 0


Stored = WeightExpr | npt.NDArray[Any]
"""What a weight's buffer holds: an expression, or a few numbers."""

Given = Any
"""What a lowering passes for a parameter: a `Ref`, an integer or a size as text, or a float."""


@dataclass
class Kernels:
    """Every kernel of a plan, each once."""

    known: dict[tuple[object, ...], int] = field(default_factory=dict)
    all: list[Kernel] = field(default_factory=list)

    def add(self, kernel: Kernel) -> int:
        key = (
            kernel.name,
            kernel.parameters,
            tuple(sorted(kernel.constants.items())),
            kernel.warps,
            kernel.stages,
        )
        if key not in self.known:
            self.known[key] = len(self.all)
            self.all.append(kernel)
        return self.known[key]


@dataclass
class Context:
    """Collects the launches of one program.

    Attributes:
        few: whether the program is for few rows.
        exact: whether products keep every bit of FP32 factors.
        bound: symbols that stand alone in some argument's shape.
        weights: name of a buffer -> its expression.
        temporaries: buffers made so far, without slots and lives.
        callers: the op of each launch.
        coded: rounded rows as codes, for the products that multiply them.
        near: buffer of codes -> the weight whose scales must lie near each other.
    """

    gpu: Gpu
    few: bool
    exact: bool
    bound: frozenset[str]
    kernels: Kernels
    weights: dict[str, Stored]
    values: dict[Value, Ref] = field(default_factory=dict)
    temporaries: dict[str, Buffer] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    callers: list[Op] = field(default_factory=list)
    memo: dict[tuple[object, ...], list[Ref]] = field(default_factory=dict)
    coded: dict[Value, Coded] = field(default_factory=dict)
    near: dict[str, Near] = field(default_factory=dict)
    op: Op | None = None

    # ---------------------------------------------------------------------------------- buffers

    def temporary(self, dtype: str, *shape: str | int) -> Ref:
        """A fresh buffer."""
        name = f"t{len(self.temporaries)}"
        texts = tuple(str(s) for s in shape)
        self.temporaries[name] = Buffer(name, "temporary", dtype, texts, 0, 0, 0)
        widths = [s for s in shape if isinstance(s, int)]
        return Ref(name, 0, prod(widths))

    def result(self, value: Value) -> Ref:
        """A fresh buffer for a value [B,T,...]; its rows are those of the first two axes."""
        ref = self.temporary(NUMBERS[value.type.dtype], *(self.dim(d) for d in value.type.shape))
        self.values[value] = ref
        return replace(ref, stride=width(value))

    def weight(self, value: Value, layout: Callable[[WeightExpr], WeightExpr] | None = None) -> Ref:
        """The buffer of a weight as it is stored."""
        op = value.producer
        if op is None or op.weight is None:
            raise TargetError("this operand must be a weight", where=self.where)
        return self.parameter(op.loc, layout(op.weight) if layout else op.weight)

    def parameter(self, name: str, expr: WeightExpr) -> Ref:
        """The buffer that holds an expression; equal ones of one name share it."""
        while not _same(self.weights.get(name), expr):
            name += "'"
        self.weights[name] = expr
        return Ref(name, 0, prod(expr.shape[1:]))

    def literal(self, name: str, numbers: npt.NDArray[Any]) -> Ref:
        """The buffer of a few integers that an op names as attributes."""
        self.weights[name] = numbers
        return Ref(name)

    @property
    def unused(self) -> Ref:
        return Ref(UNUSED)

    @property
    def unused_ids(self) -> Ref:
        """For integers that a kernel does not read."""
        return self.literal("unused ids", np.zeros(1, np.int32))

    @property
    def where(self) -> str:
        return f"{self.op.name} {self.op.loc}" if self.op is not None else "the module"

    # ------------------------------------------------------------------------------------ sizes

    def dim(self, d: Dim | int) -> str | int:
        """A dimension as text; a capacity such as ctx//4, whose symbol no argument carries, is one symbol."""
        if isinstance(d, int):
            return d
        return size_text(d, self.bound)

    def rows(self, value: Value) -> str:
        """How many rows the first two axes of a value have."""
        first, second = (self.dim(d) for d in value.type.shape[:2])
        return f"({first})*({second})"

    def tiles(self, kernel: str) -> Tiles:
        return tiles(kernel, self.gpu, self.few)

    @property
    def pieces(self) -> int:
        """BF16 numbers that a factor in FP32 is cut into."""
        return 3 if self.exact else 2

    @property
    def precision(self) -> str:
        """How the compiler splits products of two factors in FP32."""
        return "bf16x6" if self.exact else "bf16x3"

    # ----------------------------------------------------------------------------------- launch

    def launch(
        self, name: str, grid: tuple[str | int, ...], constants: Mapping[str, Any], *, warps: int = 4,
        stages: int = 1, types: Mapping[str, str] | None = None, pack: int = 1, **given: Given,
    ) -> None:  # fmt: skip
        """Append a launch; `given` are its parameters by name, all of them."""
        made = source(name)
        parameters = made.parameters(types or {}, pack)
        if {p.name for p in parameters} != set(given):
            raise TargetError(f"{name} takes {', '.join(p.name for p in parameters)}", where=self.where)
        marked = tuple(self._marked(p, given[p.name]) for p in parameters)
        warps = min(warps, 1024 // self.gpu.warp)
        kernel = Kernel(name, made.module, "", marked, dict(constants), warps, stages, self.gpu.warp)
        texts = tuple(str(g) for g in (*grid, 1, 1, 1)[:3])
        arguments = tuple(_argument(given[p.name]) for p in parameters)
        if self.op is None:
            raise TargetError("a launch belongs to an op", where=name)
        where = f"{self.op.name} {self.op.loc}"
        self.launches.append(Launch(self.kernels.add(kernel), texts, arguments, where))
        self.callers.append(self.op)

    def _marked(self, parameter: Parameter, given: Given) -> Parameter:
        """Whether a multiple of 16 is passed: bytes for pointers, which stand at multiples of 256."""
        if isinstance(given, Ref):
            item = {"*fp32": 4, "*i32": 4, "*i64": 8, "*bf16": 2, "*fp16": 2}.get(parameter.type, 1)
            return replace(parameter, divisible=given.offset * item % 16 == 0)
        known = parameter.name in _LENGTHS and isinstance(given, int) and given > 0
        return replace(parameter, divisible=known and int(given) % 16 == 0)


def _same(held: Stored | None, expr: WeightExpr) -> bool:
    """Whether a name is free for an expression, or its own."""
    return held is None or (isinstance(held, WeightExpr) and held.same(expr))


def _argument(given: Given) -> Argument:
    match given:
        case Ref():
            return Argument(buffer=given.buffer, offset=str(given.offset))
        case float():
            return Argument(number=given)
        case _:
            return Argument(integer=str(given))


def size_text(d: Dim | int, bound: frozenset[str]) -> str:
    """A dimension as a size; see `Context.dim`."""
    if isinstance(d, int):
        return str(d)
    if d.op == "sym":
        return d.name
    if not bound.issuperset(d.symbols()):
        return str(d).replace("//", "_")
    return f"({size_text(d.lhs, bound)}{d.op}{size_text(d.rhs, bound)})"


def width(value: Value) -> int:
    """Elements of a row [B,T,...]."""
    return widths(value.type)


def widths(type_: TensorType) -> int:
    return prod(d for d in type_.shape[2:] if isinstance(d, int))


def ints(value: Value) -> tuple[int, ...]:
    """The static dimensions of a value's type, symbols left out."""
    return tuple(d for d in value.type.shape if isinstance(d, int))


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that is not below n."""
    return max(least, 1 << max(0, n - 1).bit_length())


def blocks(size: str | int, block: int) -> str:
    """How many blocks cover a size."""
    return f"({size}+{block - 1})//{block}"
