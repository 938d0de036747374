"""Generating: greedy and sampled tokens, stop tokens, rows that end early, streams."""

from __future__ import annotations

import numpy as np
import pytest
from test_model_harness import FORMATS, Models, stored

from dsv4c import Session
from dsv4c.runtime.sampling import SamplingParams

NAME = "ratio16"
PROMPTS = [[5, 17, 40, 9], [33], [8, 8, 2, 19, 50, 41, 7, 3, 12]]
EOS = 1


def by_hand(session: Session, prompt: list[int], count: int) -> list[int]:
    """The greedy loop written out; end-of-sequence ends it."""
    logits, out = session.step([prompt])[0, -1], []
    while True:
        out.append(int(logits.argmax()))
        if len(out) == count or out[-1] == EOS:
            return out
        logits = session.step([[out[-1]]])[0, -1]


@pytest.mark.parametrize("form", FORMATS)
def test_greedy_is_the_loop_written_out(models: Models, form: str) -> None:
    for prompt in PROMPTS:
        want = by_hand(models.session(NAME, form), prompt, 60)
        assert models.session(NAME, form).generate(prompt, 60) == want
        assert models.session(NAME, form).generate([prompt], 60, chunk=2) == [want]
        assert models.session(NAME, form).generate(np.array(prompt), 60) == want


@pytest.mark.parametrize("form", FORMATS)
def test_the_reference_continuation_until_it_ends(models: Models, form: str) -> None:
    found = stored(f"reference/{NAME}.npz")
    want = found["greedy.new"].tolist()
    want = want[: want.index(EOS) + 1] if EOS in want else want
    assert models.session(NAME, form).generate(found["greedy.prompt"].tolist(), 200) == want


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_a_batch_write_what_they_write_alone(models: Models, form: str) -> None:
    alone = [models.session(NAME, form).generate(p, 40) for p in PROMPTS]
    assert models.session(NAME, form, batch=3).generate(PROMPTS, 40) == alone


@pytest.mark.parametrize("form", FORMATS)
def test_a_stop_token_ends_its_row_only(models: Models, form: str) -> None:
    free = [models.session(NAME, form).generate(p, 40) for p in PROMPTS]
    stop = free[0][3]
    want = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    session = models.session(NAME, form, batch=3)
    assert session.generate(PROMPTS, 40, SamplingParams(stop_ids=(stop,))) == want
    # The stopped row's last token was not fed; the longest row has fed all but its last.
    assert session.position.tolist() == [len(p) + len(w) - 1 for p, w in zip(PROMPTS, want, strict=True)]


@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_is_generate_token_by_token(models: Models, form: str) -> None:
    free = models.session(NAME, form, batch=3).generate(PROMPTS, 12)
    params = SamplingParams(stop_ids=(free[1][2],))
    want = models.session(NAME, form, batch=3).generate(PROMPTS, 12, params)
    columns = list(models.session(NAME, form, batch=3).stream(PROMPTS, 12, params))
    for row, expected in enumerate(want):
        tokens = [column[row] for column in columns]
        assert tokens[: len(expected)] == expected
        assert tokens[len(expected) :] == [None] * (len(columns) - len(expected))
    assert len(columns) == max(map(len, want))


@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_ends_when_every_row_has(models: Models, form: str) -> None:
    free = [models.session(NAME, form).generate(p, 5) for p in PROMPTS]
    stops = tuple({row[0] for row in free})
    columns = list(models.session(NAME, form, batch=3).stream(PROMPTS, 50, SamplingParams(stop_ids=stops)))
    assert columns == [[row[0] for row in free]]


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_that_has_ended_cannot_trip_the_sampler(
    models: Models, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a backend gives for an idle row is unspecified, so it may be NaN."""
    session = models.session(NAME, form, batch=2)
    want = [row[:1] if b == 0 else row for b, row in enumerate(session.fork().generate(PROMPTS[:2], 8))]
    real = session.backend.step

    def step(tokens, n_valid, rows, state):  # type: ignore[no-untyped-def]
        logits = real(tokens, n_valid, rows, state)
        logits[np.asarray(n_valid) == 0] = np.nan
        return logits

    monkeypatch.setattr(session.backend, "step", step)
    assert session.generate(PROMPTS[:2], 8, SamplingParams(stop_ids=(want[0][0],)))[0] == want[0]


@pytest.mark.parametrize("form", FORMATS)
def test_sampling_is_fixed_by_its_seed_and_its_row(models: Models, form: str) -> None:
    params = SamplingParams(temperature=1.3, top_p=0.95, seed=4)
    first, again = (models.session(NAME, form, batch=3).generate(PROMPTS, 30, params) for _ in range(2))
    assert first == again
    assert models.session(NAME, form).generate(PROMPTS[0], 30, params) == first[0]
    other = models.session(NAME, form, batch=3).generate(PROMPTS, 30, SamplingParams(1.3, 0, 0.95, 5))
    assert other != first


@pytest.mark.parametrize("form", FORMATS)
def test_a_further_call_continues(models: Models, form: str) -> None:
    """The session keeps its state: feeding the last token goes on where the first call ended."""
    want = models.session(NAME, form).generate(PROMPTS[0], 30, SamplingParams())
    session = models.session(NAME, form)
    first = session.generate(PROMPTS[0], 10)
    assert first + session.generate([first[-1]], len(want) - 10) == want


@pytest.mark.parametrize("form", FORMATS)
def test_the_whole_context_can_be_written(models: Models, form: str) -> None:
    """The last new token needs no position of its own; nothing asked, nothing written but the prompt fed."""
    prompt = PROMPTS[0]
    free = models.session(NAME, form).generate(prompt, 13)
    assert EOS not in free
    session = models.session(NAME, form, context=16)
    assert session.generate(prompt, 13) == free and session.position.tolist() == [16]
    idle = models.session(NAME, form)
    assert idle.generate(prompt, 0) == [] and idle.position.tolist() == [4]


@pytest.mark.parametrize("form", FORMATS)
def test_room_is_counted_per_row(models: Models, form: str) -> None:
    """A long row at an early position and a short one at a late position both fit."""
    session = models.session(NAME, form, batch=2, context=20)
    session.step([[5, 6, 7, 8, 9, 10, 11, 12], [5] * 8], [0, 8])
    session.generate([[5] * 12, [6]], 9)
    assert session.position.max() <= 20
