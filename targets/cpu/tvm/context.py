"""What a lowering writes to: a Relax function under construction, its kernels, and its packed weights."""

# The Relax API is untyped.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax, tirx

from dsv4c.ir.dims import Dim
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op, Value
from dsv4c.ir.types import TensorType
from dsv4c.ir.weights import WeightExpr
from dsv4c.targets.cpu.tuning import DEFAULT, Tuning

from .fixed import Fixed
from .frames import install
from .kernels.packing import Simd

install()

DTYPES = {
    DType.F32: "float32", DType.BF16: "uint16", DType.I32: "int32",
    DType.I8: "int8", DType.F8E4M3: "uint8", DType.F8E4M3FNUZ: "uint8", DType.F8E8M0: "uint8",
    DType.F4E2M1X2: "uint8", DType.I4X2: "uint8",
}  # fmt: skip
"""How the storage of an IR dtype is called in TIR."""

Var = Any
"""A Relax variable."""


@functools.lru_cache(maxsize=1024, typed=True)
def _parsed(factory: Callable[..., Any], *key: Any) -> Any:
    """A kernel; half of a compilation is parsing, and the next model often has the same kernels."""
    return factory(*key)


@dataclass
class Context:
    """Collects the calls of one step function.

    Attributes:
        values: IR value -> Relax variable.
        bound: symbols that stand alone in some argument's shape.
        packed: parameter name -> (variable, expression) of every weight in the layout a kernel reads.
        simd: the vector instructions that kernels may use.
        tuning: what was measured to be best for the processor.
        claimed: parameter names of the other programs of the artifact, with their expressions.
        memo: what a lowering keeps so that another op need not compute it again.
        handles: looked-up table -> the parameter by which the runtime knows it; after the weights, in order.
        tables: looked-up table -> its `StoredTable`.
        calls: the functions that the step calls, in order.
        callers: the op of each of them.
        one: the step for one token of one sequence, where it has such a form.
    """

    builder: relax.BlockBuilder
    bound: frozenset[str]
    simd: Simd = Simd.NONE
    tuning: Tuning = DEFAULT
    symbols: dict[str, Any] = field(default_factory=dict)
    values: dict[Value, Var] = field(default_factory=dict)
    packed: dict[str, tuple[Var, WeightExpr]] = field(default_factory=dict)
    claimed: dict[str, WeightExpr] = field(default_factory=dict)
    kernels: dict[tuple[object, ...], Any] = field(default_factory=dict)
    shared: dict[str, Var] = field(default_factory=dict)
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict)
    handles: dict[str, Var] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    callers: list[Op] = field(default_factory=list)
    one: Fixed | None = None

    def dim(self, d: Dim | int) -> Any:
        """An IR dimension as a TIR expression over int64 variables.

        An expression over a symbol that no argument carries by itself (the capacity `ctx//4`) cannot be
        solved for at run time, so it is one opaque variable.
        """
        if isinstance(d, int):
            return tirx.IntImm("int64", d)
        if d.op == "sym" or not self.bound.issuperset(d.symbols()):
            name = "_".join(re.findall(r"\w+", str(d)))
            return self.symbols.setdefault(str(d), tirx.Var(name, "int64"))
        lhs, rhs = self.dim(d.lhs), self.dim(d.rhs)
        return {"+": lambda: lhs + rhs, "-": lambda: lhs - rhs, "*": lambda: lhs * rhs,
                "//": lambda: tirx.floordiv(lhs, rhs)}[d.op]()  # fmt: skip

    def tensor(self, t: TensorType) -> Any:
        """An IR type as a Relax type."""
        return relax.TensorType([self.dim(d) for d in t.shape], DTYPES[t.dtype])

    def kernel(self, factory: Callable[..., Any], *key: Any) -> Any:
        """The global symbol of a kernel; equal factory and arguments share one."""
        identity = (factory, *key)
        if identity not in self.kernels:
            name = f"{factory.__name__}_{len(self.kernels)}"
            function = _parsed(factory, *key).with_attr("global_symbol", name)
            self.kernels[identity] = self.builder.add_func(function, name)
        return self.kernels[identity]

    def call(self, kernel: Any, args: list[Var], *results: Any) -> list[Var]:
        """Call a kernel that writes fresh results of the given Relax types."""
        self.calls.append(kernel.name_hint)
        if len(results) == 1:
            return [self.builder.emit(relax.call_tir(kernel, args, results[0]))]
        both = self.builder.emit(relax.call_tir(kernel, args, list(results)))
        return [self.builder.emit(relax.TupleGetItem(both, i)) for i in range(len(results))]

    def update(self, kernel: Any, args: list[Var], index: int, result: Any) -> Var:
        """Call a kernel that overwrites argument `index`."""
        self.calls.append(kernel.name_hint)
        return self.builder.emit(relax.call_tir_inplace(kernel, args, [index], result))

    def lower(self, op: Op, factory: Callable[..., Any], *key: Any, args: list[Var] | None = None) -> None:
        """The common case: one kernel over the op's operands, results by the op's types."""
        operands = [self.values[v] for v in op.operands] if args is None else args
        results = self.call(self.kernel(factory, *key), operands, *(self.tensor(v.type) for v in op.results))
        self.values.update(zip(op.results, results, strict=True))

    def weight(self, value: Value, layout: Callable[[WeightExpr], WeightExpr] | None = None) -> Var:
        """The parameter that holds a weight in `layout` (as stored, when None)."""
        op = value.producer
        assert op is not None and op.weight is not None, "a kernel's weight operand must be a weight op"
        return self.parameter(op.loc, layout(op.weight) if layout else op.weight)

    def parameter(self, name: str, expr: WeightExpr) -> Var:
        """The parameter that holds an expression; equal ones of one name share it."""
        while not self._free(name, expr):
            name += "'"
        if name not in self.packed:
            shape = [tirx.IntImm("int64", n) for n in expr.shape]
            self.packed[name] = (
                relax.Var(f"w{len(self.packed)}", relax.TensorType(shape, DTYPES[expr.dtype])),
                expr,
            )
        return self.packed[name][0]

    def _free(self, name: str, expr: WeightExpr) -> bool:
        """Whether nothing else has that name."""
        own, other = self.packed.get(name), self.claimed.get(name)
        return (own is None or own[1].same(expr)) and (other is None or other.same(expr))

    def ones(self, n: int) -> Var:
        return relax.const(np.ones(n, np.float32))


def is_bf16(value: Value) -> bool:
    return value.type.dtype is DType.BF16


def ints(value: Value) -> tuple[int, ...]:
    """The static dimensions of a value's type, symbols left out."""
    return tuple(d for d in value.type.shape if isinstance(d, int))
