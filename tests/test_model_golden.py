"""The golden checkpoints against results of an independent evaluator in float64, in data/golden.

Both have every layer kind, both routers, an MTP block that is read and not used, packed FP4 and FP8. "v4" has
the released ratios and a prompt past two HCA entries; "v4_r16" a ratio of 16.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_model_harness import (
    BETWEEN_CHUNKINGS,
    FORMATS,
    RUNNERS,
    TOLERANCE,
    Arr,
    Models,
    cuts,
    feed,
    stored,
    within,
)

from dsv4c.runtime import verify as runtime_verify
from dsv4c.runtime.sampling import SamplingParams

NAMES = ("v4", "v4_r16")


def golden(name: str) -> dict[str, Arr]:
    return stored(f"golden/{name}/golden.npz")


def streams_and_logits(models: Models, name: str, precision: type) -> tuple[Arr, Arr]:
    """The hyper-connection streams after every block, and the logits, from one call."""
    evaluator, ids = models.evaluator(name, precision), golden(name)["input_ids"]
    state = evaluator.fresh_state(B=1, ctx=len(ids))
    inputs = {"tokens": ids[None], "n_valid": np.array([len(ids)]), "rows": np.arange(len(ids))[None]}
    done = evaluator(inputs, state, trace=True)
    blocks = [r[0][0] for op, r in done.trace.items() if op.name == "hc_expand" and op.loc.endswith("hc_ffn")]
    return np.stack(blocks), done.outputs["logits"][0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("precision", "tolerance"), [(np.float64, 1e-5), (np.float32, TOLERANCE)])
def test_streams_after_every_block(models: Models, name: str, precision: type, tolerance: float) -> None:
    want = golden(name)
    streams, logits = streams_and_logits(models, name, precision)
    every = 2 if name == "v4" else 1  # as stored
    assert len(streams) == len(want["streams"]) == 5
    for layer, expected in enumerate(want["streams"]):
        within(streams[layer, ::every], expected, tolerance, f"streams of layer {layer}")
    within(logits, want["logits"], tolerance)
    assert (logits.argmax(1) == want["logits"].argmax(1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", RUNNERS)
def test_the_prompt_however_it_is_fed(models: Models, name: str, how: str) -> None:
    """Whole, token by token and cut at random: golden logits, the same decisions, nearly the same numbers."""
    want, ids = golden(name)["logits"], golden(name)["input_ids"]
    whole = feed(models.run(name, how), ids, [len(ids)])
    within(whole, want, TOLERANCE, "whole")
    for what, sizes in (
        ("token by token", [1] * len(ids)), ("cut 1", cuts(len(ids), 1)), ("cut 2", cuts(len(ids), 2, 130)),
    ):  # fmt: skip
        found = feed(models.run(name, how), ids, sizes)
        within(found, want, TOLERANCE, what)
        within(found, whole, BETWEEN_CHUNKINGS, f"{what} against whole")
        assert (found.argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", RUNNERS)
def test_padding_is_not_seen(models: Models, name: str, how: str) -> None:
    want, ids = golden(name)["logits"], golden(name)["input_ids"]
    runner, at, parts = models.run(name, how), 0, []
    for count in cuts(len(ids), 3):
        padded = np.concatenate([ids[at : at + count], np.full(1 + count % 5, 7)])
        parts.append(runner.step(padded[None], [count])[0, :count])
        at += count
    within(np.concatenate(parts), want, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_sixteen_greedy_tokens(models: Models, name: str, form: str) -> None:
    """End-of-sequence is not special in the golden continuation, so the loop is here."""
    want, session = golden(name), models.session(name, form)
    logits = session.prefill([want["input_ids"].tolist()], chunk=50)
    for token, expected in zip(want["generated_ids"], want["generated_logits"], strict=True):
        within(logits[0], expected, TOLERANCE)
        assert logits[0].argmax() == token
        logits = session.step([[token]])[:, -1]


@pytest.mark.parametrize("form", FORMATS)
def test_generate_gives_the_golden_continuation(models: Models, form: str) -> None:
    """Up to the first end-of-sequence, which ends a row."""
    for name in NAMES:
        want = golden(name)["generated_ids"].tolist()
        session = models.session(name, form)
        ends = [i for i, t in enumerate(want) if t in session.model["eos"]]
        want = want[: ends[0] + 1] if ends else want
        assert session.generate(golden(name)["input_ids"].tolist(), 16, SamplingParams()) == want


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_the_artifact_verifies_itself(models: Models, name: str, form: str) -> None:
    checks = runtime_verify.verify(models.session(name, form).artifact, threads=1)
    assert checks[-1].name == "logits" and len(checks) > 5
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]
