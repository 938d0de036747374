"""One ONNX model per number of tokens, all over the same weights, for consumers of fixed shapes.

What a step means and how states go in and out is as in `emit.py`; here a state has all of its capacity, and
logits are those of every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto, ValueInfoProto

from dsv4c.errors import TargetError
from dsv4c.ir.clone import clone
from dsv4c.ir.dtypes import DType
from dsv4c.ir.formats import Scheme
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.packed import packed_form
from dsv4c.ir.streams import stream_values
from dsv4c.ir.weights import TensorStore, WeightExpr
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.targets.stages import Stage, extended_state, split

from . import static_linear, static_moe, static_rounding, static_streams
from .dialect import Dialect
from .emit import Progress, append_of, output_name, weight_names
from .host import HostPart, host_part, write_host
from .lowering import Entries, Lowering, V, integer
from .ops import HOST_OPS
from .static import StaticContext
from .stored import LOCATION_MARK, Stored, store_codes, store_weight, stored_bytes, transposed
from .table import LOWERINGS

STATIC_LOWERINGS: dict[str, Lowering] = {
    **LOWERINGS,
    "expert_mlp": static_moe.expert_mlp,
    "linear": static_linear.linear,
    "grouped_linear": static_linear.grouped_linear,
    "round_values": static_rounding.round_values,
    "hc_collapse": static_streams.hc_collapse,
    "hc_expand": static_streams.hc_expand,
}
"""Op name -> lowering where every size is known."""

SECTION = "onnx."
"""In front of a program's name."""

_FLOAT8 = {DType.F8E4M3: "f8e4m3", DType.F8E4M3FNUZ: "f8e4m3fnuz"}
"""Codes that a dialect may have an element type for."""

_DOWN = ("expert_mlp", 5)
"""The operand that is stored with its last two axes swapped; see `static_moe`."""


@dataclass(frozen=True)
class Shapes:
    """The sizes that programs are made for, as `passes.bind_shapes` leaves them in the module."""

    batch: int
    context: int
    tokens: tuple[int, ...]
    stages: int

    @classmethod
    def of(cls, module: Module) -> Shapes:
        """Raises `TargetError` where no pass has bound the shapes."""
        found = module.meta.get("static_shapes")
        if not isinstance(found, dict):
            raise TargetError(
                "shapes are not bound", where=module.name, hint="end the pipeline with bind_shapes"
            )
        tokens = tuple(int(t) for t in found["tokens"])
        return cls(int(found["batch"]), int(found["context"]), tokens, int(found["stages"]))


def emit_static(
    module: Module,
    store: TensorStore,
    writer: ArtifactWriter,
    dialect: Dialect,
    progress: Progress | None = None,
) -> None:
    """Write the weights and, per number of tokens and stage, the section "onnx.<name>" with its program.

    meta["onnx"] = {"location", "tensors", "states", "host"} as `emit_onnx` writes them, and "static":
    {"batch", "context", "buckets": [{"tokens", "programs": [{"name", "stage", "probes": {layer: tensor},
    "border": {"inputs": [names], "outputs": [[name, NumPy dtype, shape]]}}]}], "dialect", "opset",
    "provider": [name, options] or null}. What a stage reads of earlier ones is called as their output was,
    with ".in" behind it, as "streams.in".

    Raises:
        TargetError: an op has no lowering, or a node, type or rank is outside the dialect; names the layer.
    """
    shapes = Shapes.of(module)
    _check(module, dialect)
    host = host_part(module)
    _split(module, host, shapes.stages, {})  # what cannot be cut is refused before any weight is written
    stored = _store(host.device_weights(module), store, writer, dialect, progress)
    buckets = []
    for count in shapes.tokens:
        sizes = {"B": shapes.batch, "ctx": shapes.context, "T": count, "L": count, "I": count}
        bound = clone(module, sizes)
        part = host_part(bound)
        places = dict(zip(part.device_weights(bound), stored, strict=True))
        nbytes = {op: sum(p.nbytes for p in ps) for op, ps in places.items()}
        programs, made = [], dict[str, ValueInfoProto]()
        for number, stage in enumerate(_split(bound, part, shapes.stages, nbytes)):
            g = StaticContext(dialect)
            model = _model(g, bound, stage, places, part, made)
            name = f"{count}" if shapes.stages == 1 else f"{count}.{number}"
            writer.add_section(SECTION + name, model)
            programs.append({"name": name, "stage": number, "probes": g.probes, "border": g.border()})
        buckets.append({"tokens": count, "programs": programs})
    static = {
        "batch": shapes.batch, "context": shapes.context, "buckets": buckets,
        "dialect": dialect.name, "opset": dialect.opset,
        "provider": [dialect.provider, dict(dialect.provider_options)] if dialect.provider else None,
    }  # fmt: skip
    names = [part.name for parts in stored for part in parts]
    states = {n: _state(module, n, v) for n, v in module.states.items() if n not in host.states}
    meta = {"location": LOCATION_MARK, "tensors": names, "states": states, "static": static}
    writer.set_meta("onnx", meta | ({"host": write_host(host, module, store, writer)} if host.ops else {}))


