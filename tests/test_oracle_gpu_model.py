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
from gpu_support import GOLDEN, Interpreter, in_numerics, interpreter, lowered, write_draft
from support import Arr, assert_close, ints, normal, valid_rows

from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.runtime.images import ImagePlan
from dsv4c.runtime.images.rows import ImageFeed, no_images
from dsv4c.runtime.images.tower import tower_indices
from dsv4c.targets.gpu.ops import PLAN_PIPELINE

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle

Call = tuple[Arr, Arr]
"""(tokens [B,T], n_valid [B])."""
IMAGE = 510
"""The image token of the golden checkpoint of V4.1."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Interpreter]:
    with interpreter() as running:
        yield running


def run(
    worker: Interpreter, module: Module, path: Path, calls: list[Call], tolerance: float,
    images: ImageFeed | None = None, arch: str = "sm_90a",
) -> None:  # fmt: skip
    """Every call by the plan and by the evaluator, each with its own states; `images` are those of all calls.
    """
    artifact = write_draft(module, module.store, path, arch)
    evaluator = Evaluator(module, precision=np.float32)
    wanted = evaluator.fresh_state(B=len(calls[0][1]), ctx=64)
    state = {name: np.array(value) for name, value in wanted.items()}
    given = []
    for tokens, n_valid in calls:
        rows = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
        given.append({"tokens": tokens.astype(np.int32), "n_valid": n_valid, "rows": rows})
        if "images" in module.inputs:
            taken = images.take(tokens, n_valid) if images else no_images(len(tokens), 128)
            given[-1] |= {"images": taken.rows, "n_images": taken.counts}
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


@pytest.mark.parametrize(
    ("numerics", "arch"),
    [("fp8", "sm_90a"), pytest.param("fp8", "sm_80", marks=pytest.mark.matrix), ("int8", "sm_90a")],
)
def test_numbers_in_codes(worker: Interpreter, tmp_path: Path, numerics: str, arch: str) -> None:
    """A value near a tie may become the code on its other side: an eighth of it in E4M3, and what follows."""
    rng, module = np.random.default_rng(2), in_numerics(numerics, "cuda:sm_90a")
    run(worker, module, tmp_path / "m.dsv4", [(tokens(rng, 1, 2), ints(2))], 4e-3, arch=arch)


# ------------------------------------------------------------------------------------------- V4.1


@pytest.fixture(scope="module")
def v41() -> Module:
    return lowered(GOLDEN / "v41")


def prompt(name: str) -> tuple[Arr, Arr]:
    """The ids [T] of a golden prompt, and the rows of its image tokens."""
    with np.load(GOLDEN / name / "golden.npz") as file:
        ids = file["input_ids"].astype(np.int32)
        return ids, np.asarray(file["embeddings"][ids == IMAGE], np.float32)


def cut(ids: Arr, sizes: list[int]) -> list[Call]:
    ends = np.cumsum(sizes)
    return [(ids[None, end - n : end], ints(n)) for n, end in zip(sizes, ends, strict=True)]


def test_a_text_of_v41(worker: Interpreter, v41: Module, tmp_path: Path) -> None:
    """Latents of one and of two tokens, candidate blocks that leave entries out, n-grams across calls."""
    ids, rows = prompt("v41_text")
    assert not len(rows)
    run(worker, v41, tmp_path / "m.dsv4", cut(ids, [23, 1, 2]), 2e-5)


@pytest.mark.matrix
def test_an_image_of_v41(worker: Interpreter, v41: Module, tmp_path: Path) -> None:
    """A call ends inside the image, whose rows stand for its tokens and which other experts serve."""
    ids, rows = prompt("v41")
    first, last = np.flatnonzero(ids == IMAGE)[[0, -1]]
    sizes = [int(first) + 2, int(last - first), 1]
    feed = ImageFeed([rows], ids[None], np.array([len(ids)]), IMAGE, rows.shape[1])
    assert first > 0 and last - first > 3 and sum(sizes) <= len(ids)
    run(worker, v41, tmp_path / "m.dsv4", cut(ids, sizes), 2e-5, feed)


@pytest.mark.matrix
def test_sequences_of_v41_with_an_image_and_a_text(worker: Interpreter, v41: Module, tmp_path: Path) -> None:
    """Side by side, of different lengths; ratio 2 leaves a token of one sequence open."""
    (ids, rows), (text, _) = prompt("v41"), prompt("v41_text")
    at = int(np.flatnonzero(ids == IMAGE)[0]) - 1
    both = np.stack([ids[at : at + 9], text[:9]])
    n_valid = ints(9, 4)
    count = int((both[0] == IMAGE).sum())
    feed = ImageFeed([rows[:count], rows[:0]], both, n_valid, IMAGE, rows.shape[1])
    more = np.stack([text[:2], text[4:6]])
    run(worker, v41, tmp_path / "m.dsv4", [(both, n_valid), (more, ints(0, 2))], 2e-5, feed)


def test_the_image_encoder_of_v41(worker: Interpreter, v41: Module, tmp_path: Path) -> None:
    """Patches to the rows of a span, of a grid that fills no cell; then one of another size."""
    artifact, rng = write_draft(v41, v41.store, tmp_path / "m.dsv4"), np.random.default_rng(4)
    part = v41.parts["vision"]
    evaluator = Evaluator(part, v41.store, np.float32)
    calls = []
    for down, across in ((4, 5), (2, 3)):
        plan = ImagePlan(0, 0, down, across, -(-down // 3), -(-across // 3))
        arrays = [normal(rng, 1, down * across, 588), *tower_indices(plan, 3)]
        calls.append((dict(zip(part.inputs, arrays, strict=True)), {}))
    for (inputs, _), (found, _) in zip(calls, worker.run(artifact, calls, "vision"), strict=True):
        want = evaluator(inputs, {}).outputs
        assert set(found) == set(want)
        for name, value in want.items():
            assert_close(name, found[name], value, 2e-5)


@pytest.mark.matrix
def test_v41_in_bf16(worker: Interpreter, tmp_path: Path) -> None:
    from dsv4c import api

    text = PLAN_PIPELINE.replace(",merge_projections", ',quantise_activations{rule="bf16"},merge_projections')
    module = api.lower(api.load_checkpoint(GOLDEN / "v41"), "cuda:sm_90a", "plan", text).module
    run(worker, module, tmp_path / "m.dsv4", cut(prompt("v41_text")[0], [3]), 4e-3)


# ---------------------------------------------------------------------------------- several devices


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v4", 3),
        pytest.param("v4", 2, marks=pytest.mark.matrix),
        pytest.param("v41_text", 3, marks=pytest.mark.matrix),
        pytest.param("v41_text", 2, marks=pytest.mark.matrix),
    ],
)
def test_several_devices_give_the_bits_of_one(
    worker: Interpreter, tmp_path: Path, name: str, devices: int
) -> None:
    """Logits and states of a prompt and a token, by the plan of one device and by that of several, states on
    the devices in between; memory there begins as NaN, so that what was not handed over would show.
    """
    module = lowered(GOLDEN / name.partition("_")[0])
    fresh = Evaluator(module, precision=np.float32).fresh_state(B=1, ctx=64)
    fed = [p[0] for p in cut(prompt(name)[0], [3, 1])] if name != "v4" else [ints(3, 9, 4), ints(2)]
    found = []
    for count in (1, devices):
        module.meta["spread"] = {"devices": count, "batch": 1, "context": 8192}
        artifact = write_draft(module, module.store, tmp_path / f"{count}.dsv4")
        state = {n: np.array(v) for n, v in fresh.items()}
        calls = []
        for ids in fed:
            given = {
                "tokens": ids.reshape(1, -1).astype(np.int32), "n_valid": ints(ids.size),
                "rows": np.arange(ids.size, dtype=np.int32)[None],
            }  # fmt: skip
            if "images" in module.inputs:
                none = no_images(1, 128)
                given |= {"images": none.rows, "n_images": none.counts}
            calls.append((given, state))
        done = worker.run(artifact, calls)
        found.append(([out["logits"] for out, _ in done], done[-1][1]))
    (one, kept), (several, left) = found
    for want, got in zip(one, several, strict=True):
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(got, want)
    for state_name, value in kept.items():
        np.testing.assert_array_equal(left[state_name], value, err_msg=state_name)
