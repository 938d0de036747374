"""The TVM emitter: TARGET module -> Relax + TIR -> a shared object, with weights packed for its kernels."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from dsv4c.errors import TargetError, ToolchainError, unknown
from dsv4c.ir.dims import Dim, evaluate
from dsv4c.ir.graph import Module
from dsv4c.ir.weights import TensorStore, WeightExpr, stream
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.cpu import cpu_flags, cpu_model
from dsv4c.targets.base import Arch, Progress
from dsv4c.targets.calls import calls_meta
from dsv4c.targets.cpu.tuning import DEFAULT, Tuning, tuning_for

from .context import Context
from .fixed import Fixed, add_fixed
from .kernels.packing import Simd
from .link import find_linker
from .lowering import LOWERINGS
from .probes import probes, probes_meta
from .tables import state_writes, tables_meta, write_table


def emit_tvm(
    module: Module, store: TensorStore, writer: ArtifactWriter, arch: Arch, progress: Progress
) -> None:
    """Write sections `code` and `tvm_runtime`, the packed weights, and meta `tvm`.

    Each of `module.parts` is a function of its name in the same code; how it is called stands in meta
    `tvm.parts`.

    Raises:
        TargetError: an op has no lowering.
        ToolchainError: no linker is found.
    """
    tuning = tuning_for(arch.name, cpu_model() if runs_here(arch) else "")
    built, relax_module = build_programs({"step": module, **module.parts}, simd_of(arch), tuning)
    progress("code", 0, 1)
    writer.add_section("code", compile_module(relax_module, cross_attributes(arch)))
    progress("code", 1, 1)
    weights = {name: expr for context in built.values() for name, (_, expr) in context.packed.items()}
    if arch.machine == platform.machine():
        writer.add_section("tvm_runtime", _runtime_library().read_bytes())
    tables = {name: table for context in built.values() for name, table in context.tables.items()}
    total = sum(expr.nbytes for expr in weights.values()) + sum(t.layout.nbytes for t in tables.values())
    done = 0
    for name, expr in weights.items():
        writer.add_tensor(name, expr.dtype.value, expr.shape, stream(expr, store))
        done += expr.nbytes
        progress("weights", done, total)
    for table in tables.values():
        # a pass may have put statistics in front of the store
        for nbytes in write_table(table, module.store or store, writer):
            done += nbytes
            progress("weights", done, total)
    writer.set_meta("tables", tables_meta(built["step"].tables))
    parts = {name: _facts(part, built[name]) for name, part in module.parts.items()}
    more = {
        "writes": state_writes(module), "parts": parts, "probes": probes_meta(simd_of(arch)),
        "tuning": asdict(tuning),
    }  # fmt: skip
    writer.set_meta("tvm", _facts(module, built["step"]) | more)


def _facts(module: Module, context: Context) -> dict[str, Any]:
    """How a program is called: its arguments in order, the names of its results, and what it calls."""
    inputs = {
        name: {"dtype": v.type.dtype.storage.name, "shape": [str(d) for d in v.type.shape]}
        for name, v in module.inputs.items()
    }
    one = {"one": _one_facts(module, context.one)} if context.one is not None else {}
    return one | {
        "weights": list(context.packed), "tables": list(context.handles), "inputs": inputs,
        "states": list(module.states), "outputs": results_of(module),
        "calls": calls_meta(module, context.callers, context.calls),
    }  # fmt: skip


def _one_facts(module: Module, one: Fixed) -> dict[str, Any]:
    sizes = _ones(module)
    shapes = [[evaluate(d, sizes) for d in v.type.shape] for v in module.inputs.values()]
    return one.meta() | {"inputs": shapes}


def _ones(module: Module) -> dict[str, int]:
    """Every symbol of the inputs: one sequence, one token, one row of logits, room for one row of an
    image."""
    dims = (d for v in module.inputs.values() for d in v.type.shape if isinstance(d, Dim))
    return {symbol: 1 for d in dims for symbol in d.symbols()}


def build_relax(module: Module, simd: Simd = Simd.NONE) -> tuple[Context, Any]:
    """The Relax module: `step(inputs, states, weights, tables) -> (outputs, states)`; states in place."""
    built, relax_module = build_programs({"step": module}, simd)
    return built["step"], relax_module


def build_programs(
    programs: Mapping[str, Module], simd: Simd, tuning: Tuning = DEFAULT
) -> tuple[dict[str, Context], Any]:
    """One Relax module with a function per program; kernels and equal parameters are shared.

    The program `step` has a second function, `step_one`, for one token of one sequence, where it can.
    """
    builder, kernels, claimed = relax.BlockBuilder(), dict[Any, Any](), dict[str, WeightExpr]()
    built: dict[str, Context] = {}
    for name, module in programs.items():
        shapes = [v.type.shape for v in module.arguments().values()]
        bound = frozenset(d.name for shape in shapes for d in shape if isinstance(d, Dim) and d.op == "sym")
        context = built[name] = Context(builder, bound, simd, tuning, kernels=kernels, claimed=claimed)
        _build(module, context, name)
        claimed.update({key: expr for key, (_, expr) in context.packed.items()})
        if name == "step":
            context.one = add_fixed(builder, name, _ones(module), "step_one")
    for name, function in probes(simd).items():
        builder.add_func(function, name)
    return built, builder.get()


def _build(module: Module, context: Context, function: str) -> None:
    """Add a module to the context's builder as `function`."""
    for name, value in module.arguments().items():
        context.values[value] = relax.Var(_identifier(name), context.tensor(value.type))
    if "tokens" in module.inputs:
        context.shared["tokens"] = context.values[module.inputs["tokens"]]
    arguments = [context.values[v] for v in module.arguments().values()]
    builder = context.builder
    # The parameters include the packed weights, which are known only when every op is lowered: the body is
    # built under a name of its own first, then closed with all parameters.
    with builder.function(function):
        for op in module.ops:
            if op.name not in LOWERINGS:
                raise TargetError(str(unknown("op", op.name, LOWERINGS, TargetError)), where=op.loc)
            LOWERINGS[op.name](context, op)
            context.callers += [op] * (len(context.calls) - len(context.callers))
        names = [*results_of(module), *module.states]
        results = relax.Tuple([context.values[module.outputs[n]] for n in names])
        weights = [var for var, _ in context.packed.values()]
        builder.emit_func_output(results, params=[*arguments, *weights, *context.handles.values()])


