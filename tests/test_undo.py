"""Taking back a step that failed: which rows are copied, and that a session is as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import Arr, B, Case, T
from test_model_harness import Models

from dsv4c.errors import SessionError
from dsv4c.ir.graph import Module
from dsv4c.runtime import Session
from dsv4c.runtime.buffers import zeros
from dsv4c.runtime.undo import Undo
from dsv4c.targets.cpu.tvm.tables import state_writes

RATIO, WINDOW = 4, 8


def fresh(pos: tuple[int, ...]) -> dict[str, Arr]:
    rng = np.random.default_rng(0)
    return {
        "pos": np.array(pos, np.int32), "ring": rng.random((len(pos), WINDOW, 2)),
        "entries": rng.random((len(pos), 30, 2)), "other": rng.random((len(pos), 3)),
    }  # fmt: skip


WRITES: dict[str, list[Any]] = {"ring": ["ring"], "entries": ["entries", RATIO]}


@pytest.mark.parametrize("counts", [(1, 1), (0, 5), (7, 8), (9, 40), (3, 0)])
@pytest.mark.parametrize("pos", [(0, 0), (3, 6), (13, 40)])
def test_what_a_step_writes_comes_back(pos: tuple[int, int], counts: tuple[int, int]) -> None:
    state, before = fresh(pos), fresh(pos)
    with pytest.raises(KeyError), Undo(WRITES).guard(state, np.array(counts)):
        for b, (start, count) in enumerate(zip(pos, counts, strict=True)):
            for t in range(start, start + count):
                state["ring"][b, t % WINDOW] = -1
            state["entries"][b, start // RATIO : (start + count) // RATIO] = -1
        state["other"][...] = -1
        state["pos"] += 5
        raise KeyError
    for name, array in before.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def test_little_is_copied_and_nothing_on_success() -> None:
    state = fresh((13, 40))
    parts = Undo(WRITES)._parts(state, np.array([1, 1]))
    slots, ring = [part for part in parts if np.shares_memory(part, state["ring"])], state["ring"]
    assert [part.tolist() for part in slots] == [ring[0, 5:6].tolist(), ring[1, :1].tolist()]
    assert not any(np.shares_memory(part, state["entries"]) for part in parts)
    with Undo(WRITES).guard(state, np.array([1, 1])):
        state["ring"][...] = -1
    assert (state["ring"] == -1).all()


@pytest.mark.parametrize("pos", [(0, 0), (3, 7), (13, 40), (23, 120)])
@pytest.mark.parametrize("width", [16, 6])
def test_a_token_per_row_comes_back_where_slots_are_lines_of_memory_or_not(
    pos: tuple[int, int], width: int
) -> None:
    """Two places by one Undo, then the arrays of another session."""
    undo = Undo(WRITES)
    for step, positions in enumerate((pos, (pos[0] + 1, pos[1] + 1), pos)):
        if step != 1:
            state = fresh(positions)
            for name, count in (("ring", WINDOW), ("entries", 31)):
                state[name] = zeros((2, count, width), np.float32)
                state[name][...] = np.random.default_rng(1).random(state[name].shape)
        state["pos"][...] = positions
        before = {name: array.copy() for name, array in state.items()}
        with pytest.raises(KeyError), undo.guard(state, np.array([1, 1])):
            for b, at in enumerate(positions):
                state["ring"][b, at % WINDOW] = -1
                if (at + 1) % RATIO == 0:
                    state["entries"][b, at // RATIO] = -1
            state["other"][...] = -1
            state["pos"] += 1
            raise KeyError
        for name, array in before.items():
            np.testing.assert_array_equal(state[name], array, err_msg=name)


def test_without_counts_everything_is_copied() -> None:
    for state in (fresh((3, 4)), {"other": np.ones(3)}):
        counts = None if "pos" in state else np.array([1, 1])
        before = {name: array.copy() for name, array in state.items()}
        with pytest.raises(KeyError), Undo(WRITES).guard(state, counts):
            for array in state.values():
                array[...] = -1
            raise KeyError
        for name, array in before.items():
            np.testing.assert_array_equal(state[name], array)


def test_writes_are_read_off_the_graph(tiny_model: Module) -> None:
    writes = state_writes(tiny_model)
    assert ["ring"] in writes.values() and "pos" not in writes
    ratios = {w[1] for w in writes.values() if w[0] == "entries"}
    assert ratios and all(isinstance(r, int) for r in ratios)
    c = Case()
    _, pos, n_valid = c.step()
    ring = c.state("twice", B, 8, 6)
    once = c.b.op("ring_write", ring, c.f32("a", B, T, 6), pos, n_valid)
    c.op("entries_append", once, c.f32("b", B, (T + 3) // 4, 6), pos, n_valid, ratio=4, out="twice")
    assert state_writes(c.module) == {}  # two kinds of writes: it is copied whole


def test_a_prefill_that_fails_leaves_the_session_as_it_was(models: Models) -> None:
    """In its third chunk, with rows of different lengths; the model's own states, compared byte by byte."""
    path = models.artifact("ratio16", "tvm")
    session = Session(path, batch=2, context=200)
    session.prefill([list(range(1, 20)), [5, 6, 7]])
    before = {name: array.copy() for name, array in session.state.items()}
    session.backend.undo = Undo(session.artifact.meta["tvm"]["writes"])
    calls, step = [0], session.backend.step

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        found = step(*arguments)
        if calls[0] == 3:
            raise SessionError("a page cannot be read")
        return found

    session.backend.step = failing  # type: ignore[method-assign]
    with pytest.raises(SessionError, match="cannot be read"):
        session.prefill([list(range(1, 60)), list(range(1, 20))], chunk=16)
    for name, array in before.items():
        np.testing.assert_array_equal(session.state[name], array, err_msg=name)
    want = session.prefill([[1, 2], [3]])
    twin = Session(path, batch=2, context=200)
    twin.prefill([list(range(1, 20)), [5, 6, 7]])
    np.testing.assert_array_equal(twin.prefill([[1, 2], [3]]), want)
