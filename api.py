"""The Python API: checkpoint -> module -> artifact, evaluation, and verification.

The one place that knows the front end, the passes, the targets and the runtime together.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CompileError, TargetError, ToolchainError, UsageError
from dsv4c.frontend.build import build_checkpoint
from dsv4c.frontend.checkpoint import open_checkpoint
from dsv4c.frontend.engram_layer import MODEL_TYPE as ENGRAM_LAYER
from dsv4c.frontend.engram_layer import load_engram_layer
from dsv4c.frontend.export import Exported, export_checkpoint
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.text import print_module
from dsv4c.ir.verify import verify as verify_module
from dsv4c.passes import (
    Pass,
    PassRecord,
    known_passes,
    over_devices,
    parse_pipeline,
    print_pipeline,
    run_pipeline,
)  # fmt: skip
from dsv4c.passes.allow_replay import START, encoder_part
from dsv4c.passes.check import ResultCheck
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.targets import Arch, Format, Target, known_devices, parse_target
from dsv4c.targets.estimate import estimate_artifact
from dsv4c.targets.golden import TOLERANCES, write_golden
from dsv4c.targets.report import compile_report

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

Passes = str | Sequence[Pass | str] | None
Plugins = Sequence[str | os.PathLike[str]]


def load_checkpoint(path: str | os.PathLike[str]) -> Module:
    """Read a DeepSeek-V4 or V4.1 checkpoint directory, in any of its spellings, into a MODEL-level module.

    Weights stay on disk as lazy expressions. A directory that holds a single Engram layer gives that layer.

    Raises:
        ConfigError, CheckpointError: what is wrong with the directory.
    """
    if _model_type(Path(path)) == ENGRAM_LAYER:
        return load_engram_layer(Path(path))
    checkpoint = open_checkpoint(Path(path))
    module = build_checkpoint(checkpoint)
    module.assets["config"] = (Path(path) / "config.json").read_bytes()
    if checkpoint.tokenizer_path is not None:
        module.assets["tokenizer"] = checkpoint.tokenizer_path.read_bytes()
    verify_module(module)
    return module


def _model_type(path: Path) -> object:
    """What config.json calls itself; None where it does not say, which is complained about later."""
    try:
        raw = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return raw.get("model_type") if isinstance(raw, dict) else None


def export(
    module: Module, directory: str | os.PathLike[str], source: str | os.PathLike[str] | None = None
) -> Exported:
    """Write a MODEL-level module, e.g. one whose experts were pruned, as a checkpoint; see `frontend.export`.

    Args:
        source: the directory it came from, for what the graph does not hold: MTP blocks and companion files.
    """
    return export_checkpoint(module, directory, open_checkpoint(Path(source)) if source is not None else None)


def evaluate(
    module: Module,
    tokens: npt.ArrayLike,
    n_valid: npt.ArrayLike | None = None,
    precision: npt.DTypeLike = np.float32,
) -> npt.NDArray[Any]:
    """The logits of a module by its meaning in NumPy, from a fresh state; of text, where it takes images.

    Args:
        tokens: [T] or [B,T] integers.
        n_valid: [B] real tokens per row.

    Returns:
        [T,vocab] or [B,T,vocab] of `precision`.
    """
    ids = np.asarray(tokens, np.int32)
    batch = ids[None] if ids.ndim == 1 else ids
    evaluator = Evaluator(module, precision=precision)
    valid = np.full(len(batch), batch.shape[1]) if n_valid is None else np.asarray(n_valid)
    state = evaluator.fresh_state(B=len(batch), ctx=batch.shape[1])
    logits = evaluator(text_inputs(module, batch, valid), state).outputs["logits"]
    return logits[0] if ids.ndim == 1 else logits


def text_inputs(
    module: Module, tokens: npt.NDArray[Any], n_valid: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a step over text that asks for the logits of every token.

    Args:
        tokens: [B,T]; none of them stands for an image.
        n_valid: [B] real tokens per row.
    """
    batch, length = tokens.shape
    given = {"tokens": tokens, "n_valid": n_valid, "rows": np.tile(np.arange(length), (batch, 1))}
    if "images" in module.inputs:
        width = module.inputs["images"].type.shape[2]
        assert isinstance(width, int)
        given |= {"images": np.zeros((batch, 1, width), np.float32), "n_images": np.zeros(batch, np.int32)}
    return given


@dataclass(frozen=True)
class Lowered:
    """A module at level TARGET and how it came about.

    Attributes:
        module: the result, a copy; the module it came from is unchanged.
        reference: what the artifact is held to: the graph as the last pass that changes results left it, or
            the original where none does.
        model: the graph after the last pass that left it at level MODEL, which `export` can write.
        pipeline: the passes that ran.
        records: what each of them did.
    """

    module: Module
    reference: Module
    model: Module
    pipeline: tuple[Pass, ...]
    records: list[PassRecord]


