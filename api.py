"""The Python API: checkpoint -> module -> artifact, evaluation, and verification.

The one place that knows the front end, the passes, the targets and the runtime together.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CompileError, TargetError, ToolchainError, UsageError
from dsv4c.frontend.checkpoint import open_checkpoint
from dsv4c.frontend.model import build_model
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.text import print_module
from dsv4c.ir.verify import verify as verify_module
from dsv4c.passes import Pass, PassRecord, parse_pipeline, print_pipeline, run_pipeline
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.targets import Arch, Format, Target, parse_target

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

GOLDEN_CALLS = (17, 1, 1, 1, 8)
"""How the golden prompt is cut into calls: a chunk, single tokens, and a chunk after them."""


def load_checkpoint(path: str | os.PathLike[str]) -> Module:
    """Read a DeepSeek-V4 checkpoint directory, in any of its spellings, into a MODEL-level module.

    Weights stay on disk as lazy expressions.

    Raises:
        ConfigError, CheckpointError: what is wrong with the directory.
    """
    checkpoint = open_checkpoint(Path(path))
    module = build_model(checkpoint.config, checkpoint.weight)
    module.store = checkpoint.files
    if checkpoint.tokenizer_path is not None:
        module.assets["tokenizer"] = checkpoint.tokenizer_path.read_bytes()
    verify_module(module)
    return module


def evaluate(
    module: Module,
    tokens: npt.ArrayLike,
    n_valid: npt.ArrayLike | None = None,
    precision: npt.DTypeLike = np.float32,
) -> npt.NDArray[Any]:
    """The logits of a module by its meaning in NumPy, from a fresh state.

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
    rows = np.tile(np.arange(batch.shape[1]), (len(batch), 1))
    state = evaluator.fresh_state(B=len(batch), ctx=batch.shape[1])
    logits = evaluator({"tokens": batch, "n_valid": valid, "rows": rows}, state).outputs["logits"]
    return logits[0] if ids.ndim == 1 else logits


def lower(
    module: Module,
    target: str = "cpu",
    format: str = "tvm",
    passes: str | None = None,
    after: Callable[[Pass, Module], None] | None = None,
) -> tuple[Module, list[PassRecord]]:
    """A copy of `module` at level TARGET, and what each pass did.

    Args:
        passes: a pipeline instead of the target's own.
        after: called after every pass.

    Raises:
        TargetError: the result holds an op that the target declares illegal.
    """
    chosen, _ = parse_target(target)
    pipeline = parse_pipeline(passes if passes is not None else chosen.format(format).passes)
    lowered = clone(module)
    records = run_pipeline(lowered, pipeline, after)
    lowered.level = Level.TARGET
    legal = chosen.legal(format)
    for op in lowered.ops:
        if op.name not in legal:
            raise TargetError(
                f"{op.name} is not legal here",
                where=f"{chosen.name}, {op.loc}",
                allowed=", ".join(sorted(legal)),
                hint="run the target's own passes: " + chosen.format(format).passes,
            )
    verify_module(lowered, legal)
    return lowered, records


