"""Golden vectors: a prompt with the evaluator's results, put into an artifact so that it can check itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.streams import stream_values
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.images import ImagePlan
from dsv4c.runtime.images.rows import ImageFeed
from dsv4c.runtime.images.tower import tower_indices

from .base import Progress
from .undecided import SHADOWS, ShadowedEvaluator, rounds, undecided_rows

GOLDEN_CALLS = (17, 1, 1, 1, 8)
"""How the golden prompt is cut into calls: a chunk, single tokens, and a chunk after them."""


TOLERANCES = {"exact": 1e-4, "half": 5e-3, "bf16": 2e-2, "fp8": 2e-2, "int8": 2e-2, "fast": 2e-2}
"""Where numbers are rounded, sums in another order may fall on the other side of a step, and later tokens
and layers inherit it. A step is 1/127 of the largest input of a token in INT8, 1/8 of a number in FP8, and
1/1024 of it in FP16."""


GOLDEN_IMAGE = (5, 11)
"""Positions of the golden prompt that are of an image, where the model takes images."""
GOLDEN_GRID = (4, 5)
"""Patches down and across of the golden image."""
_SEED = 20260424


def golden_tokens(vocab: int, image_token: int = -1) -> npt.NDArray[np.int32]:
    """The golden prompt: pseudo-random ids, the same for every build of a model."""
    count = sum(GOLDEN_CALLS)
    tokens = np.random.default_rng(_SEED).integers(0, vocab, count).astype(np.int32)
    if image_token >= 0:
        tokens[tokens == image_token] = (image_token + 1) % vocab
        tokens[slice(*GOLDEN_IMAGE)] = image_token
    return tokens


def golden_images(module: Module, tokens: npt.NDArray[np.int32]) -> ImageFeed:
    """Made-up embeddings of the image positions, as large as those of text."""
    token, width = _vision(module)["placeholder"], int(module.meta["hidden_size"])  # type: ignore[call-overload]
    rows = np.random.default_rng(_SEED).standard_normal((GOLDEN_IMAGE[1] - GOLDEN_IMAGE[0], width))
    return ImageFeed([0.02 * rows], tokens[None], np.array([len(tokens)]), token, width)


def _vision(module: Module) -> dict[str, int]:
    found = module.meta["vision"]
    assert isinstance(found, dict)
    return found


def write_golden(
    module: Module, writer: ArtifactWriter, progress: Progress, tolerance: float, blocks: bool = False
) -> None:
    """Tokens, logits after each, and the state they leave, by the evaluator in float32.

    Where the module rounds, also which positions are left undecided, see `undecided.py`.

    Args:
        module: a model of tokens, at any level; the meaning that the artifact is held to.
        tolerance: largest difference over the range of the values that `verify` accepts.
        blocks: also the residual streams after every layer, for artifacts that can show theirs.
    """
    vocab = module.meta["vocab_size"]
    assert isinstance(vocab, int)
    takes_images = "images" in module.inputs
    tokens, at = golden_tokens(vocab, _vision(module)["placeholder"] if takes_images else -1), 0
    feed = golden_images(module, tokens) if takes_images else None
    streams = {v: layer for layer, v in stream_values(module).items()} if blocks else {}
    evaluator = ShadowedEvaluator(module, SHADOWS if rounds(module) else 0, streams, _SEED)
    batch = evaluator.batch
    state, logits = evaluator.fresh_state(B=batch, ctx=len(tokens)), []
    for index, count in enumerate(GOLDEN_CALLS):
        progress("golden vectors", index, len(GOLDEN_CALLS))
        fed = {"tokens": tokens[None, at : at + count], "n_valid": np.array([count])}
        fed["rows"] = np.arange(count)[None]
        if feed is not None:
            given = feed.take(fed["tokens"].astype(np.int32), fed["n_valid"].astype(np.int32))
            fed |= {"images": given.rows, "n_images": given.counts}
        step = evaluator({name: np.repeat(array, batch, axis=0) for name, array in fed.items()}, state)
        state, at = step.state, at + count
        logits.append(step.outputs["logits"])
    progress("golden vectors", len(GOLDEN_CALLS), len(GOLDEN_CALLS))
    found = {f"state.{name}": array for name, array in state.items()}
    found |= {f"block.{streams[v]}": np.concatenate(parts, axis=1) for v, parts in evaluator.seen.items()}
    found["logits"] = np.concatenate(logits, axis=1)
    _add(writer, "golden.tokens", tokens)
    for name, array in found.items():
        _add(writer, f"golden.{name}", array[:1] if name.startswith("state.") else array[0])
    if feed is not None:
        _add(writer, "golden.images", feed.all_rows(0))
    if "vision" in module.parts:
        _write_tower(module, writer)
    undecided = {n: undecided_rows(a, evaluator.chose_otherwise, tolerance) for n, a in found.items()}
    writer.set_meta("golden", {
        "calls": list(GOLDEN_CALLS), "tolerance": tolerance, "grid": list(GOLDEN_GRID),
        "undecided": {name: asdict(left) for name, left in undecided.items() if left.rows},
    })  # fmt: skip


def _write_tower(module: Module, writer: ArtifactWriter) -> None:
    """A made-up image: its patches, and the rows of its span."""
    down, across = GOLDEN_GRID
    cell = _vision(module)["downsample"]
    plan = ImagePlan(0, 0, down, across, -(-down // cell), -(-across // cell))
    width = 3 * _vision(module)["patch_size"] ** 2
    patches = np.random.default_rng(_SEED).uniform(-1, 1, (down * across, width)).astype(np.float32)
    names = ("patches", "places", "cells", "layout")
    inputs = dict(zip(names, [patches[None], *tower_indices(plan, cell)], strict=True))
    outputs = Evaluator(module.parts["vision"], module.store, keep_weights=False)(inputs, {}).outputs
    _add(writer, "golden.vision.patches", patches)
    _add(writer, "golden.vision.rows", outputs["rows"][0].astype(np.float32))


def _add(writer: ArtifactWriter, name: str, array: npt.NDArray[Any]) -> None:
    dtype = {"int32": "i32", "float32": "f32"}[array.dtype.name]
    writer.add_tensor(name, dtype, array.shape, [np.ascontiguousarray(array)])
