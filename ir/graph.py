"""The graph: values, ops, and the module that orders them. SSA, typed, with use lists.

Ops and values compare by identity. State is threaded as values: an op that `consumes` a state operand
returns its successor, and nothing may read the old value afterwards (checked by the verifier), so a
back end is free to work in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from dsv4c.errors import IRError

from .attrs import Attr
from .levels import Level
from .opdef import OpDef, Signature
from .ops import OPS
from .types import TensorType
from .weights import TensorStore, WeightExpr


class Value:
    """An SSA value: the result of an op, or an argument of the module (`producer is None`).

    Attributes:
        type: its tensor type.
        uses: every (op, operand index) that reads it, in no particular order.
    """

    __slots__ = ("name", "producer", "type", "uses")

    def __init__(self, type_: TensorType, producer: Op | None, name: str = "") -> None:
        self.type, self.producer, self.name = type_, producer, name
        self.uses: dict[tuple[Op, int], None] = {}

    def users(self) -> list[Op]:
        return list(dict.fromkeys(op for op, _ in self.uses))

    def replace_with(self, other: Value) -> None:
        """Make every reader read `other`."""
        for op, index in list(self.uses):
            op.set_operand(index, other)


class Op:
    """One operation.

    Attributes:
        definition: its declaration.
        operands, results: values.
        attrs: every declared attribute.
        loc: the layer and weight it came from, e.g. ``layers.3.attn.wq_a``.
        weight: the lazy expression, for the `weight` op only.
    """

    __slots__ = ("attrs", "definition", "loc", "operands", "results", "weight")

    def __init__(
        self, definition: OpDef, operands: Sequence[Value], attrs: Mapping[str, Attr], loc: str,
        weight: WeightExpr | None = None,
    ) -> None:  # fmt: skip
        self.definition, self.loc, self.weight = definition, loc, weight
        self.attrs = check_attrs(definition, attrs, loc)
        self.operands: list[Value] = []
        for value in operands:
            self.operands.append(value)
            value.uses[self, len(self.operands) - 1] = None
        self.results = [Value(t, self) for t in self.infer()]

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    def infer(self) -> tuple[TensorType, ...]:
        """Result types by the declaration; raises `IRError` where operands or attributes do not fit."""
        if self.weight is not None:
            return (TensorType(self.weight.dtype, self.weight.shape),)
        signature = Signature(
            self.definition, [v.type for v in self.operands], self.attrs, self.loc or self.name
        )
        return self.definition.infer(signature)

    def set_operand(self, index: int, value: Value) -> None:
        del self.operands[index].uses[self, index]
        self.operands[index] = value
        value.uses[self, index] = None

    def drop(self) -> None:
        """Unlink from the operands' use lists; the caller removes the op from its module."""
        for index, value in enumerate(self.operands):
            value.uses.pop((self, index), None)

    def __repr__(self) -> str:
        return f"<{self.name} @{self.loc}>"


def check_attrs(definition: OpDef, given: Mapping[str, Attr], where: str) -> dict[str, Attr]:
    """Every declared attribute with its value or default; raises `IRError` on unknown or mistyped ones."""
    declared = {a.name: a for a in definition.attrs}
    for name in given:
        if name not in declared:
            raise IRError(
                f"{definition.name} has no attribute {name!r}",
                where=where,
                allowed=", ".join(declared) or "none",
            )
    out: dict[str, Attr] = {}
    for name, attr in declared.items():
        value = given.get(name, attr.default)
        if value is None:
            raise IRError(f"{definition.name} needs attribute {name!r}", where=where, allowed=attr.kind.value)
        if not attr.kind.admits(value):
            raise IRError(
                f"{definition.name}.{name} = {value!r} is mistyped", where=where, allowed=attr.kind.value
            )
        out[name] = value
    return out


@dataclass(eq=False)
class Module:
    """A compiled model on its way: arguments, ops in execution order, results.

    Attributes:
        name: the model type.
        level: which table of ops holds (see `levels`).
        inputs: the arguments of a step, by name.
        states: the named state buffers; the runtime owns them.
        ops: in execution order.
        outputs: results by name; every state name is also an output, its value after the step.
        meta: facts of the checkpoint that the runtime needs (JSON values).
        store: where the weights' bytes come from; None for graphs read from text.
        assets: files that travel into the artifact unchanged, such as the tokenizer.
        parts: other programs of the same artifact by name, such as the image encoder; each a module without
            parts, over the same store.
        notes: what passes tell the report, by the name of the pass (JSON values); no part of the text.
    """

    name: str
    level: Level = Level.MODEL
    inputs: dict[str, Value] = field(default_factory=dict)
    states: dict[str, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    outputs: dict[str, Value] = field(default_factory=dict)
    meta: dict[str, object] = field(default_factory=dict)
    store: TensorStore | None = None
    assets: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, Module] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Value]:
        return {**self.inputs, **self.states}

    def weights(self) -> Iterator[Op]:
        """Every `weight` op."""
        return (op for op in self.ops if op.weight is not None)

    def output_values(self) -> set[Value]:
        return set(self.outputs.values())

    def to_networkx(self) -> nx.DiGraph[Op]:
        """Ops as nodes; an edge from producer to reader carries the `Value`s as `values`."""
        graph: nx.DiGraph[Op] = nx.DiGraph()
        graph.add_nodes_from(self.ops)
        for op in self.ops:
            for value in op.operands:
                if value.producer is not None:
                    graph.add_edge(value.producer, op)
        return graph


class Builder:
    """Appends ops to a module; the one way the front end and passes make ops."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.loc = ""

    def input(self, name: str, type_: TensorType) -> Value:
        self.module.inputs[name] = value = Value(type_, None, name)
        return value

    def state(self, name: str, type_: TensorType) -> Value:
        if name in self.module.states:
            raise IRError(f"state {name!r} is declared twice")
        self.module.states[name] = value = Value(type_, None, name)
        return value

    def op(self, name: str, *operands: Value, **attrs: Attr) -> Value:
        """Append an op with one result and return that."""
        return self.multi(name, *operands, **attrs).result

    def multi(self, name: str, *operands: Value, **attrs: Attr) -> Op:
        """Append an op and return it."""
        op = Op(OPS[name], operands, attrs, self.loc)
        self.module.ops.append(op)
        return op

    def weight(self, expr: WeightExpr, loc: str = "") -> Value:
        op = Op(OPS["weight"], (), {}, loc or self.loc, expr)
        self.module.ops.append(op)
        return op.result
