"""A Relax function at fixed sizes, as a list of kernel calls over memory that is laid out beforehand.

Such a function has no shape arithmetic, allocates nothing and checks nothing but what each kernel checks of
its own arguments; the caller brings the memory. Knows calls and sizes, not ops.
"""

# The Relax API is untyped.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from tvm import relax, tirx

ALIGNMENT = 64
"""Bytes; what kernels may assume of every buffer."""


@dataclass(frozen=True)
class View:
    """An array in the memory of a fixed function; offset in bytes."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Fixed:
    """A function at fixed sizes.

    Attributes:
        name: of the function in the compiled code. It takes the arguments of the general one, then `views`.
        views: arrays in `nbytes` bytes of memory that is aligned to 64; their contents before a call are
            never read, and after it those of results stay until the next.
    """

    name: str
    views: tuple[View, ...]
    nbytes: int

    def meta(self) -> dict[str, Any]:
        views = [[v.offset, v.dtype, list(v.shape)] for v in self.views]
        return {"function": self.name, "bytes": self.nbytes, "views": views}


@dataclass(eq=False)
class _Block:
    """Memory of one result: from the call that writes it to the last that reads it; `last` None is the
    end."""

    nbytes: int
    first: int
    last: int | None
    offset: int = 0


@dataclass(frozen=True, eq=False)
class _Array:
    """How one value reads a block."""

    block: _Block
    dtype: str
    shape: tuple[int, ...]


@dataclass
class _Trace:
    """The calls of a function in order, with results as arrays of blocks."""

    values: dict[Any, Any] = field(default_factory=dict)
    calls: list[tuple[str, list[Any]]] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)

    def operand(self, expr: Any) -> Any:
        """An array, a tuple of arrays, or an expression from outside the body."""
        return self.values.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def array(self, type_: Any) -> _Array | None:
        shape = _static(type_)
        if shape is None:
            return None
        dtype, at = str(type_.dtype), len(self.calls)
        self.blocks.append(_Block(prod(shape) * np.dtype(dtype).itemsize, at, at))
        return _Array(self.blocks[-1], dtype, shape)

    def call(self, function: str, operands: Sequence[Any], keep: bool) -> None:
        """`keep`: the function may hold on to its arguments after it returns, so they share no memory."""
        for x in operands:
            if isinstance(x, _Array) and x.block.last is not None:
                x.block.last = None if keep else len(self.calls)
        self.calls.append((function, list(operands)))

    def binding(self, var: Any, value: Any) -> bool:
        """Follow one binding; False where it has no fixed form."""
        if isinstance(value, relax.TupleGetItem):
            self.values[var] = self.operand(value.tuple_value)[value.index]
            return True
        kind = getattr(getattr(value, "op", None), "name", "")
        if kind == "relax.null_value":  # what a view is called with
            return True
        if kind == "relax.memory.view":
            return self._view(var, value)
        if kind not in ("relax.call_tir", "relax.call_tir_inplace", "relax.call_dps_packed"):
            return False
        callee, keep = value.args[0], kind == "relax.call_dps_packed"
        given = [self.operand(a) for a in value.args[1].fields]
        made: list[_Array | None] = []
        if kind == "relax.call_tir_inplace":
            self.values[var] = given[int(value.attrs.inplace_indices[0])]
        else:
            (type_,) = value.ty_args
            several = isinstance(type_, relax.TupleType)
            made = [self.array(t) for t in (type_.fields if several else [type_])]
            if any(a is None for a in made):
                return False
            self.values[var] = made if several else made[0]
        self.call(callee.global_symbol if keep else callee.name_hint, [*given, *made], keep)
        return True

    def _view(self, var: Any, value: Any) -> bool:
        source, shape = self.operand(value.args[0]), _static(var.ty)
        if not isinstance(source, _Array) or shape is None:
            return False
        self.values[var] = _Array(source.block, source.dtype, shape)
        return True

    def finish(self, results: Any) -> list[Any]:
        found = [self.operand(r) for r in results.fields]
        for r in found:
            if isinstance(r, _Array):
                r.block.last = None
        return found


def _static(type_: Any) -> tuple[int, ...] | None:
    """The shape of a tensor type, when it is all numbers."""
    dims = list(type_.shape)
    return tuple(int(d) for d in dims) if all(isinstance(d, tirx.IntImm) for d in dims) else None


def add_fixed(
    builder: relax.BlockBuilder, function: str, sizes: Mapping[str, int], name: str
) -> Fixed | None:
    """Add `function` at fixed sizes of its symbols to the module under construction, as `name`.

    Its kernels are those of the general function, so results are the same bits.

    Returns:
        None where there is no such form: the size of a result depends on another symbol, or an argument is
        seen in another shape.
    """
    general = relax.utils.copy_with_new_vars(builder.get()[function]).bind_symbolic_vars(dict(sizes))
    trace = _Trace()
    for block in general.body.blocks:
        if not all(trace.binding(b.var, b.value) for b in block.bindings):
            return None
    results = trace.finish(general.body.body)
    nbytes = _lay_out(trace.blocks)
    untyped = [relax.Var(p.name, relax.ObjectType()) for p in general.params]
    inside = dict(zip(general.params, untyped, strict=True))
    views: dict[View, Any] = {}

    def argument(x: Any) -> Any:
        if not isinstance(x, _Array):
            return inside.get(x, x) if isinstance(x, relax.Var) else x
        view = View(x.block.offset, x.dtype, x.shape)
        return views.setdefault(view, relax.Var(f"view{len(views)}", relax.ObjectType()))

    calls = [(callee, [argument(x) for x in operands]) for callee, operands in trace.calls]
    outputs = relax.Tuple([argument(r) for r in results])
    with builder.function(name, [*untyped, *views.values()], {"global_symbol": name}, pure=False):
        for callee, operands in calls:
            # by name: as arguments of a global variable these would have to be typed, and checked in each
            # call
            builder.emit(relax.Call(relax.ExternFunc(callee), operands))
        builder.emit_func_output(outputs)
    return Fixed(name, tuple(views), nbytes)


def _lay_out(blocks: Sequence[_Block]) -> int:
    """Give every block the lowest offset where no block that lives at the same time lies; returns the
    size."""
    live: list[_Block] = []
    size = 0
    for block in blocks:
        live = [b for b in live if b.last is None or b.last >= block.first]
        at = 0
        for other in sorted(live, key=lambda b: b.offset):
            if at + block.nbytes <= other.offset:
                break
            at = max(at, other.offset + -(-other.nbytes // ALIGNMENT) * ALIGNMENT)
        block.offset = at
        live.append(block)
        size = max(size, at + block.nbytes)
    return size
