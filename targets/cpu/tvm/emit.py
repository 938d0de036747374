"""The TVM emitter: TARGET module -> Relax + TIR -> a shared object, with weights packed for its kernels."""

from __future__ import annotations

import functools
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
from dsv4c.runtime.container.several import section_names, share
from dsv4c.runtime.cpu import cpu_model, lacks
from dsv4c.targets.base import Arch, Progress
from dsv4c.targets.calls import calls_meta
from dsv4c.targets.cpu.tuning import DEFAULT, Tuning, tuning_for

from .cache import kept, key_of
from .context import Context
from .fixed import Fixed, add_fixed
from .kernels.packing import Simd
from .link import Linker, find_linker
from .lowering import LOWERINGS
from .probes import probes, probes_meta
from .tables import state_writes, tables_meta, write_table


def emit_tvm(
    module: Module, store: TensorStore, writer: ArtifactWriter, arch: Arch, progress: Progress
) -> None:
    """Write the code of every arch that `arch` stands for, the packed weights once, and meta `tvm`.

    Each of `module.parts` is a function of its name in the same code; how it is called stands in meta
    `tvm.parts`. How code for several archs lies in an artifact stands in
    `runtime.container.several`.

    Raises:
        TargetError: an op has no lowering.
        ToolchainError: no linker is found.
    """
    built = _write_code(module, writer, arch, progress)
    contexts = [context for programs in built.values() for context in programs.values()]
    weights = {name: expr for context in contexts for name, (_, expr) in context.packed.items()}
    tables = {name: table for context in contexts for name, table in context.tables.items()}
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
    writer.set_meta("tables", tables_meta(contexts[0].tables))
    each = {a.name: _arch_facts(module, built[a.name], a) for a in arch.each()}
    writer.set_meta("tvm", share(each) if arch.members else each[arch.name])


def _write_code(
    module: Module, writer: ArtifactWriter, arch: Arch, progress: Progress
) -> dict[str, dict[str, Context]]:
    """The sections of code and of TVM's runtime; returns the programs of every arch by its name.

    A weight that archs read in one layout is one parameter of all of them; in another layout it gets another
    name, and is packed once more.
    """
    archs, several = arch.each(), bool(arch.members)
    linkers = [find_linker(cross_attributes(a).get("mtriple")) for a in archs]  # complains early
    claimed: dict[str, WeightExpr] = {}
    built: dict[str, dict[str, Context]] = {}
    for done, (one, linker) in enumerate(zip(archs, linkers, strict=True)):
        progress("code", done, len(archs))
        code, _ = section_names(one.name, one.machine, several)
        programs = {"step": module, **module.parts}
        built[one.name], relax_module = build_programs(programs, simd_of(one), claimed, _tuning(one))
        cpu = cross_attributes(one)
        make = functools.partial(compile_module, relax_module, cpu, linker)
        writer.add_section(code, kept(key_of(relax_module, cpu, linker), make))
    progress("code", len(archs), len(archs))
    host = platform.machine()
    if any(a.machine == host for a in archs):
        writer.add_section(section_names("", host, several)[1], _runtime_library().read_bytes())
    return built


def _arch_facts(module: Module, built: Mapping[str, Context], arch: Arch) -> dict[str, Any]:
    """What meta `tvm` says of the programs of one arch."""
    return _facts(module, built["step"]) | {
        "writes": state_writes(module), "probes": probes_meta(simd_of(arch)), "version": tvm.__version__,
        "parts": {name: _facts(part, built[name]) for name, part in module.parts.items()},
        "tuning": asdict(_tuning(arch)),
    }  # fmt: skip


def _tuning(arch: Arch) -> Tuning:
    """Of an arch that runs here, what is known for this processor."""
    return tuning_for(arch.name, "" if lacks(arch.machine, arch.requires) else cpu_model())


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
    programs: Mapping[str, Module], simd: Simd, claimed: dict[str, WeightExpr] | None = None,
    tuning: Tuning = DEFAULT,
) -> tuple[dict[str, Context], Any]:  # fmt: skip
    """One Relax module with a function per program; kernels and equal parameters are shared.

    The program `step` has a second function, `step_one`, for one token of one sequence, where it can.

    Args:
        claimed: parameters that the artifact has already; what these programs read is added.
    """
    builder, kernels, claimed = relax.BlockBuilder(), dict[Any, Any](), {} if claimed is None else claimed
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


_NEEDLESS = (
    "s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse", "s_tir.RenormalizeSplitPattern",
    "s_tir.StmtSimplify", "tirx.RemoveNoOp",
)  # fmt: skip
"""Passes of TVM's that take more than half of a product's time to compile and have nothing to do here: single
products come out the same byte for byte; code of a whole model is 0.2 % larger."""


def machine_code(module: Any, cpu: dict[str, Any]) -> Any:
    """A module or function of TVM's, compiled for an arch by its `cross_attributes`; not linked."""
    with tvm.transform.PassContext(opt_level=3, disabled_pass=list(_NEEDLESS)):
        return tvm.compile(module, target=tvm.target.Target({"kind": "llvm", **cpu}))


def compile_module(relax_module: Any, cpu: dict[str, Any], link: Linker) -> bytes:
    """Compile and link; returns the bytes of the shared object.

    Raises:
        ToolchainError: linking fails.
    """
    executable = machine_code(relax_module, cpu)
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