def _split(module: Module, host: HostPart, count: int, sizes: Mapping[Op, int]) -> list[Stage]:
    """The stages of what programs compute."""
    return split(module, count, sizes, host.inputs.values(), host.device_outputs(module))


def program_names(shapes: Shapes) -> list[str]:
    """The names of an artifact's programs: tokens, and the stage where there are several."""
    stages = [""] if shapes.stages == 1 else [f".{stage}" for stage in range(shapes.stages)]
    return [f"{count}{stage}" for count in shapes.tokens for stage in stages]


def _check(module: Module, dialect: Dialect) -> None:
    for op in module.ops:
        if op.weight is None and op.name not in STATIC_LOWERINGS and op.name not in HOST_OPS:
            allowed = ", ".join(sorted(STATIC_LOWERINGS))
            raise TargetError(
                f"{dialect.name} has no {op.name}", where=op.loc or module.name, allowed=allowed
            )
        known = _expert_roundings(dialect) if op.name == "expert_mlp" else ("none",)
        if (rounding := op.attrs.get("rounding", "none")) not in known:
            raise TargetError(
                f"{dialect.name} has no {op.name} with rounding = {rounding!r}", where=op.loc or module.name,
                allowed=", ".join(known),
            )  # fmt: skip


def _expert_roundings(dialect: Dialect) -> tuple[str, ...]:
    """How experts may round: in BF16 only where there is such a product."""
    return ("none", "fp16", "mxfp8", *(["bf16"] if "bf16_matmul" in dialect.vendor else []))


def _store(
    ops: list[Op], store: TensorStore, writer: ArtifactWriter, dialect: Dialect, progress: Progress | None
) -> list[tuple[Stored, ...]]:
    """Per weight what holds it: its numbers, or its codes and scales."""
    total, done, index = sum(map(stored_bytes, ops)), 0, 0
    out: list[tuple[Stored, ...]] = []
    for op, name in zip(ops, weight_names(ops), strict=True):
        numbers, scales = _parts(op, dialect)
        parts: tuple[Stored, ...]
        if scales is None:
            parts = (store_weight(numbers, name, index, store, writer, op.loc, half=True),)
        else:
            parts = store_codes(numbers, scales, name, index, store, writer, _is_gathered(op))
        index += len(parts)
        out.append(parts)
        done += stored_bytes(op)
        if progress:
            progress(name, done, total)
    return out


def _parts(op: Op, dialect: Dialect) -> tuple[WeightExpr, WeightExpr | None]:
    """What is stored: numbers and None, or codes and their scales; blocks of codes are never transposed."""
    assert op.weight is not None
    swapped = {(user.name, index) == _DOWN for user, index in op.result.uses}
    if swapped == {True, False}:
        raise TargetError("a down projection of experts is read by another op too", where=op.loc)
    held = packed_form(op.weight)
    if held is None or not _stays_codes(held.scheme, _is_gathered(op), dialect):
        return transposed(op.weight) if True in swapped else op.weight, None
    down = True in swapped and held.scheme.name == "int8"
    return transposed(held.codes) if down else held.codes, held.scales


def _stays_codes(scheme: Scheme, gathered: bool, dialect: Dialect) -> bool:
    """Whether a weight is stored as it is: INT8 anywhere; the rest where there are 8-bit floats, of its kind
    unless bytes stand for them."""
    known = dialect.elements.intersection(_FLOAT8.values())
    if scheme.name == "int8" or not known or scheme.tensor_scale:
        return scheme.name == "int8"
    if scheme.code is DType.F4E2M1X2:
        return True
    return scheme.code in _FLOAT8 and (gathered or _FLOAT8[scheme.code] in known)


