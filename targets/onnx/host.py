"""What the host computes in front of a program: ids and rows of Engram tables, which depend on tokens alone.

The ops stay in the graph, so that it can be evaluated; here they are cut off it. Their results become inputs
of the program, and what they mean goes into the manifest, for `runtime.engram.host`. Tables are far larger
than a device's memory: they lie in the artifact as they were stored, and the runtime decodes the rows it is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dsv4c.errors import TargetError
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import Array
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.rows import by_rows
from dsv4c.ir.weights import TensorStore, WeightExpr
from dsv4c.runtime.container import ArtifactWriter

from .ops import HOST_OPS

_RESULT = {"compress_tokens": "ids", "ngram_rows": "row_ids", "ngram_history": "after", "engram_rows": "rows"}
"""Behind the location of an op, the name of its result."""

_PIECE = 16 << 20
"""Bytes of a table that are read at a time, about."""


@dataclass(frozen=True, eq=False)
class HostPart:
    """The ops of a module that the host computes.

    Attributes:
        inputs: name -> value that programs read.
        states: that only the host reads and writes.
    """

    ops: tuple[Op, ...] = ()
    inputs: dict[str, Value] = field(default_factory=dict)
    states: frozenset[str] = frozenset()

    def device_arguments(self, module: Module) -> dict[str, Value]:
        """The arguments of the module, and what the host makes, that are not for the host alone."""
        arguments = {
            name: value for name, value in module.arguments().items()
            if not value.uses or any(user.name not in HOST_OPS for user in value.users())
        }  # fmt: skip
        return arguments | self.inputs

    def device_outputs(self, module: Module) -> dict[str, Value]:
        """The module's outputs that programs give."""
        return {name: value for name, value in module.outputs.items() if name not in self.states}

    def device_weights(self, module: Module) -> list[Op]:
        """The weights that programs read."""
        return [op for op in module.weights() if any(u.name not in HOST_OPS for u in op.result.users())]


def host_part(module: Module) -> HostPart:
    """The part of a module that is the host's.

    Raises:
        TargetError: it reads what a program computes, or shares a state with one.
    """
    ops = tuple(op for op in module.ops if op.name in HOST_OPS)
    made = {v for op in ops for v in op.results}
    arguments = set(module.arguments().values())
    for op in ops:
        for value in op.operands:
            weight = value.producer is not None and value.producer.weight is not None
            if value not in made and value not in arguments and not weight:
                raise TargetError(
                    f"{op.name} reads what the program computes", where=op.loc,
                    allowed="tokens, states and weights: it runs on the host, ahead of the program",
                )  # fmt: skip
    inputs = {
        _name(op): op.result for op in ops if any(user.name not in HOST_OPS for user in op.result.users())
    }
    states = frozenset(name for name in module.states if module.outputs.get(name) in made)
    for name in states:
        readers = [op for op in module.states[name].users() if op.name not in HOST_OPS]
        if readers:
            raise TargetError(
                f"{readers[0].name} reads the state {name}, which the host keeps", where=readers[0].loc,
                allowed=", ".join(sorted(HOST_OPS)),
            )  # fmt: skip
    return HostPart(ops, inputs, states)


def write_host(
    part: HostPart, module: Module, store: TensorStore, writer: ArtifactWriter
) -> dict[str, object]:
    """Write maps and tables as they are stored; what the manifest says of the part.

    Returns:
        {"steps": [{"op", "operands", "result", "attrs"}], "inputs": [results], "states": {state: result}}; an
        operand is the name of an input of the step, a state, a result, or "@" and a tensor.
    """
    names = {value: name for name, value in module.arguments().items()}
    steps = []
    for op in part.ops:
        for value in op.operands:
            weight = value.producer
            if value not in names and weight is not None and weight.weight is not None:
                names[value] = f"@{weight.loc}"
                pieces = _stored(weight.weight, module.store or store)
                writer.add_tensor(weight.loc, weight.weight.dtype.value, weight.weight.shape, pieces)
        names[op.result] = _name(op)
        attrs = {k: list(v) if isinstance(v, tuple) else v for k, v in op.attrs.items()}
        steps.append({
            "op": op.name, "operands": [names[v] for v in op.operands], "result": _name(op), "attrs": attrs,
        })  # fmt: skip
    states = {name: names[module.outputs[name]] for name in sorted(part.states)}
    return {"steps": steps, "inputs": list(part.inputs), "states": states}


def _name(op: Op) -> str:
    return f"{op.loc}.{_RESULT[op.name]}"


def _stored(x: WeightExpr, store: TensorStore) -> Iterator[Array]:
    """The bytes of a table, some rows at a time."""
    if x.op == "concat":
        for part in x.args:
            yield from _stored(part, store)
    elif not by_rows(x):
        yield from w.stream(x, store)
    else:
        step = max(1, _PIECE * x.shape[0] // max(x.nbytes, 1))
        for start in range(0, x.shape[0], step):
            yield from w.stream(w.rows(x, start, min(start + step, x.shape[0])), store)
