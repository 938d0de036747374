"""A whole model by its launch plan, every launch in Triton's interpreter: logits and states of the evaluator.

Nothing of what would run on a GPU is left out but the machine code: the plan is read from the artifact,
checked at each size, its temporaries share slots of one arena that begins as NaN, and every access is held to
its parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_support import GOLDEN, Interpreter, interpreter, lowered, write_draft
from support import Arr, assert_close, ints, valid_rows

from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.targets.gpu.ops import PLAN_PIPELINE

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle

Call = tuple[Arr, Arr]
"""(tokens [B,T], n_valid [B])."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Interpreter]:
    with interpreter() as running:
        yield running


def run(worker: Interpreter, module: Module, path: Path, calls: list[Call], tolerance: float) -> None:
    """Every call by the plan and by the evaluator, each with its own states."""
    artifact = write_draft(module, module.store, path)
    evaluator = Evaluator(module, precision=np.float32)
    wanted = evaluator.fresh_state(B=len(calls[0][1]), ctx=64)
    state = {name: np.array(value) for name, value in wanted.items()}
    given = []
    for tokens, n_valid in calls:
        rows = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
        given.append({"tokens": tokens.astype(np.int32), "n_valid": n_valid, "rows": rows})
    for inputs in given:
        ((outputs, state),) = worker.run(artifact, [(inputs, state)])
        step = evaluator(inputs, wanted)
        wanted, real = step.state, valid_rows(inputs["n_valid"], inputs["tokens"].shape[1])
        assert_close("logits", outputs["logits"][real], step.outputs["logits"][real], tolerance)
        for name, value in wanted.items():
            assert_close(name, state[name], value, tolerance)


def tokens(rng: np.random.Generator, b: int, t: int) -> Arr:
    found: Arr = rng.integers(2, 320, (b, t))
    return found


def test_a_prompt_and_a_token_behind_it(worker: Interpreter, tmp_path: Path) -> None:
    """Eighteen tokens at once by the program for many rows, which close groups of 4 and of 16; one by that
    for few.
    """
    rng = np.random.default_rng(0)
    calls = [(tokens(rng, 1, 18), ints(18)), (tokens(rng, 1, 1), ints(1))]
    run(worker, lowered(GOLDEN / "v4_r16"), tmp_path / "m.dsv4", calls, 2e-5)


def test_two_sequences_of_different_lengths(worker: Interpreter, tmp_path: Path) -> None:
    """Rows of a batch stand at different positions, and one sits out."""
    rng = np.random.default_rng(1)
    calls = [
        (tokens(rng, 2, 4), ints(4, 2)),
        (tokens(rng, 2, 2), ints(0, 2)),
        (tokens(rng, 2, 1), ints(1, 1)),
    ]
    run(worker, lowered(GOLDEN / "v4"), tmp_path / "m.dsv4", calls, 2e-5)


def test_numbers_in_bf16(worker: Interpreter, tmp_path: Path) -> None:
    """Inputs of products rounded to BF16: one product on the matrix units in place of three.

    A value that falls to the other side of a tie moves what follows by an ulp of BF16.
    """
    from dsv4c import api
    from dsv4c.ir.levels import Level

    module = api.load_checkpoint(GOLDEN / "v4")
    text = PLAN_PIPELINE.replace(",merge_projections", ',quantise_activations{rule="bf16"},merge_projections')
    run_pipeline(module, parse_pipeline(text))
    module.level = Level.TARGET
    rng = np.random.default_rng(2)
    run(worker, module, tmp_path / "m.dsv4", [(tokens(rng, 1, 2), ints(2))], 4e-3)
