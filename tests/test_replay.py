"""Prefill in two halves (V4.1, section 5): exact from D (W - 1) + 1 replayed tokens on, cut windows below."""

from __future__ import annotations

import numpy as np
import pytest
from test_model_harness import Arr, Models, stored

from dsv4c import Session, load_checkpoint
from dsv4c.api import lower
from dsv4c.errors import SessionError, UsageError
from dsv4c.ir.meaning import Evaluator
from dsv4c.passes.allow_replay import START, AllowReplay, encoder_part
from dsv4c.runtime.replay import describe, exact_tokens, parse_prefill

DECODERS, WINDOW = 4, 8
EXACT = DECODERS * (WINDOW - 1) + 1


@pytest.fixture
def session(models: Models) -> Session:
    return models.session("v41", "tvm")


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    ids: list[int] = stored("golden/v41_text/golden.npz")["input_ids"].tolist()
    return ids + ids[::-1][:15]


def test_how_many_tokens_are_exact(session: Session, models: Models) -> None:
    assert exact_tokens(session.artifact) == EXACT
    assert parse_prefill("replay", session.artifact) == EXACT
    assert parse_prefill("replay=3", session.artifact) == 3
    assert parse_prefill("full", session.artifact) is None
    assert "exact from 29" in describe(3, session.artifact, 60)
    for wrong in ("replay=0", "replay=", "replay=x", "half"):
        with pytest.raises(UsageError, match="prefill"):
            parse_prefill(wrong, session.artifact)


@pytest.mark.parametrize("chunk", [5, 64])
def test_enough_tokens_give_the_same_bits(session: Session, prompt: list[int], chunk: int) -> None:
    """The last logits, and every token after it."""
    whole = session.prefill([prompt], chunk)
    after = [session.step([[t]]) for t in prompt[:20]]
    for count in (EXACT, EXACT + 9, len(prompt), len(prompt) + 5):
        session.reset()
        np.testing.assert_array_equal(session.prefill([prompt], chunk, replay=count), whole)
        assert session.state[START][0] == max(0, len(prompt) - count)
        for token, want in zip(prompt[:20], after, strict=True):
            np.testing.assert_array_equal(session.step([[token]]), want)


def test_one_token_less_is_approximate(session: Session, prompt: list[int]) -> None:
    whole = session.prefill([prompt])
    session.reset()
    near = session.prefill([prompt], replay=EXACT - 1)
    assert (near != whole).any()
    session.reset()
    far = session.prefill([prompt], replay=2)
    assert np.abs(far - whole).max() > np.abs(near - whole).max()


def test_encoder_layers_are_exact_however_few_are_replayed(session: Session, prompt: list[int]) -> None:
    session.prefill([prompt])
    want = {name: array.copy() for name, array in session.state.items()}
    session.reset()
    session.prefill([prompt], chunk=7, replay=1)
    early = [n for n in want if not n.startswith("layers.") or int(n.split(".")[1]) < DECODERS]
    for name in {*early, "layers.4.entries", "layers.4.index.entries"} - {START}:
        np.testing.assert_array_equal(session.state[name], want[name], err_msg=name)
    assert (session.state["layers.7.window"] != want["layers.7.window"]).any()


def test_windows_are_cut_where_the_replay_starts(models: Models, prompt: list[int]) -> None:
    """Against the meaning: the module with the pass, fed by hand."""
    module = load_checkpoint(models.checkpoint("v41"))
    assert AllowReplay().run(module) == DECODERS
    part, count = encoder_part(module), len(prompt)
    assert set(module.states) - set(part.states) == {START, *(f"layers.{i}.window" for i in range(4, 8))}
    state = Evaluator(module).fresh_state(B=1, ctx=count)
    images = {"images": np.zeros((1, 1, 128), np.float32), "n_images": np.zeros(1, np.int32)}

    def feed(tokens: list[int]) -> dict[str, Arr]:
        return {"tokens": np.array([tokens]), "n_valid": np.array([len(tokens)]), **images}

    early = Evaluator(part, module.store)(feed(prompt[:-6]), state)
    state |= early.state | {START: np.array([count - 6], np.int32)}
    done = Evaluator(module)(feed(prompt[-6:]) | {"rows": np.array([[5]])}, state)
    session = models.session("v41", "tvm")
    found = session.prefill([prompt], replay=6)
    want = done.outputs["logits"][0]
    assert np.abs(found - want).max() < 1e-5 * np.ptp(want)
    for name, array in done.state.items():
        held = session.state[name][:, : array.shape[1]] if array.ndim > 1 else session.state[name]
        assert np.abs(held - array).max(initial=0) <= 1e-5 * max(1.0, np.abs(array).max(initial=0)), name


def test_ragged_batches(models: Models, prompt: list[int]) -> None:
    """Each row by itself: one shorter than the replay, one longer, with an image in it."""
    golden = stored("golden/v41/golden.npz")
    image = golden["embeddings"][golden["input_ids"] == 510].astype(np.float32)
    prompts = [prompt[:4], golden["input_ids"].tolist() + prompt[:9], prompt]
    none = np.zeros((0, image.shape[1]), np.float32)
    images = [none, image, none]
    both = models.session("v41", "tvm", batch=3).prefill(prompts, 6, images=images, replay=10)
    for row, (tokens, rows) in enumerate(zip(prompts, images, strict=True)):
        alone = models.session("v41", "tvm")
        np.testing.assert_array_equal(alone.prefill([tokens], images=[rows], replay=10)[0], both[row])
        assert alone.state[START][0] == max(0, len(tokens) - 10)


def test_a_second_prompt_starts_anew(session: Session, prompt: list[int]) -> None:
    """Replayed twice: the decoder layers see the end of the second prompt, not across the gap."""
    session.prefill([prompt])
    whole = session.prefill([prompt])
    session.reset()
    session.prefill([prompt], replay=3)
    np.testing.assert_array_equal(session.prefill([prompt], replay=EXACT), whole)
    assert session.state[START][0] == 2 * len(prompt) - EXACT


def test_generation_continues(session: Session, prompt: list[int]) -> None:
    want = session.generate(prompt, 12)
    session.reset()
    assert session.generate(prompt, 12, replay=EXACT) == want


def test_refusals(models: Models, session: Session, prompt: list[int]) -> None:
    with pytest.raises(UsageError, match="replay = 0"):
        session.prefill([prompt], replay=0)
    assert session.position[0] == 0
    with pytest.raises(SessionError, match="cannot prefill in two halves"):
        models.session("v4_r16", "tvm").prefill([[1, 2, 3]], replay=2)


def test_the_pass_leaves_other_models_alone(models: Models) -> None:
    assert START not in lower(models.module("v4_r16")).module.states
    lowered = lower(models.module("v41")).module
    assert START in lowered.states and set(lowered.parts) == {"vision", "encoder"}
    assert "rows" not in lowered.parts["encoder"].inputs
    rounded = lower(models.module("v41"), passes="without(allow_replay)").module
    assert START not in rounded.states and set(rounded.parts) == {"vision"}