def compile(
    source: str | os.PathLike[str] | Module,
    *,
    output: str | os.PathLike[str],
    target: str = "cpu",
    numerics: str = "exact",
    format: str = "tvm",
    passes: str | None = None,
    golden: bool = True,
    dump_ir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compile a checkpoint directory or a module into one artifact file.

    Args:
        target: `name` or `name:arch`, see `dsv4c targets`.
        numerics: only "exact" so far: stored weights dequantised, FP32 arithmetic.
        format: "tvm" or "onnx".
        passes: a pipeline instead of the target's own.
        golden: put a prompt with the evaluator's results into the artifact, for `verify`.
        dump_ir: a directory for the IR text after every pass.

    Returns:
        The path of the artifact, which appears whole or not at all.
    """
    chosen, arch = parse_target(target)
    form = chosen.format(format)
    if numerics not in chosen.numerics:
        raise UsageError(f"numerics {numerics!r}", where="compile", allowed=", ".join(chosen.numerics))
    _check_packages(form)
    report = progress or (lambda what, done, total: None)
    parse_pipeline(passes if passes is not None else form.passes)  # complains before any long work
    with ArtifactWriter(output) as writer:
        module = source if isinstance(source, Module) else load_checkpoint(source)
        if module.store is None:
            raise CompileError(
                "the module has no weights", where=module.name, hint="load it from a checkpoint"
            )
        started = time.time()
        lowered, records = lower(module, target, format, passes, _dumper(module, dump_ir))
        form.load()(lowered, module.store, writer, arch, report)
        for name, data in module.assets.items():
            writer.add_section(name, data)
        if golden:
            _write_golden(module, writer, report)
        pipeline = passes if passes is not None else form.passes
        _write_meta(
            module, lowered, writer, chosen, arch, form, numerics, pipeline, records, time.time() - started
        )
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


def _write_meta(
    module: Module,
    lowered: Module,
    writer: ArtifactWriter,
    target: Target,
    arch: Arch,
    form: Format,
    numerics: str,
    pipeline: str,
    records: list[PassRecord],
    seconds: float,
) -> None:
    states = {
        name: {"dtype": v.type.dtype.storage.name, "shape": [str(d) for d in v.type.shape]}
        for name, v in module.states.items()
    }
    writer.set_meta("format", form.name)
    writer.set_meta("target", target.name)
    writer.set_meta("arch", {"name": arch.name, "machine": arch.machine, "requires": list(arch.requires)})
    writer.set_meta("numerics", numerics)
    writer.set_meta("model", {"name": module.name, **module.meta})
    writer.set_meta("identity", _identity(module))
    writer.set_meta("step", {"states": states})
    writer.set_meta(
        "report",
        {
            "pipeline": print_pipeline(parse_pipeline(pipeline)),
            "passes": [vars(r) for r in records],
            "ops": {"MODEL": len(module.ops), "TARGET": len(lowered.ops)},
            "seconds": round(seconds, 3),
            "compiled_on": platform.machine(),
        },
    )


def _identity(module: Module) -> str:
    """A hash that equal checkpoints share: the graph and a sample of the weights' bytes."""
    assert module.store is not None
    digest = hashlib.sha256(print_module(module).encode())
    sources = sorted(
        {str(s.attr("name")) for op in module.weights() if op.weight for s in op.weight.sources()}
    )
    for name in sources[:: max(1, len(sources) // 64)]:
        digest.update(module.store.read(name).reshape(-1)[:1024].tobytes())
    return digest.hexdigest()


def golden_tokens(vocab: int) -> npt.NDArray[np.int32]:
    """The golden prompt: pseudo-random ids, the same for every build of a model."""
    count = sum(GOLDEN_CALLS)
    return np.random.default_rng(20260424).integers(0, vocab, count).astype(np.int32)


def _write_golden(module: Module, writer: ArtifactWriter, progress: Progress) -> None:
    """Tokens, logits after each, and the state they leave, by the evaluator over the MODEL graph."""
    vocab = module.meta["vocab_size"]
    assert isinstance(vocab, int)
    tokens, at = golden_tokens(vocab), 0
    evaluator = Evaluator(module, keep_weights=False)
    state, logits = evaluator.fresh_state(B=1, ctx=len(tokens)), []
    for index, count in enumerate(GOLDEN_CALLS):
        progress("golden vectors", index, len(GOLDEN_CALLS))
        rows = np.arange(count)[None]
        step = evaluator(
            {"tokens": tokens[None, at : at + count], "n_valid": np.array([count]), "rows": rows}, state
        )
        state, at = step.state, at + count
        logits.append(step.outputs["logits"][0])
    progress("golden vectors", len(GOLDEN_CALLS), len(GOLDEN_CALLS))
    _add(writer, "golden.tokens", tokens)
    _add(writer, "golden.logits", np.concatenate(logits).astype(np.float32))
    for name, array in state.items():
        _add(writer, f"golden.state.{name}", array)
    writer.set_meta("golden", {"calls": list(GOLDEN_CALLS), "tolerance": 1e-4})


def _add(writer: ArtifactWriter, name: str, array: npt.NDArray[Any]) -> None:
    dtype = {"int32": "i32", "float32": "f32"}[array.dtype.name]
    writer.add_tensor(name, dtype, array.shape, [np.ascontiguousarray(array)])


__all__ = ["compile", "evaluate", "load_checkpoint", "lower"]
