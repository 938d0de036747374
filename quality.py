"""Measuring models: how text uses a checkpoint's experts, what a change costs, and in which layer it shows.

Ties the compiler to the runtime, as `api` does. What needs artifacts alone is in `runtime.quality`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dsv4c import api
from dsv4c.errors import CompileError, EvalError, UsageError
from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.streams import stream_values
from dsv4c.passes import Pass
from dsv4c.passes.instrument import PREFIX, InstrumentInputs
from dsv4c.passes.prune_experts import PruneExperts
from dsv4c.passes.requantise import STATISTIC
from dsv4c.passes.statistics import ExpertUsage, Statistics
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.container import amend_meta
from dsv4c.runtime.corpus import Ids, Text, documents, windows
from dsv4c.runtime.quality import Likelihood, Progress, Quality, compare, perplexity
from dsv4c.runtime.session import DEFAULT_CHUNK, DEFAULT_CONTEXT
from dsv4c.targets import parse_target
from dsv4c.targets.golden import golden_tokens

Arr = npt.NDArray[Any]
PASSES = "after(fuse_expert_gemms, instrument_inputs), after(fuse_expert_gemms, instrument_experts)"
"""Edits a target's own pipeline; see `passes.parse_pipeline`."""


# ---------------------------------------------------------------------------------- calibration


