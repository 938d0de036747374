"""Copying a module, so that a pass may change it in place while the caller keeps the original."""

from __future__ import annotations

from collections.abc import Mapping

from .dims import substitute
from .graph import Module, Op, Value
from .types import TensorType


def clone(module: Module, sizes: Mapping[str, int] | None = None) -> Module:
    """A deep copy of values and ops; weight expressions are immutable and shared.

    Args:
        sizes: symbol -> number; the arguments of the copy have these numbers in their shapes, and the types
            of everything else follow.
    """
    copy = Module(
        module.name, module.level, meta=dict(module.meta), store=module.store, assets=dict(module.assets),
        notes=dict(module.notes),
    )  # fmt: skip
    copy.parts = {name: clone(part, sizes) for name, part in module.parts.items()}
    values: dict[Value, Value] = {}
    for arguments, target in ((module.inputs, copy.inputs), (module.states, copy.states)):
        for name, value in arguments.items():
            target[name] = values[value] = Value(_sized(value.type, sizes or {}), None, name)
    for op in module.ops:
        twin = Op(op.definition, [values[v] for v in op.operands], op.attrs, op.loc, op.weight)
        values.update(zip(op.results, twin.results, strict=True))
        copy.ops.append(twin)
    copy.outputs = {name: values[v] for name, v in module.outputs.items()}
    return copy


def _sized(type_: TensorType, sizes: Mapping[str, int]) -> TensorType:
    return TensorType(type_.dtype, tuple(substitute(d, sizes) for d in type_.shape))
