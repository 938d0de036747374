"""Looked-up tables that are damaged, cut, replaced or unreadable, and systems that lack a way of reading."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from stored_table import PAYLOAD, RECORD, ROWS, Lookup, disk, write

from dsv4c import api
from dsv4c.errors import ArtifactError, SessionError
from dsv4c.ir.levels import Level
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.container.handles import Handle, Queue
from dsv4c.runtime.container.tables import PAGE, TableLayout
from dsv4c.runtime.engram import TableOptions, TableStore
from dsv4c.runtime.engram import queue as queues
from dsv4c.runtime.layer import LayerSession

HOT = np.sort(np.random.default_rng(5).choice(ROWS, 300, replace=False))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with disk() as path:
        yield path


@pytest.fixture
def path(folder: Path) -> Path:
    """A file of the test's own: what sessions of one file share would outlive it."""
    return write(folder / "table.dsv4", HOT)


def test_direct_reads_fall_back_and_say_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(file: Any, flags: int, *more: Any, **kw: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, flags, *more, **kw)

    monkeypatch.setattr(os, "open", refuse)
    lookup = Lookup(Artifact.open(path))
    assert not lookup.store.direct and lookup.queue == "threads"
    lookup.check(np.arange(60))


def test_without_native_reads_threads_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_CALLS", {})
    lookup = Lookup(Artifact.open(path))
    assert lookup.queue == "threads"
    lookup.check(np.arange(600))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("direct", [True, False])
def test_damage_and_loss_name_file_and_offset(folder: Path, direct: bool, late: bool) -> None:
    path = write(folder / f"broken{direct}{late}.dsv4", np.empty(0, np.int64))
    options = TableOptions(direct=direct, synchronous=late, cache_bytes=0)
    lookup = Lookup(Artifact.open(path), options)
    offset = lookup.store.cold_offset
    with path.open("r+b") as file:
        file.seek(offset + 2 * PAGE + 5)
        byte = file.read(1)
        file.seek(offset + 2 * PAGE + 5)
        file.write(bytes([byte[0] ^ 1]))
    where = f"{path}, table t, offset"
    with pytest.raises(SessionError, match=f"{where} {offset + 2 * PAGE}: row 30 does not match its seal"):
        lookup.ask(np.arange(60))
    assert lookup.all_free()
    lookup.check(np.arange(20))  # it goes on
    os.truncate(path, offset + 3 * PAGE + 100)
    with pytest.raises(SessionError, match=f"{where} {offset + 3 * PAGE}: a page ends after 100 of 4096"):
        lookup.ask(np.arange(50, 60))
    assert lookup.all_free()
    with pytest.raises(SessionError, match=f"{where} .*: a page ends after 0 of 4096 bytes"):
        lookup.ask(np.arange(100, 1500))  # by the thread that reads many
    assert lookup.all_free()
    lookup.check(np.arange(20))


def test_a_damaged_record_is_not_kept(folder: Path) -> None:
    path = write(folder / "kept.dsv4", np.empty(0, np.int64))
    lookup = Lookup(Artifact.open(path))
    with path.open("r+b") as file:
        file.seek(lookup.store.cold_offset)
        file.write(bytes(8))
    for _ in range(2):
        with pytest.raises(SessionError, match="row 0 does not match its seal"):
            lookup.ask(np.arange(3))
    assert lookup.store.statistics.cached == 0


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_that_the_system_refuses(path: Path, direct: bool) -> None:
    lookup = Lookup(Artifact.open(path), TableOptions(direct=direct, cache_bytes=0))
    if lookup.queue == "native":
        lookup.bound.words[Handle.FILE] = -1
    else:
        background, memory = lookup.bound.background, queues.Pages(PAGE)
        assert background is not None
        background._memory, background._queue = memory, queues.ThreadQueue(-1, memory)
    for _ in range(2):
        with pytest.raises(SessionError, match="a page cannot be read: Bad file descriptor"):
            lookup.ask(np.arange(60))
        assert lookup.all_free()