def calibrate(
    source: str | os.PathLike[str] | Module,
    *texts: Text,
    target: str = "cpu",
    context: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    threads: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Count how texts use a checkpoint's experts and what its matrices are fed, by its compiled model.

    Every window of `context` positions starts from a fresh state, with the model's beginning-of-sequence
    token where it has one, which counts like any other. Tokens are counted exactly; gates, saliencies
    and squares are summed in float32 over one call of at most `chunk` tokens and in float64 from there on.

    Args:
        source: a checkpoint directory, or a MODEL-level module with its weights.
        texts: documents, as text or as token ids; no window spans two.
        target: `name` or `name:arch` of a machine that this one can run.
        context: positions of a window; None is the smaller of the model's maximum and 4096.
        max_tokens: of text to take; None takes all.
        progress: called with (what, done, total), also by the compilation.

    Returns:
        The statistics; `extra["tokens"]` int64 [vocab] says how often each token was fed,
        `extra["mean_square.<location>"]` float32 [K] the mean square of every column that a matrix is
        multiplied with (see `passes.instrument.InstrumentInputs` for which), as `requantise` reads it.

    Raises:
        UsageError: a text is empty or not ids of the vocabulary, or text for a checkpoint without a
            tokenizer; context or chunk out of range; no routed experts.
    """
    module = source if isinstance(source, Module) else api.load_checkpoint(source)
    if not any(op.name in ("dispatch", "expert_mlp") for op in module.ops):
        raise UsageError("has no routed experts", where=module.name, hint="there is nothing to calibrate")
    vocab, longest, bos = (_fact(module, name) for name in ("vocab_size", "max_positions", "bos"))
    assert vocab is not None and longest is not None
    length = min(longest, DEFAULT_CONTEXT) if context is None else context
    for name, value, most in (("context", length, longest), ("chunk", chunk, None)):
        if value < 1 or (most is not None and value > most):
            raise UsageError(
                f"{name} = {value}", where="calibrate", allowed=f"1 to {most}" if most else "1 or more"
            )
    ids = documents(texts, lambda: _tokenizer(module), vocab, bos, max_tokens)
    with tempfile.TemporaryDirectory(prefix="dsv4c-") as folder:
        path = Path(folder) / "instrumented.dsv4"
        api.compile(module, output=path, target=target, passes=PASSES, golden=False, progress=progress)
        session = Session(path, context=length, threads=threads)
        measured = Artifact.open(path).meta["report"]["notes"][InstrumentInputs.name]["states"]
        given = list(windows(ids, length, bos))
        return _count(session, api.identity(module), given, chunk, measured, progress)


def _fact(module: Module, name: str) -> int | None:
    found = module.meta.get(name)
    if found is not None and not isinstance(found, int):
        raise CompileError(f"{name} is {found!r}", where=module.name, hint="load it from a checkpoint")
    return found


def _tokenizer(module: Module) -> Tokenizer:
    if "tokenizer" not in module.assets:
        raise UsageError(
            "the checkpoint has no tokenizer", where=module.name, allowed="token ids",
            hint="put tokenizer.json into the checkpoint directory, or use --ids",
        )  # fmt: skip
    try:
        return Tokenizer.from_buffer(module.assets["tokenizer"])
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"the tokenizer does not load: {error}", where=module.name) from error


def _count(
    session: Session, identity: str, texts: Sequence[Ids], chunk: int, measured: Mapping[str, Sequence[str]],
    progress: Progress | None,
) -> Statistics:  # fmt: skip
    """Feed every window and take the counts out of the state after every call.

    Args:
        measured: state of sums of squares -> the locations of the weights that are fed so.
    """
    names = [name for name in session.state if name.startswith(PREFIX) or name in measured]
    sums = {name: np.zeros(session.state[name].shape, np.float64) for name in names}
    report = progress or (lambda what, done, total: None)
    seen = _TokenCounts(int(session.model["vocab_size"]))
    done, total = 0, sum(len(ids) for ids in texts)
    for ids in texts:
        session.reset()
        for at in range(0, len(ids), chunk):
            report("calibration", done, total)
            part = ids[at : at + chunk]
            session.prefill([part.tolist()], chunk)
            for name in names:  # float32 would stop counting at 2^24
                sums[name] += session.state[name]
                session.state[name][...] = 0
            seen.add(part)
            done += len(part)
    report("calibration", total, total)
    usage = {
        name.removeprefix(PREFIX): ExpertUsage(s[:, 0].astype(np.int64), s[:, 1].copy(), s[:, 2].copy())
        for name, s in sums.items()
        if name.startswith(PREFIX)
    }
    squares = {
        STATISTIC + loc: (sums[name] / max(total, 1)).astype(np.float32)
        for name, locs in measured.items()
        for loc in locs
    }
    return Statistics(identity, len(seen.counts), total, usage, seen.extra() | squares)


class _TokenCounts:
    """What is counted of the tokens themselves, without the model; counts of table rows would go here too."""

    def __init__(self, vocab: int) -> None:
        self.counts = np.zeros(vocab, np.int64)

    def add(self, ids: Ids) -> None:
        np.add.at(self.counts, ids, 1)

    def extra(self) -> dict[str, Arr]:
        return {"tokens": self.counts}


# ------------------------------------------------------------------------------- error by layer


def error_by_layer(
    reference: Module, other: Module, tokens: npt.ArrayLike, precision: npt.DTypeLike = np.float32
) -> list[dict[str, Any]]:
    """Where two graphs of one model drift apart: the residual streams after every block, then the logits.

    Both are evaluated by their meaning on the same prompt from a fresh state. `max` and `rms` are the largest
    and the root mean square difference over the range of the reference's value.

    Args:
        reference, other: modules at any level, with their weights.
        tokens: [T] integers.
        precision: np.float32 or np.float64.

    Returns:
        {"layer", "max", "rms"} per block, `layer` as "layers.3", and a last one for "logits".

    Raises:
        EvalError: the blocks of the two do not correspond.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise EvalError(f"tokens are {ids.dtype}{list(ids.shape)}", where="error_by_layer", allowed="ids [T]")
    want, got = (_streams(module, ids, precision) for module in (reference, other))
    if want.keys() != got.keys():
        raise EvalError(
            f"{other.name} has the blocks {', '.join(got)}", where="error_by_layer",
            allowed=f"those of the reference: {', '.join(want)}",
        )  # fmt: skip
    return [{"layer": name, **_error(want[name], got[name])} for name in want]


def _streams(module: Module, ids: Arr, precision: npt.DTypeLike) -> dict[str, Arr]:
    """The streams after every block by its layer, and the logits."""
    evaluator = Evaluator(module, precision=precision, keep_weights=False)
    length = len(ids)
    inputs = api.text_inputs(module, ids[None], np.array([length]))
    step = evaluator(inputs, evaluator.fresh_state(B=1, ctx=length), trace=True)
    values = {v: r for op, results in step.trace.items() for v, r in zip(op.results, results, strict=True)}
    found = {layer: values[v] for layer, v in stream_values(module).items()}
    return found | {"logits": step.outputs["logits"]}


def _error(want: Arr, got: Arr) -> dict[str, float]:
    gap = got.astype(np.float64) - want
    if not np.isfinite(gap).all():
        return {"max": float("inf"), "rms": float("inf")}
    span = float(np.ptp(want)) or 1.0
    return {"max": float(np.abs(gap).max()) / span, "rms": float(np.sqrt(np.mean(gap * gap))) / span}


# ------------------------------------------------------------------------------ measured compiling


def compile_measured(
    source: str | os.PathLike[str] | Module,
    *texts: Text,
    output: str | os.PathLike[str],
    random_seeds: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """`api.compile`, and into the report what its passes cost on held-out text.

    The same target's own pipeline in exact numerics is compiled beside it and both run over the texts; the
    report gets `quality` (see `Quality.to_json`) and `error_by_layer`. The artifact appears when all is done.

    Args:
        texts: held-out text, or token ids.
        random_seeds: also compile this many variants whose `prune_experts` chooses at random, and put their
            perplexities into `quality["random"]`.
        options: of `api.compile`.

    Raises:
        UsageError: `random_seeds` without a `prune_experts` in the pipeline.
    """
    module = source if isinstance(source, Module) else api.load_checkpoint(source)
    path = Path(output)
    chosen: dict[str, Any] = {k: options[k] for k in ("target", "format", "plugins") if k in options}
    plugins = options.get("plugins", ())
    target, arch = parse_target(options.get("target", "cpu"), plugins)
    form, numerics = target.format(options.get("format", "")), options.get("numerics", "")
    _, asked = api.in_numerics(target, arch, form, numerics, options.get("passes"), plugins)
    lowered = api.lower(module, **chosen, passes=asked)
    chosen["numerics"] = "exact"  # the baseline; a variant's passes hold what its numerics put in front
    variants = [_at_random(lowered.pipeline, seed) for seed in range(random_seeds)]
    with tempfile.TemporaryDirectory(prefix=".dsv4c-", dir=path.parent) as folder:
        before, after = Path(folder) / "before.dsv4", Path(folder) / path.name
        api.compile(module, output=after, progress=progress, **options)
        api.compile(module, output=before, golden=False, progress=progress, **chosen)
        found: dict[str, Any] = compare(before, after, *texts, threads=threads, progress=progress).to_json()
        found["random"] = []
        for passes in variants:
            api.compile(module, output=before, passes=passes, golden=False, progress=progress, **chosen)
            found["random"].append(perplexity(before, *texts, threads=threads, progress=progress).perplexity)
        prompt = golden_tokens(int(module.meta["vocab_size"]))  # type: ignore[call-overload]
        report = Artifact.open(after).meta["report"]
        errors = error_by_layer(module, lowered.reference, prompt)
        amend_meta(after, {"report": {**report, "quality": found, "error_by_layer": errors}})
        os.replace(after, path)
    return path


def _at_random(pipeline: Sequence[Pass], seed: int) -> list[Pass]:
    """The pipeline with its pruning replaced by one of equal size by chance."""
    out = [
        PruneExperts("random", keep=p.keep, scope=p.scope, layers=p.layers, seed=seed)
        if isinstance(p, PruneExperts) else p
        for p in pipeline
    ]  # fmt: skip
    if list(pipeline) == out:
        raise UsageError("random_seeds without a pruning", where="compile", allowed="a prune_experts pass")
    return out


__all__ = [
    "Likelihood", "Quality", "calibrate", "compare", "compile_measured", "error_by_layer", "perplexity",
    "stream_values",
]  # fmt: skip
