"""Generated models against what transformers 5.23 computed for them in float32, in data/reference.

Nothing here needs transformers; `make_reference.py` wrote the files with it. "ratio16" has a window of 8 and
ratios 4 and 16, "ratio128" a window of 24 and ratios 4 and 128: every kind of border is crossed many times.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_model_harness import (
    BETWEEN_CHUNKINGS,
    FORMATS,
    GENERATED,
    RUNNERS,
    TOLERANCE,
    Arr,
    Models,
    cuts,
    feed,
    feed_ragged,
    fingerprint,
    ragged,
    stored,
    within,
)  # fmt: skip

NAMES = tuple(GENERATED)
LONG = 600
ROWS = 4  # stored prompts


def reference(name: str) -> dict[str, Arr]:
    return stored(f"reference/{name}.npz")


def prompt(name: str, row: int = 0) -> tuple[Arr, Arr]:
    """Ids [T] and the logits [T,V] transformers gives after each."""
    found = reference(name)
    return found[f"ids.{row}"], found[f"logits.{row}"]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_of_these_checkpoints(models: Models, name: str) -> None:
    found = fingerprint(models.checkpoint(name))
    assert found == reference(name)["fingerprint"], "the generator changed: run tests/make_reference.py"
    ids, logits = prompt(name)
    assert len(ids) == len(logits) == LONG


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", RUNNERS)
def test_the_longest_prompt_however_it_is_fed(models: Models, name: str, how: str) -> None:
    ids, want = prompt(name)
    whole = feed(models.run(name, how), ids, [LONG])
    within(whole, want, TOLERANCE, "whole")
    ways = {"cut 1": cuts(LONG, 1), "cut 2": cuts(LONG, 2, 200)}
    if how != "evaluator":
        ways["token by token"] = [1] * LONG
    for what, sizes in ways.items():
        found = feed(models.run(name, how), ids, sizes)
        within(found, want, TOLERANCE, what)
        within(found, whole, BETWEEN_CHUNKINGS, f"{what} against whole")
        assert (found.argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_prompt_length(models: Models, name: str, form: str) -> None:
    """1 to 600 tokens, each from a fresh state in one call, so that each border is met at every offset.

    ONNX Runtime is slower to call: past 140 tokens every third length, which still meets every offset.
    """
    ids, want = prompt(name)
    session = models.session(name, form, context=LONG)
    found = want.copy()
    for length in [*range(1, 141), *range(141, LONG + 1, 1 if form == "tvm" else 3)]:
        session.reset()
        found[length - 1] = session.prefill([ids[:length].tolist()], chunk=LONG)[0]
    within(found, want, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_cut_into_two(models: Models, name: str, form: str) -> None:
    """A prompt of 300 tokens cut at every place: the second call starts at every offset of every border."""
    ids, want = (x[:300] for x in prompt(name))
    session = models.session(name, form, context=300)
    worst = np.zeros_like(want)
    for first in range(1, 300, 1 if form == "tvm" else 3):
        session.reset()
        session.prefill([ids[:first].tolist()], chunk=300)
        found = session.step(ids[None, first:])[0]
        worst[first:] = np.maximum(worst[first:], np.abs(found - want[first:]))
        assert (found.argmax(1) == want[first:].argmax(1)).all()
    within(want + worst, want, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", RUNNERS)
@pytest.mark.parametrize("seed", range(3))
def test_batches_of_different_lengths(models: Models, name: str, how: str, seed: int) -> None:
    """Four prompts side by side in ragged calls: every row is what transformers gives for it alone."""
    prompts = [prompt(name, row) for row in range(ROWS)]
    calls = ragged([len(ids) for ids, _ in prompts], seed, longest=(9, 40, 250)[seed])
    if how == "evaluator" and seed == 0:
        calls = ragged([len(ids) for ids, _ in prompts], seed, longest=100)
    found = feed_ragged(models.run(name, how, batch=ROWS), [ids for ids, _ in prompts], calls, pad=9)
    for row, (_, want) in enumerate(prompts):
        within(found[row], want, TOLERANCE, f"row {row}")
        assert (found[row].argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_prefill_of_a_batch(models: Models, name: str, form: str) -> None:
    prompts = [prompt(name, row) for row in range(ROWS)]
    session = models.session(name, form, batch=ROWS)
    for chunk in (37, 256):
        session.reset()
        found = session.prefill([ids.tolist() for ids, _ in prompts], chunk)
        within(found, np.stack([want[-1] for _, want in prompts]), TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", RUNNERS)
def test_two_hundred_greedy_tokens(models: Models, name: str, how: str) -> None:
    """Token for token what transformers writes; end-of-sequence is not special here."""
    start, want = reference(name)["greedy.prompt"], reference(name)["greedy.new"]
    runner = models.run(name, how)
    logits, found = runner.step(start[None])[0, -1], []
    for _ in want:
        found.append(int(logits.argmax()))
        logits = runner.step([[found[-1]]])[0, -1]
    assert found == want.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_how_a_prompt_is_cut_changes_no_bit_of_a_tvm_artifact(models: Models, name: str) -> None:
    ids = prompt(name)[0]
    whole = feed(models.session(name, "tvm"), ids, [LONG])
    for seed, longest in enumerate((2, 20, 300)):
        assert np.array_equal(feed(models.session(name, "tvm"), ids, cuts(LONG, seed, longest)), whole)