def test_native_reads_that_cannot_be_started(path: Path) -> None:
    memory = queues.Pages(PAGE)
    queue = queues.NativeQueue(10**6, memory)
    queue.submit(np.array([0, 1]), np.array([0, PAGE]))
    slots, results = queue.finish(block=True)
    assert list(slots) == [0, 1] and list(results) == [-errno.EBADF] * 2
    queue.close()
    queue.close()
    lookup = Lookup(Artifact.open(path), TableOptions(cache_bytes=0))
    if lookup.native is None:
        return
    context = int(lookup.native.words[Queue.CONTEXT])
    lookup.native.words[Queue.CONTEXT] = 0
    with pytest.raises(SessionError, match="a page cannot be read: Invalid argument"):
        lookup.ask(np.arange(60))
    assert lookup.all_free()
    lookup.native.words[Queue.CONTEXT] = context
    lookup.check(np.arange(60))


def test_native_reads_whose_results_cannot_be_taken(path: Path) -> None:
    lookup = Lookup(Artifact.open(path), TableOptions(cache_bytes=0))
    if lookup.native is None:
        pytest.skip("no native reads here")
    ticket, context = lookup.prefetch(np.arange(60)), int(lookup.native.words[Queue.CONTEXT])
    lookup.native.words[Queue.CONTEXT] = 0
    with pytest.raises(SessionError, match="a table cannot be read: Invalid argument"):
        lookup.fetch(ticket)
    assert lookup.all_free()
    lookup.native.words[Queue.CONTEXT] = context
    lookup.check(np.arange(60))


def test_a_replaced_file_is_noticed(folder: Path) -> None:
    path = write(folder / "replaced.dsv4", HOT)
    artifact = Artifact.open(path)
    write(path, HOT[:-1])
    with pytest.raises(ArtifactError, match="was replaced"):
        TableStore(artifact, "t")


def test_tables_that_are_not_there_or_do_not_fit(path: Path, folder: Path) -> None:
    with pytest.raises(ArtifactError, match="has no table 'u'; allowed: t"):
        TableStore(Artifact.open(path), "u")
    with ArtifactWriter(folder / "odd.dsv4") as w:
        layout = TableLayout("t", ROWS, PAYLOAD, RECORD, PAGE)
        facts = {"layout": layout.meta(), "tier": "disk", "cache_bytes": 0, "all_cache_bytes": 0}
        w.set_meta("tables", {"t": facts})
    with pytest.raises(ArtifactError, match=r"tensor 't.bits' of table 't' is missing"):
        TableStore(Artifact.open(folder / "odd.dsv4"), "t")


@pytest.mark.parametrize("tier", ["disk", "resident"])
def test_a_session_without_tokens_and_with_a_wrong_row(folder: Path, tier: str) -> None:
    c = support.Case()
    rows, hot = c.i32("rows", support.B, support.T, 3), c.weight_of("hot", support.ints(1, 7))
    ticket = c.b.op("engram_prefetch", rows, store="t")
    c.op("engram_fetch", ticket, c.weight("table", 20, 8), hot, store="t", tier=tier, cache_bytes=9000,
         record=48, page=PAGE)  # fmt: skip
    c.module.level, c.module.store = Level.FUSED, c.store
    path = api.compile(c.module, output=folder / f"session-{tier}.dsv4", passes="", golden=False)
    session = LayerSession(path)
    assert session.step(rows=np.zeros((1, 0, 3), np.int32))["engram_fetch"].shape == (1, 0, 24)
    with pytest.raises(SessionError, match=r"t: a row id is outside the table; allowed: 0\.\.19"):
        session.step(rows=support.ints(0, 20, 3).reshape(1, 1, 3))
    given = {"rows": support.ints(0, 7, -1).reshape(1, 1, 3)}
    want = c.meaning(given)["engram_fetch"]
    np.testing.assert_array_equal(session.step(**given)["engram_fetch"], want)
