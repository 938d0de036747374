"""The trained example: compiles, verifies itself, and models its text as well as its author measured.

`training.json` holds the loss transformers gives the exported checkpoint over all held-out text, of which
heldout.txt is the beginning; here it is measured again through the artifacts. `test_oracle_example.py`
compares the two over the same text.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from test_model_harness import FORMATS, ROOT, Arr, Models
from tokenizers import Tokenizer

from dsv4c.runtime.text import tokenizer_of
from dsv4c.runtime.verify import verify

EXAMPLE = ROOT / "examples" / "kjv"
BOS, WINDOW = 0, 384
"""The held-out loss is that of windows of this length, each after a <bos>."""
PROMPT = "And the LORD said unto Moses,"


def training() -> dict[str, Any]:
    return json.loads((EXAMPLE / "training.json").read_text())


def text() -> str:
    return (EXAMPLE / "heldout.txt").read_text(encoding="utf-8")


def negative_log_likelihood(logits: Arr, targets: Arr) -> Arr:
    x = logits.astype(np.float64)
    top = x.max(-1)
    chosen = np.take_along_axis(x, targets[..., None], -1)[..., 0]
    return np.log(np.exp(x - top[..., None]).sum(-1)) + top - chosen


def windows(tokenizer: Tokenizer, batch: int = 4) -> list[tuple[Arr, Arr]]:
    """Batches of inputs and targets [batch,WINDOW] over heldout.txt, but for what fills no whole batch."""
    ids = np.array(tokenizer.encode(text(), add_special_tokens=False).ids)
    targets = ids[: len(ids) // (batch * WINDOW) * batch * WINDOW].reshape(-1, batch, WINDOW)
    return [(np.concatenate([np.full((batch, 1), BOS), t[:, :-1]], axis=1), t) for t in targets]


def held_out_loss(models: Models, form: str) -> tuple[float, int]:
    """Nats per token over heldout.txt, and how many tokens that was."""
    session = models.session("kjv", form, batch=4, context=WINDOW)
    losses = []
    for given, targets in windows(tokenizer_of(session.artifact)):
        session.reset()
        losses.append(negative_log_likelihood(session.step(given), targets))
    return float(np.mean(losses)), np.size(losses)


@pytest.mark.parametrize("form", FORMATS)
def test_the_artifact_verifies_itself(models: Models, form: str) -> None:
    checks = verify(models.session("kjv", form).artifact, threads=1)
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]


@pytest.mark.parametrize("form", FORMATS)
def test_held_out_loss_is_what_training_measured(models: Models, form: str) -> None:
    loss, count = held_out_loss(models, form)
    print(f"{form}: {loss:.4f} nats over {count} tokens")
    assert count > 5000
    # Over a part of the text only: the standard error of this many tokens is about 1 %.
    assert loss == pytest.approx(training()["held_out_loss"], rel=0.03)
    assert loss < training()["unigram_held_out_loss"] - 1.5


@pytest.mark.parametrize("form", FORMATS)
def test_a_greedy_sample_is_made_of_words_of_the_text(models: Models, form: str) -> None:
    session = models.session("kjv", form)
    tokenizer = tokenizer_of(session.artifact)
    new = session.generate([BOS, *tokenizer.encode(PROMPT, add_special_tokens=False).ids], 60)
    words = re.findall("[a-z]+", tokenizer.decode(new).lower())
    known = set(re.findall("[a-z]+", text().lower()))
    assert len(words) >= 30
    assert np.mean([w in known for w in words[:-1]]) > 0.7, words  # the last may be cut