def lower(
    module: Module,
    target: str = "cpu",
    format: str = "",
    passes: Passes = None,
    plugins: Plugins = (),
    verify_passes: bool = False,
    after: Callable[[Pass, Module], None] | None = None,
) -> Lowered:
    """Take a copy of `module` to level TARGET.

    Args:
        passes: replaces or edits the target's own pipeline, see `passes.parse_pipeline`; or a sequence of
            such texts and of passes.
        plugins: files that define passes or targets.
        verify_passes: evaluate the graph around every pass and stop at the first that changes a result
            beyond what it declares.
        after: called after every pass.

    Raises:
        PassError: see `passes.run_pipeline`.
        TargetError: the result holds an op that the target declares illegal.
    """
    chosen, _ = parse_target(target, plugins)
    form = chosen.format(format)
    pipeline = choose_pipeline(form, passes, plugins)
    lowered, reference, model = clone(module), [module], [module]

    def then(p: Pass, left: Module) -> None:
        if p.effect().changes:
            reference[0] = clone(left)
        if left.level is Level.MODEL:
            model[0] = clone(left)
        if after:
            after(p, left)

    check = ResultCheck(lowered) if verify_passes else None
    records = run_pipeline(lowered, pipeline, then, check)
    _finish(lowered, chosen, form)
    if not form.emits_parts:
        lowered.parts.clear()
    for part in lowered.parts.values():  # what is done to a text model is none of their business
        run_pipeline(part, tuple(p for p in choose_pipeline(form) if p.name != "plan_memory"))
        _finish(part, chosen, form)
    if form.emits_parts and START in lowered.states:
        lowered.parts["encoder"] = encoder_part(lowered)
    return Lowered(lowered, reference[0], model[0], pipeline, records)


def _finish(lowered: Module, chosen: Target, form: Format) -> None:
    """Declare a module to be at level TARGET; raises `TargetError` where it cannot be."""
    lowered.level = Level.TARGET
    legal = chosen.legal(form.name)
    for op in lowered.ops:
        if op.name not in legal:
            raise TargetError(
                f"{op.name} is not legal here",
                where=f"{chosen.name}, {op.loc}",
                allowed=", ".join(sorted(legal)),
                hint=chosen.elsewhere(op.name, form) or "run the target's own passes: " + form.passes,
            )
        if not form.takes(op):
            raise TargetError(
                f"{op.name} rounds by {op.attrs.get('rule') or op.attrs['rounding']!r}, which format "
                f"{form.name} does not", where=f"{chosen.name}, {op.loc}",
                allowed=", ".join(sorted(form.roundings)), hint="leave out the pass that asks for it",
            )  # fmt: skip
    verify_module(lowered, legal)


def choose_pipeline(form: Format, passes: Passes = None, plugins: Plugins = ()) -> tuple[Pass, ...]:
    """The passes to run: a format's own, or what the user makes of them.

    Raises:
        PassError, ParseError: the text, an option or a plugin is wrong.
    """
    known = known_passes(plugins, required=False)  # a file may bring targets only
    return _edited(parse_pipeline(form.passes, known), passes, known)


