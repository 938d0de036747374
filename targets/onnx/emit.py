"""From a TARGET-level module to the "onnx" section, the weights, and the "onnx" meta data of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onnx import TensorProto, ValueInfoProto, helper

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.weights import TensorStore
from dsv4c.runtime.container import ArtifactWriter

from .host import HostPart, host_part, write_host
from .lowering import Context, Entries, V, integer
from .ops import HOST_OPS
from .stored import LOCATION_MARK, store_weight, stored_bytes
from .table import LOWERINGS

Progress = Callable[[str, int, int], None]
"""(tensor name, bytes done, bytes in all)"""

PART = "onnx.part."
"""In front of the name of a further program."""


def emit_onnx(
    module: Module, store: TensorStore, writer: ArtifactWriter, progress: Progress | None = None
) -> None:
    """Write `module` as an ONNX model whose weights lie in the artifact as f32 and i32 tensors.

    The model's inputs are the module's arguments under their own names. Its outputs are the module's outputs;
    the value of state `s` after the step is called `s.after`, and of entries it holds the new rows only. Of
    entries the model is fed the used rows, at least one: [B, "used.<state>", D].
    meta["onnx"] = {"location": the mark of the file, "tensors": [names, in the order of the offset marks],
    "states": {name: {"output", and for entries "ratio" and "read"}}}; "read" is "some" when only gathers
    touch the old rows, else "all". "host" is what `host.write_host` says of inputs that the runtime makes
    itself; it is there only where there are some. Each of `module.parts` becomes a section "onnx.part.NAME"
    with "parts": {name: {"inputs": [...], "outputs": [...]}}.

    Args:
        progress: called after each tensor with its name, the bytes done and the bytes in all.

    Raises:
        TargetError: an op has no lowering, or a value is used in a way the dialect cannot express.
    """
    programs = {"onnx": module} | {f"{PART}{name}": part for name, part in module.parts.items()}
    for one in programs.values():
        _check(one)
    host, tensors = host_part(module), list[str]()
    states = _states(module, host)
    meta: dict[str, object] = {"location": LOCATION_MARK, "tensors": tensors, "states": states}
    parts: dict[str, object] = {}
    for section, one in programs.items():
        facts = _emit(one, host if one is module else HostPart(), section, store, writer, tensors, progress)
        if one is not module:
            parts[section.removeprefix(PART)] = facts
    if host.ops:
        meta["host"] = write_host(host, module, store, writer)
    writer.set_meta("onnx", meta | ({"parts": parts} if parts else {}))


def _emit(
    module: Module, host: HostPart, section: str, store: TensorStore, writer: ArtifactWriter,
    tensors: list[str], progress: Progress | None,
) -> dict[str, list[str]]:  # fmt: skip
    """One program into its section, its weights behind those of `tensors`; the names of its border."""
    g = Context()
    weights = _store_weights(g, host.device_weights(module), store, writer, tensors, progress)
    inputs = [_argument(g, name, value) for name, value in host.device_arguments(module).items()]
    for op in module.ops:
        if op.weight is None and op not in host.ops:
            _lower(g, op)
    g.where = "outputs"
    outputs = [_output(g, name, value, module) for name, value in host.device_outputs(module).items()]
    model = g.model(inputs, outputs, weights)
    writer.add_section(section, model.SerializeToString())
    return {"inputs": [i.name for i in inputs], "outputs": [o.name for o in outputs]}


def _check(module: Module) -> None:
    for op in module.ops:
        if op.weight is None and op.name not in LOWERINGS and op.name not in HOST_OPS:
            allowed = ", ".join(sorted(LOWERINGS))
            raise TargetError(f"{op.name} has no ONNX lowering", where=op.loc or module.name, allowed=allowed)
        if op.attrs.get("rounding", "none") != "none":
            what = f"{op.name} with rounding = {op.attrs['rounding']!r} has no ONNX lowering"
            raise TargetError(what, where=op.loc or module.name, allowed="none", hint="use format tvm")


def _store_weights(
    g: Context, ops: list[Op], store: TensorStore, writer: ArtifactWriter, tensors: list[str],
    progress: Progress | None,
) -> list[TensorProto]:  # fmt: skip
    total, done, out = sum(map(stored_bytes, ops)), 0, []
    for op, name in zip(ops, weight_names(ops), strict=True):
        assert op.weight is not None
        out.append(store_weight(op.weight, name, len(tensors), store, writer, op.loc).declare())
        tensors.append(name)
        g.values[op.result] = V(name)
        done += stored_bytes(op)
        if progress:
            progress(name, done, total)
    return out


def weight_names(ops: Iterable[Op]) -> list[str]:
    """The locations, made unique where two weights share one."""
    seen: dict[str, int] = {}
    out = []
    for op in ops:
        base = op.loc or "weight"
        seen[base] = seen.get(base, 0) + 1
        out.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
    return out


def _lower(g: Context, op: Op) -> None:
    g.where = op.loc or op.name
    result = LOWERINGS[op.name](g, op)
    results = result if isinstance(result, tuple) else (result,)
    g.values.update(zip(op.results, results, strict=True))


def _argument(g: Context, name: str, value: Value) -> ValueInfoProto:
    """Declare an input; integers go on as INT64."""
    integers = value.type.dtype is DType.I32
    g.where = name
    g.values[value] = g.cast_index(V(name)) if integers else V(name)
    appended = append_of(value)
    shape: list[int | str] = [d if isinstance(d, int) else str(d) for d in value.type.shape]
    if appended:
        shape[1] = f"used.{name}"
    return helper.make_tensor_value_info(name, TensorProto.INT32 if integers else TensorProto.FLOAT, shape)


def _output(g: Context, name: str, value: Value, module: Module) -> ValueInfoProto:
    lowered = g.values[value]
    tensor = lowered.new if isinstance(lowered, Entries) else lowered
    integers = value.type.dtype is DType.I32
    border = output_name(name, module)
    if integers:
        tensor = g.op("Cast", tensor, to=TensorProto.INT32)
    g.alias(tensor, border)
    return helper.make_tensor_value_info(border, TensorProto.INT32 if integers else TensorProto.FLOAT, None)


def output_name(name: str, module: Module) -> str:
    """The ONNX name of a module output: a state's differs from that of the input it replaces."""
    return f"{name}.after" if name in module.states else name


def append_of(state: Value) -> Op | None:
    """The `entries_append` that extends a state, if it is one of entries."""
    return next((op for op, index in state.uses if op.name == "entries_append" and index == 0), None)


def _states(module: Module, host: HostPart) -> dict[str, dict[str, object]]:
    out: dict[str, dict[str, object]] = {}
    for name, value in module.states.items():
        if name in host.states:
            continue
        out[name] = {"output": output_name(name, module)}
        append = append_of(value)
        if append is not None:
            out[name] |= {"ratio": integer(append, "ratio"), "read": _reading(append.result)}
    return out


def _reading(entries: Value) -> str:
    """ "some" when every reader picks rows by id, so that rows it does not pick cost nothing."""
    picks = (op.name == "attention" and len(op.operands) == 8 for op in entries.users())
    return "some" if all(picks) else "all"