def results_of(module: Module) -> list[str]:
    """The outputs that are no states, in order; the compiled step returns them first."""
    return [name for name in module.outputs if name not in module.states]


def runs_here(arch: Arch) -> bool:
    """Whether this machine has what an arch requires."""
    return arch.machine == platform.machine() and cpu_flags().issuperset(arch.requires)


def simd_of(arch: Arch) -> Simd:
    """The best vector instructions that every machine of an arch has."""
    if arch.machine == "aarch64":
        return Simd.NEON
    names = {
        "amx_bf16": Simd.AMX, "avx512_bf16": Simd.AVX512_BF16, "avx512bw": Simd.AVX512, "avx2": Simd.AVX2,
        "ssse3": Simd.SSSE3,
    }  # fmt: skip
    return next((simd for flag, simd in names.items() if flag in arch.requires), Simd.NONE)


def cross_attributes(arch: Arch) -> dict[str, Any]:
    """LLVM attributes of an arch; the triple only where the host differs."""
    attributes: dict[str, Any] = dict(arch.attributes)
    if "mattr" in attributes:
        attributes["mattr"] = attributes["mattr"].split(",")
    if arch.machine == platform.machine():
        attributes.pop("mtriple", None)
    return attributes


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def compile_module(relax_module: Any, cpu: dict[str, Any]) -> bytes:
    """Compile and link; returns the bytes of the shared object.

    Raises:
        ToolchainError: there is neither a C compiler nor the ziglang wheel.
    """
    link = find_linker(cpu.get("mtriple"))
    target = tvm.target.Target({"kind": "llvm", **cpu})
    executable = tvm.compile(relax_module, target=target)
    with tempfile.TemporaryDirectory(prefix="dsv4c-") as directory:
        path = Path(directory) / "step.so"
        executable.export_library(str(path), fcompile=link)
        return path.read_bytes()


def _runtime_library() -> Path:
    """TVM's runtime, shipped inside the artifact so that running needs no TVM installation."""
    path = Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"
    if not path.exists():
        raise ToolchainError(f"{path} is missing", hint="pip install apache-tvm==" + tvm.__version__)
    return path