def _is_gathered(op: Op) -> bool:
    """Whether a weight is of experts, whose codes are gathered; no 8-bit float is, on the processor."""
    return any(user.name == "expert_mlp" for user in op.result.users())


def _model(
    g: StaticContext, module: Module, stage: Stage, places: Mapping[Op, tuple[Stored, ...]], host: HostPart,
    made: dict[str, ValueInfoProto],
) -> bytes:  # fmt: skip
    """The program of one stage; `made` are the outputs of those before it, by name, and it adds its own."""
    for op, parts in places.items():
        held = packed_form(op.weight) if op.weight is not None else None
        if held is None or len(parts) == 1:
            g.holds(op.result, parts[0])
        else:
            g.holds(op.result, parts[0], parts[1], held.scheme)
    read = {v for op in stage.ops for v in op.operands} | {extended_state(v) for v in stage.inputs.values()}
    arguments = host.device_arguments(module)
    g.inputs = [_argument(g, name, value) for name, value in arguments.items() if value in read]
    g.inputs += [_from_before(g, output_name(name, module), v, made) for name, v in stage.inputs.items()]
    streams = {v: layer for layer, v in stream_values(module).items()} if "logits" in module.outputs else {}
    for op in stage.ops:
        _lower(g, op, streams)
    g.where = "outputs"
    g.outputs = [_output(g, name, value, module) for name, value in stage.outputs.items()]
    made.update((info.name, info) for info in g.outputs)
    data: bytes = g.model(g.inputs, g.outputs).SerializeToString()
    return data


def _from_before(
    g: StaticContext, name: str, value: Value, made: Mapping[str, ValueInfoProto]
) -> ValueInfoProto:
    """An input that an earlier stage gave as its output `name`; of entries their new rows."""
    g.where, type_ = name, made[name].type.tensor_type
    tensor = g.declare(f"{name}.in", type_.elem_type, [d.dim_value for d in type_.shape.dim])
    integers = value.type.dtype is DType.I32
    state = extended_state(value)
    new = g.cast_index(tensor) if integers else tensor
    g.values[value] = Entries(V(g.values[state]), new) if state is not None else new  # type: ignore[arg-type]
    return g.info(tensor, tensor)


def _lower(g: StaticContext, op: Op, streams: Mapping[Value, str]) -> None:
    g.where = op.loc or op.name
    result = STATIC_LOWERINGS[op.name](g, op)
    results = result if isinstance(result, tuple) else (result,)
    g.values.update(zip(op.results, results, strict=True))
    for value, lowered in zip(op.results, results, strict=True):
        if value in streams and not isinstance(lowered, Entries):
            g.probes[streams[value]] = lowered


def _argument(g: StaticContext, name: str, value: Value) -> ValueInfoProto:
    g.where = name
    element = TensorProto.INT32 if value.type.dtype is DType.I32 else TensorProto.FLOAT
    shape = value.type.concrete({})
    if append_of(value):
        shape = (shape[0], max(1, shape[1]), *shape[2:])  # no consumer has a tensor without elements
    tensor = g.declare(name, element, shape)
    g.values[value] = g.cast_index(tensor) if element == TensorProto.INT32 else tensor
    return g.info(name, tensor)


def _output(g: StaticContext, name: str, value: Value, module: Module) -> ValueInfoProto:
    lowered = g.values[value]
    tensor = lowered.new if isinstance(lowered, Entries) else lowered
    border = output_name(name, module)
    if value.type.dtype is DType.I32 and g.element_of(tensor) != TensorProto.INT32:
        tensor = g.op("Cast", tensor, to=TensorProto.INT32)
    g.alias(tensor, border)
    return g.info(border, tensor)


def _state(module: Module, name: str, value: Value) -> dict[str, Any]:
    append = append_of(value)
    facts: dict[str, Any] = {"output": output_name(name, module)}
    return facts | ({"ratio": integer(append, "ratio")} if append else {})


__all__ = ["STATIC_LOWERINGS", "Shapes", "V", "emit_static"]
