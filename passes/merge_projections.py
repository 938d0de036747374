"""Linears that read the same rows become one product over their joined weights, its columns split again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from dsv4c.ir import weights as w
from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.packed import packed_form

from .base import Pass
from .cleanup import EliminateDeadCode
from .stored_format import stored_format


@dataclass(frozen=True)
class MergeProjections(Pass):
    """linear(x, a), linear(x, b), ... -> split_columns(linear(x, concat(a, b, ...))); exact.

    Every output column stays the dot product it was. Only weights of one stored format are joined, so that
    none is stored wider than alone. `module.notes["merge_projections"]` says which linears stay and why.
    """

    name: ClassVar[str] = "merge_projections"
    doc: ClassVar[str] = "compute linear maps of the same rows as one product"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED

    def run(self, module: Module) -> int:
        groups: dict[tuple[Value, str, object], list[Op]] = {}
        refused: dict[str, str] = {}
        for op in module.ops:
            if op.name == "linear":
                if reason := stays(op):
                    refused[op.operands[1].producer.loc if op.operands[1].producer else op.loc] = reason
                else:
                    key = (op.operands[0], stored_format(_expr(op)), op.attrs["inputs"])
                    groups.setdefault(key, []).append(op)
        readers: dict[Value, int] = {}
        for x, _, _ in groups:
            readers[x] = readers.get(x, 0) + 1
        merged: dict[Op, list[Op]] = {}
        for (x, form, _), ops in groups.items():
            together = packable(ops)
            if len(together) > 1:
                merged[min(together, key=module.ops.index)] = together
            for op in ops if len(together) < 2 else set(ops) - set(together):
                if len(ops) > 1:
                    refused[_weight(op).loc] = "joined with the others, its codes and scales would not align"
                elif readers[x] > 1:
                    refused[_weight(op).loc] = f"no other linear of these rows is stored as {form}"
        out: list[Op] = []
        for op in module.ops:
            if op in merged:
                out += _merge(module, merged[op])
            out.append(op)
        module.ops = out
        EliminateDeadCode().run(module)
        module.notes[self.name] = {"merged": len(merged), "kept": refused}
        return sum(map(len, merged.values()))


def stays(op: Op) -> str:
    """Why a linear cannot be merged with any other, or ""."""
    x, weight = op.operands
    if reason := unusual(op, "inputs"):
        return reason
    if weight.producer is None or weight.producer.weight is None:
        return "its matrix is no weight"
    if len(weight.uses) > 1:
        return f"its weight has {len(weight.uses)} readers and would be stored twice"
    if x.producer is not None and x.producer.name == "dispatch":
        return "it belongs to an expert, which fuse_expert_gemms merges"
    return ""


def packable(ops: list[Op]) -> list[Op]:
    """Those of `ops`, in the order to join them, that stay packed together; all, where none is packed."""
    if packed_form(_expr(ops[0])) is None:
        return ops
    found: list[Op] = []
    for op in sorted(ops, key=lambda op: packed_form(w.concat((_expr(op), _expr(op)))) is None):
        if packed_form(w.concat(tuple(_expr(o) for o in (*found, op)))) is not None:
            found.append(op)
    return found


def _weight(op: Op) -> Op:
    producer = op.operands[1].producer
    assert producer is not None
    return producer


def _expr(op: Op) -> w.WeightExpr:
    expr = _weight(op).weight
    assert expr is not None
    return expr


def _merge(module: Module, ops: list[Op]) -> list[Op]:
    """The ops that replace `ops`; their readers and the module's outputs are rewired."""
    builder = Builder(Module(module.name))
    words = zip(*(_weight(op).loc.split(".") for op in ops), strict=False)
    shared = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, words)]
    builder.loc = ".".join([*shared, "merged"])
    matrix = builder.weight(w.concat(tuple(_expr(op) for op in ops)))
    product = builder.op("linear", ops[0].operands[0], matrix, inputs=ops[0].attrs["inputs"])
    parts = builder.multi("split_columns", product, widths=tuple(_expr(op).shape[0] for op in ops)).results
    for op, part in zip(ops, parts, strict=True):
        rewire(module, op.result, part)
    return builder.module.ops


def unusual(op: Op, *handled: str) -> str:
    """Why `op` means more than its plain form: an attribute outside `handled` that is not at its default."""
    for attr in op.definition.attrs:
        if attr.name not in handled and op.attrs[attr.name] != attr.default:
            return f"{op.name}.{attr.name} is {op.attrs[attr.name]!r}, which the fused op cannot say"
    return ""


def rewire(module: Module, old: Value, new: Value) -> None:
    """Every reader of `old`, and every output that is `old`, takes `new`."""
    old.replace_with(new)
    for name, value in module.outputs.items():
        if value is old:
            module.outputs[name] = new
