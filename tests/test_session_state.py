"""A session's state: saved, loaded, forked, reset, moved between formats, and damaged on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_model_harness import FORMATS, TOLERANCE, Arr, Models, feed, within

import dsv4c
from dsv4c.errors import SessionError

NAME = "ratio16"
CONTEXT = 96


@pytest.fixture
def saved(models: Models, tmp_path: Path) -> Path:
    """The state of a TVM session after 45 tokens."""
    session = models.session(NAME, "tvm", context=CONTEXT)
    session.step(ids_of(45)[None])
    session.save(tmp_path / "state.npz")
    return tmp_path / "state.npz"


def ids_of(count: int, seed: int = 0) -> Arr:
    return np.random.default_rng(seed).integers(2, 61, count)


def bits(session: dsv4c.Session) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.state.items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("cut", [1, 7, 8, 16, 45])
def test_a_saved_session_goes_on_bit_for_bit(models: Models, form: str, cut: int, tmp_path: Path) -> None:
    ids = ids_of(60)
    session = models.session(NAME, form, context=CONTEXT)
    session.step(ids[None, :cut])
    session.save(tmp_path / "state")
    want = session.step(ids[None, cut:])
    other = models.session(NAME, form, context=CONTEXT)
    other.step(ids_of(30, 9)[None])  # is forgotten
    other.load(tmp_path / "state")
    assert other.position.tolist() == [cut]
    assert np.array_equal(other.step(ids[None, cut:]), want)


def test_a_session_moves_between_formats(models: Models, tmp_path: Path) -> None:
    ids = ids_of(60)
    want = feed(models.run(NAME, "evaluator", context=CONTEXT), ids, [60])
    for source, target in (("tvm", "onnx"), ("onnx", "tvm")):
        session = models.session(NAME, source, context=CONTEXT)
        session.step(ids[None, :37])
        session.save(tmp_path / source)
        other = models.session(NAME, target, context=CONTEXT)
        other.load(tmp_path / source)
        within(other.step(ids[None, 37:])[0], want[37:], TOLERANCE)


def test_an_equal_artifact_takes_it(models: Models, saved: Path, tmp_path: Path) -> None:
    """Compiled anew, under another name: the same model."""
    copy = shutil.copyfile(models.artifact(NAME, "onnx"), tmp_path / "renamed.dsv4")
    session = dsv4c.Session(copy, context=CONTEXT)
    session.load(saved)
    assert session.position.tolist() == [45]


@pytest.mark.parametrize("form", FORMATS)
def test_a_fork_goes_its_own_way(models: Models, form: str) -> None:
    ids = ids_of(50)
    session = models.session(NAME, form)
    session.step(ids[None, :30])
    twin = session.fork()
    before = bits(twin)
    want = session.step(ids[None, 30:])
    assert bits(twin) == before and twin.position.tolist() == [30]
    assert not np.array_equal(twin.step(ids_of(20, 3)[None]), want)
    third = session.fork()
    assert third.position.tolist() == [50] and third.backend is session.backend


@pytest.mark.parametrize("form", FORMATS)
def test_reset_forgets_everything(models: Models, form: str) -> None:
    session = models.session(NAME, form, batch=2)
    want = session.fork().step(ids_of(40).reshape(2, 20))
    session.step(ids_of(60, 4).reshape(2, 30), [30, 11])
    session.reset()
    assert session.position.tolist() == [0, 0]
    assert np.array_equal(session.step(ids_of(40).reshape(2, 20)), want)


def test_two_sessions_at_once(models: Models) -> None:
    """Two models and two formats, steps interleaved: each as if it were alone."""
    ids = ids_of(40)
    kinds = [(name, form) for name in ("ratio16", "ratio128") for form in FORMATS]
    alone = [feed(models.session(*kind), ids, [5] * 8) for kind in kinds]
    sessions = [dsv4c.Session(models.artifact(*kind), threads=1) for kind in kinds]
    found = [[s.step(ids[None, i : i + 5])[0] for s in sessions] for i in range(0, 40, 5)]
    for i, want in enumerate(alone):
        assert np.array_equal(np.concatenate([step[i] for step in found]), want)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "batch", "context", "message"),
    [
        ("ratio128", 1, CONTEXT, "was saved by another model"),
        (NAME, 2, CONTEXT, r"was saved by another batch: \[1\]; allowed: \[2\]"),
        (NAME, 1, 64, r"was saved by another context: \[96\]; allowed: \[64\]"),
        (NAME, 3, 64, r"was saved by another batch and context"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_states_of_other_sessions(
    models: Models, saved: Path, form: str, name: str, batch: int, context: int, message: str
) -> None:
    session = models.session(name, form, batch, context)
    before = bits(session)
    with pytest.raises(SessionError, match=message) as caught:
        session.load(saved)
    assert caught.value.where == str(saved) and bits(session) == before


@pytest.mark.parametrize("size", [0, 1, 30, 200, 1000, -200, -22, -1])
def test_files_cut_short(models: Models, saved: Path, size: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:size])
    assert_refused(models, saved)


def test_other_files(models: Models, saved: Path, tmp_path: Path) -> None:
    for content in (b"not a session", json.dumps({"model": 1}).encode(), bytes(4096)):
        saved.write_bytes(content)
        assert_refused(models, saved)
    np.savez(saved, something=np.zeros(3))
    assert_refused(models, saved)
    np.savez(saved, identity=np.frombuffer(b"[1, 2]", np.uint8))
    assert_refused(models, saved)
    assert_refused(models, tmp_path / "absent")
    assert_refused(models, tmp_path)


def assert_refused(models: Models, path: Path) -> None:
    session = models.session(NAME, "tvm", context=CONTEXT)
    session.step([[5, 6]])
    before = bits(session)
    with pytest.raises(SessionError, match="is not a saved session") as caught:
        session.load(path)
    assert caught.value.where == str(path) and bits(session) == before


def test_no_damaged_byte_gets_through(models: Models, saved: Path) -> None:
    """A flipped byte is refused, or it was one the archive does not need and the state is as saved."""
    session = models.session(NAME, "tvm", context=CONTEXT)
    session.load(saved)
    want, data = bits(session), saved.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    # headers of the first members, the directory at the end, and anywhere
    places = {*range(0, 420), *range(len(data) - 400, len(data)), *rng.integers(0, len(data), 200).tolist()}
    for place in sorted(places):
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(damaged)
        session.reset()
        clean = bits(session)
        try:
            session.load(saved)
        except SessionError:
            refused += 1
            assert bits(session) == clean, place
        else:
            assert bits(session) == want, place
    assert refused > len(places) // 2


def test_saving_where_it_cannot_be(models: Models, tmp_path: Path) -> None:
    session = models.session(NAME, "tvm", context=CONTEXT)
    for path in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(SessionError, match="cannot be written"):
            session.save(path)
    assert not list(tmp_path.iterdir())


def test_saving_replaces_the_file_at_once(models: Models, saved: Path) -> None:
    session = models.session(NAME, "tvm", context=CONTEXT)
    session.step(ids_of(3)[None])
    session.save(saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    session.reset()
    session.load(saved)
    assert session.position.tolist() == [3]
