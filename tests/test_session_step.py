"""Stepping a session: shapes, padding, neighbours, limits, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_model_harness import BETWEEN_CHUNKINGS, FORMATS, Arr, Models, feed, feed_ragged, ragged, within

import dsv4c
from dsv4c.errors import ArtifactError, Dsv4cError, SessionError, UsageError
from dsv4c.runtime import archs, cpu

VOCAB = 61
NAME = "ratio16"


def ids_of(count: int, seed: int = 0) -> Arr:
    return np.random.default_rng(seed).integers(2, VOCAB, count)


def same(form: str, found: Arr, want: Arr) -> None:
    """Bit for bit, as TVM artifacts promise; ONNX Runtime picks its kernels by shape."""
    if form == "tvm":
        assert np.array_equal(found, want)
    else:
        within(found, want, BETWEEN_CHUNKINGS)


@pytest.mark.parametrize("form", FORMATS)
def test_shapes_and_positions(models: Models, form: str) -> None:
    session = models.session(NAME, form, batch=3, context=64)
    logits = session.step(ids_of(15).reshape(3, 5), [5, 0, 2])
    assert logits.shape == (3, 5, VOCAB) and logits.dtype == np.float32
    assert session.position.tolist() == [5, 0, 2] and session.batch == 3 and session.context == 64
    session.position[:] = 50  # a copy
    assert session.position.tolist() == [5, 0, 2]
    single = models.session(NAME, form)
    assert single.step(ids_of(4)).shape == (1, 4, VOCAB)  # [T] is enough where the batch is 1
    assert session.state_bytes == sum(a.nbytes for a in session.state.values())


@pytest.mark.parametrize("form", FORMATS)
def test_rows_do_not_see_their_neighbours(models: Models, form: str) -> None:
    """Every row of a batch is what it is alone, however ragged the calls."""
    rows = [ids_of(n, n) for n in (90, 41, 17, 3)]
    for seed in range(3):
        calls = ragged([len(r) for r in rows], seed, longest=30)
        together = feed_ragged(models.session(NAME, form, batch=4), rows, calls, pad=seed)
        for b, row in enumerate(rows):
            sizes = [c[b] for c in calls if c[b]]
            same(form, together[b], feed(models.session(NAME, form), row, sizes))


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_may_change_its_place(models: Models, form: str) -> None:
    rows = [ids_of(40, 1), ids_of(40, 2), ids_of(40, 3)]
    a = models.session(NAME, form, batch=3).step(np.stack(rows))
    b = models.session(NAME, form, batch=3).step(np.stack(rows[::-1]))
    same(form, b[::-1], a)


@pytest.mark.parametrize("form", FORMATS)
def test_a_step_of_nothing_changes_nothing(models: Models, form: str) -> None:
    session = models.session(NAME, form, batch=2, context=64)
    session.step(ids_of(26).reshape(2, 13), [13, 9])
    before = {k: v.copy() for k, v in session.state.items()}
    session.step(ids_of(10, 5).reshape(2, 5), [0, 0])
    for name, array in session.state.items():
        assert np.array_equal(array, before[name]), name


@pytest.mark.parametrize("form", FORMATS)
def test_what_stands_in_the_padding_is_not_looked_at(models: Models, form: str) -> None:
    outside = np.array([[5, 6, 7, -1, 10**9]])
    logits = models.session(NAME, form).step(outside, [3])[0, :3]
    assert np.array_equal(logits, models.session(NAME, form).step([[5, 6, 7, 0, 0]], [3])[0, :3])


@pytest.mark.parametrize("form", FORMATS)
def test_inputs_in_any_memory(models: Models, form: str) -> None:
    """Lists, other integers, read-only, strided and unaligned arrays are the same tokens."""
    ids = ids_of(24).reshape(2, 12)
    want = models.session(NAME, form, batch=2).step(ids, [12, 7])
    raw = np.zeros(ids.size * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64 + 3
    unaligned = raw[start : start + ids.size * 4].view(np.int32).reshape(ids.shape)
    unaligned[...] = ids
    assert unaligned.ctypes.data % 4
    frozen = ids.astype(np.int32)
    frozen.flags.writeable = False
    wide = np.repeat(ids, 2, axis=1)[:, ::2]
    for given in (ids.tolist(), ids.astype(np.uint8), frozen, wide, np.asfortranarray(ids), unaligned):
        found = models.session(NAME, form, batch=2).step(given, np.array([12, 7], np.int16))
        assert np.array_equal(found[0], want[0]) and np.array_equal(found[1, :7], want[1, :7])


@pytest.mark.parametrize("form", FORMATS)
def test_the_context_is_chosen_at_run_time(models: Models, form: str) -> None:
    """Room for more costs state and changes no result; the default is the smaller of 4096 and the maximum."""
    ids = ids_of(33)
    tight, roomy = (models.session(NAME, form, context=c) for c in (33, 900))
    assert tight.state_bytes < roomy.state_bytes
    same(form, feed(tight, ids, [20, 13]), feed(roomy, ids, [20, 13]))
    assert dsv4c.Session(models.artifact(NAME, form)).context == 1024


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("context", "batch"), [(1, 1), (3, 1), (15, 1), (16, 1), (3, 2)])
def test_contexts_smaller_than_a_window(models: Models, form: str, context: int, batch: int) -> None:
    """No compressed entry, or only one, fits; the last position can be used."""
    ids = ids_of(context)
    session = models.session(NAME, form, context=context, batch=batch)
    want = feed(models.session(NAME, form), ids, [1] * context)
    for at, token in enumerate(ids):
        for found in session.step([[token]] * batch):
            same(form, found, want[at : at + 1])
    with pytest.raises(SessionError, match="the context is full"):
        session.step([[5]] * batch)


@pytest.mark.parametrize("form", FORMATS)
def test_prefill_gives_the_last_logits_of_each(models: Models, form: str) -> None:
    prompts, seen = [ids_of(n, n).tolist() for n in (23, 1, 9)], []
    session = models.session(NAME, form, batch=3)
    found = session.prefill(prompts, chunk=4, progress=lambda *now: seen.append(now))
    assert seen == [(4, 23), (8, 23), (12, 23), (16, 23), (20, 23), (23, 23)]
    for b, prompt in enumerate(prompts):
        same(form, found[b], models.session(NAME, form).step([prompt])[0, -1])


# --------------------------------------------------------------------------------- what is refused

Act = Callable[[dsv4c.Session], Any]
REFUSED: dict[str, tuple[type[Dsv4cError], str, Act]] = {
    "too many axes": (
        SessionError, r"step: tokens are int64\[1, 2, 2\]; allowed: integers \[2, T\], T >= 1",
        lambda s: s.step(np.zeros((1, 2, 2), int)),
    ),
    "one axis for two rows": (SessionError, r"tokens are int64\[4\]", lambda s: s.step([1, 2, 3, 4])),
    "another batch": (SessionError, r"tokens are int64\[3, 1\]", lambda s: s.step([[1], [2], [3]])),
    "no tokens": (SessionError, r"tokens are int64\[2, 0\]", lambda s: s.step(np.zeros((2, 0), int))),
    "fractions": (SessionError, r"tokens are float64\[2, 1\]", lambda s: s.step([[1.0], [2.0]])),
    "truth values": (SessionError, r"tokens are bool", lambda s: s.step([[True], [False]])),
    "rows of different lengths": (SessionError, r"step: tokens are object", lambda s: s.step([[1, 2], [3]])),
    "beyond the vocabulary": (
        SessionError, r"outside the vocabulary; allowed: 0\.\.60", lambda s: s.step([[5], [61]])
    ),
    "below the vocabulary": (SessionError, r"outside the vocabulary", lambda s: s.step([[5], [-1]])),
    "n_valid too large": (
        SessionError, r"n_valid = \[1, 3\]; allowed: \[2\] of 0\.\.2",
        lambda s: s.step([[5, 6], [7, 8]], [1, 3]),
    ),
    "n_valid negative": (SessionError, r"n_valid = \[-1, 1\]", lambda s: s.step([[5], [6]], [-1, 1])),
    "n_valid of another batch": (SessionError, r"n_valid = \[1\]", lambda s: s.step([[5], [6]], [1])),
    "n_valid in fractions": (
        SessionError, r"n_valid = \[0\.5, 1\.0\]", lambda s: s.step([[5], [6]], [0.5, 1])
    ),
    "more than the context": (
        SessionError, r"the context is full: 23 positions are needed; allowed: at most 20\n  hint: open",
        lambda s: s.step(np.full((2, 20), 5), [20, 1]),
    ),
    "too few prompts": (
        SessionError, r"prefill: 1 prompts of lengths \[2\]; allowed: 2 prompts of at least one token",
        lambda s: s.prefill([[1, 2]]),
    ),
    "an empty prompt": (SessionError, r"2 prompts of lengths \[2, 0\]", lambda s: s.prefill([[1, 2], []])),
    "no prompt": (SessionError, r"generate: 0 prompts of lengths \[\]", lambda s: s.generate([], 4)),
    "a prompt that is too long": (
        SessionError, r"prefill: the context is full: 33 positions",
        lambda s: s.prefill([[5] * 30, [6]], chunk=4),
    ),
    "a late bad token": (
        SessionError, r"prefill: a token id is outside the vocabulary",
        lambda s: s.prefill([[5] * 9 + [99], [6]], chunk=4),
    ),
    "chunk 0": (
        UsageError, r"prefill: chunk = 0; allowed: 1 or more", lambda s: s.prefill([[1], [2]], chunk=0)
    ),
    "too many new tokens": (
        SessionError, r"generate: 17 new tokens do not fit the context; allowed: at most 16",
        lambda s: s.generate([[5, 6], [7]], 17),
    ),
    "fewer than no tokens": (
        UsageError, r"generate: max_new_tokens = -1; allowed: 0 or more", lambda s: s.generate([[1], [2]], -1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_without_a_trace(models: Models, form: str, name: str) -> None:
    """Row 0 stands at position 3 of 20, row 1 at 2; a refused call leaves every bit of the state."""
    kind, message, act = REFUSED[name]
    session = models.session(NAME, form, batch=2, context=20)
    session.step([[5, 6, 7], [8, 9, 1]], [3, 2])
    before = {k: v.copy() for k, v in session.state.items()}
    with pytest.raises(kind, match=message) as caught:
        act(session)
    assert str(caught.value).startswith(caught.value.where)
    for key, array in session.state.items():
        assert np.array_equal(array, before[key]), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "Session: batch = 0; allowed: 1 or more"),
        ({"context": 0}, "context = 0; allowed: 1 to 1024"),
        ({"context": 1025}, "context = 1025; allowed: 1 to 1024"),
        ({"threads": 0}, "threads = 0; allowed: 1 or more"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_impossible_sessions(models: Models, form: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dsv4c.Session(models.artifact(NAME, form), **options)


def test_artifacts_for_other_machines(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = models.session(NAME, "tvm").artifact
    arch = dict(artifact.meta["arch"])
    monkeypatch.setitem(artifact.meta, "arch", arch | {"machine": "pdp11"})
    with pytest.raises(ArtifactError, match="compiled for pdp11, this machine is"):
        dsv4c.Session(artifact)
    monkeypatch.setitem(artifact.meta, "arch", arch | {"requires": ["a flag of no CPU"]})
    for module in (archs, cpu):
        monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"sse2"}))
    with pytest.raises(ArtifactError, match="this CPU lacks a flag of no CPU"):
        dsv4c.Session(artifact)
