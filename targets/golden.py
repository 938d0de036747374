"""Golden vectors: a prompt with the evaluator's results, put into an artifact so that it can check itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.streams import stream_values
from dsv4c.runtime.container import ArtifactWriter

from .base import Progress

GOLDEN_CALLS = (17, 1, 1, 1, 8)
"""How the golden prompt is cut into calls: a chunk, single tokens, and a chunk after them."""


TOLERANCES = {"exact": 1e-4, "half": 1e-2, "fast": 2e-2}
"""Where inputs are rounded to INT8, sums in another order may fall on the other side of a
step, which is 1/127 of the largest input of a token, and later tokens and layers inherit it."""


def golden_tokens(vocab: int) -> npt.NDArray[np.int32]:
    """The golden prompt: pseudo-random ids, the same for every build of a model."""
    count = sum(GOLDEN_CALLS)
    return np.random.default_rng(20260424).integers(0, vocab, count).astype(np.int32)


def write_golden(
    module: Module, writer: ArtifactWriter, progress: Progress, tolerance: float, blocks: bool = False
) -> None:
    """Tokens, logits after each, and the state they leave, by the evaluator in float32.

    Args:
        module: a model of tokens, at any level; the meaning that the artifact is held to.
        tolerance: largest difference over the range of the values that `verify` accepts.
        blocks: also the residual streams after every layer, for artifacts that can show theirs.
    """
    vocab = module.meta["vocab_size"]
    assert isinstance(vocab, int)
    tokens, at = golden_tokens(vocab), 0
    evaluator = Evaluator(module, keep_weights=False)
    state, logits = evaluator.fresh_state(B=1, ctx=len(tokens)), []
    streams = {v: layer for layer, v in stream_values(module).items()} if blocks else {}
    seen: dict[str, list[npt.NDArray[Any]]] = {layer: [] for layer in streams.values()}
    for index, count in enumerate(GOLDEN_CALLS):
        progress("golden vectors", index, len(GOLDEN_CALLS))
        rows = np.arange(count)[None]
        fed = {"tokens": tokens[None, at : at + count], "n_valid": np.array([count]), "rows": rows}
        step = evaluator(fed, state, trace=blocks)
        for op, results in step.trace.items():
            for value, array in zip(op.results, results, strict=True):
                if value in streams:
                    seen[streams[value]].append(array[0])
        state, at = step.state, at + count
        logits.append(step.outputs["logits"][0])
    progress("golden vectors", len(GOLDEN_CALLS), len(GOLDEN_CALLS))
    _add(writer, "golden.tokens", tokens)
    _add(writer, "golden.logits", np.concatenate(logits).astype(np.float32))
    for name, array in state.items():
        _add(writer, f"golden.state.{name}", array)
    for layer, parts in seen.items():
        _add(writer, f"golden.block.{layer}", np.concatenate(parts).astype(np.float32))
    writer.set_meta("golden", {"calls": list(GOLDEN_CALLS), "tolerance": tolerance})


def _add(writer: ArtifactWriter, name: str, array: npt.NDArray[Any]) -> None:
    dtype = {"int32": "i32", "float32": "f32"}[array.dtype.name]
    writer.add_tensor(name, dtype, array.shape, [np.ascontiguousarray(array)])