def _edited(own: tuple[Pass, ...], passes: Passes, known: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """What a user makes of the pipeline `own`."""
    if passes is None or isinstance(passes, str):
        return own if passes is None else parse_pipeline(passes, known, own)
    out: list[Pass] = []
    for item in passes:
        out += parse_pipeline(item, known, own) if isinstance(item, str) else (item,)
    return tuple(out)


def in_numerics(
    target: Target, arch: Arch, form: Format, numerics: str = "", passes: Passes = None, plugins: Plugins = ()
) -> tuple[str, tuple[Pass, ...]]:
    """The numerics by name ("" is the first that the arch has), and the pipeline to run.

    What numerics put in front stays in front, and the pipeline as they edit it is the one that `passes`
    replaces or edits; see `Target.numerics`.

    Raises:
        UsageError: the arch has no such numerics.
        PassError, ParseError: see `choose_pipeline`.
    """
    offered = target.numerics_of(arch, form)
    numerics = numerics or next(iter(offered))
    if numerics not in offered:
        elsewhere = [a.name for a in target.archs if numerics in target.numerics_of(a, form)]
        raise UsageError(
            f"numerics {numerics!r}", where=f"compile for {target.name}:{arch.name}",
            allowed=", ".join(offered),
            hint=f"{target.name}:{elsewhere[0]} has them" if elsewhere else "dsv4c targets lists them",
        )  # fmt: skip
    known = known_passes(plugins, required=False)
    front, _, edits = f",{offered[numerics]}".partition(",default,")
    own = parse_pipeline(form.passes, known)
    own = parse_pipeline(edits, known, own) if edits else own
    return numerics, (*parse_pipeline(front[1:], known), *_edited(own, passes, known))


def compile(
    source: str | os.PathLike[str] | Module,
    *,
    output: str | os.PathLike[str],
    target: str = "cpu",
    numerics: str = "",
    format: str = "",
    passes: Passes = None,
    plugins: Plugins = (),
    verify_passes: bool = False,
    golden: bool = True,
    devices: int | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compile a checkpoint directory or a module into one artifact file.

    Args:
        target: `name` or `name:arch`, see `dsv4c targets`; "cpu:a+b" is code for both, the weights once.
        numerics: "" is the target's first. "exact" is stored weights dequantised and FP32 arithmetic. "bf16"
            rounds what matrices are multiplied by to BF16 (CPU, format "tvm"), "int8" to INT8 in blocks of 32
            where they are stored as integers or FP4, else to BF16. "reference" rounds where the
            published code does; it has no golden vectors, as ties change every later token. "fast" is what a
            device does best: INT8 on Ascend 910 and MLU, the checkpoint's own FP8 and FP4 with MXFP8 inputs
            on Ascend 950, BF16 on CUDA, as FNUZ on gfx942. "half" is FP16 products on those devices.
        format: "tvm" or "onnx", see `dsv4c targets`; "" is the target's first.
        passes, plugins, verify_passes: see `lower`.
        golden: put a prompt with the evaluator's results into the artifact, for `verify`.
        devices: equal ones that get some of the layers each; None leaves that to the pipeline.
        dump_ir: a directory for the IR text after every pass.

    Returns:
        The path of the artifact, which appears whole or not at all.
    """
    chosen, arch = parse_target(target, plugins)
    form = chosen.format(format)
    numerics, pipeline = in_numerics(chosen, arch, form, numerics, passes, plugins)  # complains early
    pipeline = over_devices(pipeline, devices)
    _check_packages(form)
    report = progress or (lambda what, done, total: None)
    with ArtifactWriter(output) as writer:
        module = source if isinstance(source, Module) else load_checkpoint(source)
        if module.store is None:
            raise CompileError(
                "the module has no weights", where=module.name, hint="load it from a checkpoint"
            )
        started = time.time()
        lowered = lower(module, target, format, pipeline, plugins, verify_passes, _dumper(module, dump_ir))
        there = estimate_artifact(  # complains before the long work
            lowered.model, lowered.module, arch.device, known_devices(plugins), numerics == "exact"
        )
        store = lowered.module.store  # a pass may have laid statistics over the checkpoint's tensors
        assert store is not None
        form.load()(lowered.module, store, writer, arch, report)
        stored = {t.name: (t.dtype, t.nbytes) for t in writer.tensors}
        for name, data in module.assets.items():
            if name != "config":  # what the checkpoint said; the artifact's own facts are in its meta data
                writer.add_section(name, data)
        if golden and "logits" in module.outputs and numerics != "reference":
            write_golden(lowered.reference, writer, report, TOLERANCES[numerics], form.shows_blocks)
        printed = print_pipeline(lowered.pipeline)
        writer.set_meta("target", chosen.name)
        writer.set_meta("arch", arch.facts())
        writer.set_meta("format", form.name)
        writer.set_meta("numerics", numerics)
        writer.set_meta("model", {"name": module.name, **module.meta})
        writer.set_meta("identity", identity(lowered.reference))
        writer.set_meta("parts", list(lowered.module.parts))
        writer.set_meta("step", {"states": _states(lowered.module)})
        seconds = time.time() - started
        facts = compile_report(module, lowered.module, lowered.records, printed, stored, seconds)
        writer.set_meta("report", facts | ({"estimate": there.as_json()} if there else {}))
    return Path(output)


def _dumper(
    module: Module, directory: str | os.PathLike[str] | None
) -> Callable[[Pass, Module], None] | None:
    if directory is None:
        return None
    root, count = Path(directory), [0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / "00-model.ir").write_text(print_module(module))
    except OSError as error:
        raise UsageError(f"cannot write IR text: {error}", where=str(root)) from None

    def after(p: Pass, left: Module) -> None:
        count[0] += 1
        (root / f"{count[0]:02d}-{p.name}.ir").write_text(print_module(left))

    return after


def _check_packages(form: Format) -> None:
    for name, package in form.packages.items():
        if importlib.util.find_spec(name) is None:
            raise ToolchainError(
                f"format {form.name} needs the package {package}", hint='pip install "dsv4c[compile]"'
            )


def _states(module: Module) -> dict[str, Any]:
    return {
        name: {"dtype": v.type.dtype.storage.name, "shape": [str(d) for d in v.type.shape]}
        for name, v in module.states.items()
    }


def identity(module: Module) -> str:
    """A hash that equal checkpoints share: the graph and a sample of the weights' bytes."""
    if module.store is None:
        raise CompileError("the module has no weights", where=module.name, hint="load it from a checkpoint")
    digest = hashlib.sha256(print_module(module).encode())
    sources = sorted(
        {str(s.attr("name")) for op in module.weights() if op.weight for s in op.weight.sources()}
    )
    for name in sources[:: max(1, len(sources) // 64)]:
        digest.update(module.store.read(name).reshape(-1)[:1024].tobytes())
    return digest.hexdigest()


__all__ = ["Lowered", "compile", "evaluate", "export", "identity", "load_checkpoint", "lower"]
