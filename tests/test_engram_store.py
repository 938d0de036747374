"""Looked-up tables at run time: records, directory, cache, reads, damage, threads; no compiler needed."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Arr

from dsv4c.errors import ArtifactError, SessionError, UsageError
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.container.tables import PAGE, Directory, TableLayout, directory, seal, unbroken
from dsv4c.runtime.engram import TableOptions, TableStore
from dsv4c.runtime.engram import queue as queues
from dsv4c.runtime.engram.cache import WAYS, RecordCache
from dsv4c.runtime.engram.lookup import Lookup

ROWS, PAYLOAD, RECORD = 1999, 264, 272
DISK = TableOptions(tier="disk")


def payloads(rows: int = ROWS, payload: int = PAYLOAD) -> Arr:
    return np.random.default_rng(3).integers(0, 256, (rows, payload), np.uint8)


def write(path: Path, hot: Arr, rows: int = ROWS, tier: str = "disk", cache_bytes: int = 40_000) -> Path:
    """An artifact with one table `t`, written the plain way."""
    layout = TableLayout("t", rows, PAYLOAD, RECORD, PAGE, len(hot))
    records = seal(payloads(rows), np.arange(rows), RECORD)
    cold = np.delete(records, hot, axis=0)
    pages = np.zeros((layout.pages, PAGE), np.uint8)
    for i, record in enumerate(cold):
        at = i % layout.slots * RECORD
        pages[i // layout.slots, at : at + RECORD] = record
    bits, ranks = directory(hot, rows)
    with ArtifactWriter(path) as w:
        for (name, (dtype, shape)), array in zip(
            layout.shapes().items(), (bits, ranks, records[hot], pages), strict=True
        ):
            w.add_tensor(name, dtype, shape, array, align=PAGE)
        facts = {"layout": layout.meta(), "tier": tier, "cache_bytes": cache_bytes}
        w.set_meta("tables", {"t": {**facts, "all_cache_bytes": cache_bytes}})
    return path


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """On the disk of the repository: temporary folders are often in memory, which takes no direct reads."""
    here = Path(__file__).parents[1] / "build"
    here.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=here) as name:
        yield Path(name)


HOT = np.sort(np.random.default_rng(5).choice(ROWS, 300, replace=False))


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return write(folder / "table.dsv4", HOT)


def ask(lookup: Lookup, ids: Arr) -> Arr:
    out = np.full((*ids.shape, RECORD), 7, np.uint8)
    lookup.fetch(lookup.prefetch(ids), out)
    return out


def expected(ids: Arr) -> Arr:
    return np.where(ids[..., None] < 0, 0, payloads()[np.maximum(ids, 0)]).astype(np.uint8)


# ------------------------------------------------------------------------------ records, directory


@pytest.mark.parametrize("payload", [1, 8, 264, 4088, 8000])
def test_records_come_back_and_name_themselves(payload: int) -> None:
    record = -(-(payload + 8) // 16) * 16
    ids = np.array([0, 5, 2**31 - 1])
    given = np.random.default_rng(0).integers(0, 256, (3, payload), np.uint8)
    records = seal(given, ids, record)
    assert records.shape == (3, record)
    np.testing.assert_array_equal(records[:, :payload], given)
    assert unbroken(records, ids).all()
    assert not unbroken(records, ids[::-1].copy())[[0, 2]].any()  # whole, but other rows


def test_every_changed_byte_is_seen() -> None:
    records = seal(payloads(1), np.array([9]), RECORD)
    for at in range(RECORD):
        broken = records.copy()
        broken[0, at] ^= 0x40
        assert not unbroken(broken, np.array([9])).any(), at
    assert not unbroken(np.zeros((1, RECORD), np.uint8), np.array([0])).any()  # a hole in a file


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 5000])
def test_the_directory_counts(rows: int) -> None:
    rng = np.random.default_rng(rows)
    for count in {1, rows // 3, rows} - {0}:
        hot = np.sort(rng.choice(rows, count, replace=False))
        found, rank = Directory(*directory(hot, rows)).find(np.arange(rows))
        np.testing.assert_array_equal(found, np.isin(np.arange(rows), hot))
        np.testing.assert_array_equal(rank, np.searchsorted(hot, np.arange(rows)))


def test_the_directory_costs_what_it_says() -> None:
    hot = np.arange(0, 100_000, 7)
    layout = TableLayout("t", 100_000, PAYLOAD, RECORD, PAGE, len(hot))
    bits, ranks = directory(hot, layout.rows)
    assert bits.nbytes + ranks.nbytes == layout.directory_bytes
    assert layout.directory_bytes * 8 / layout.rows == pytest.approx(1.0625, rel=0.01)
    assert TableLayout("t", 100_000, PAYLOAD, RECORD, PAGE).directory_bytes == 0
    found, rank = Directory(*directory(np.empty(0, np.int64), 100)).find(np.arange(100))
    assert not found.any() and not rank.any()


@pytest.mark.parametrize("change", [{"record": 271}, {"record": 256}, {"page": 4095}, {"page": 0},
                                    {"hot_rows": ROWS + 1}, {"rows": 0}, {"payload": -1}])  # fmt: skip
def test_sizes_that_contradict_each_other_are_refused(change: dict[str, int]) -> None:
    sizes = {"rows": ROWS, "payload": PAYLOAD, "record": RECORD, "page": PAGE, "hot_rows": 0} | change
    with pytest.raises(ArtifactError, match="table 't' has"):
        TableLayout("t", **sizes)


# ------------------------------------------------------------------------------ cache


def put(cache: RecordCache, ids: list[int]) -> int:
    return cache.put(np.array(ids), seal(payloads()[ids], np.array(ids), RECORD))


def held(cache: RecordCache, ids: list[int]) -> list[bool]:
    out = np.zeros((len(ids), RECORD), np.uint8)
    found = cache.take(np.array(ids, np.int64), out, np.arange(len(ids)))
    assert unbroken(out[found], np.array(ids)[found]).all()
    assert not out[~found].any()
    return list(found)


def test_the_cache_keeps_its_budget() -> None:
    for budget in (0, 100, 2239, 2240, 100_000):
        cache = RecordCache(budget, RECORD)
        assert cache.nbytes <= budget and cache.sets == budget // (WAYS * (RECORD + 8))
        put(cache, list(range(500)))
        assert sum(held(cache, list(range(500)))) <= cache.sets * WAYS


def test_the_least_recently_used_goes_first() -> None:
    cache = RecordCache(WAYS * (RECORD + 8), RECORD)  # one set
    assert [put(cache, [i]) for i in range(WAYS)] == [0] * WAYS
    assert held(cache, [0, 1]) == [True, True]
    assert put(cache, [100]) == 1
    assert held(cache, [2]) == [False] and all(held(cache, [0, 1, 3, 4, 5, 6, 7, 100]))
    assert put(cache, [101, 101]) == 1  # the same row twice
    assert sum(held(cache, [*range(WAYS), 100, 101])) == WAYS


def test_ages_start_anew_before_they_run_out() -> None:
    cache = RecordCache(WAYS * (RECORD + 8), RECORD)
    put(cache, [1])
    cache._tick = 2**32 - 2
    for i in range(2, 6):
        put(cache, [i])
    assert all(held(cache, [1, 2, 3, 4, 5]))


# ------------------------------------------------------------------------------ lookups


@pytest.mark.parametrize(
    "options",
    [
        TableOptions(), TableOptions(tier="resident"), TableOptions(synchronous=True),
        TableOptions(direct=False), TableOptions(cache_bytes=0),
    ],
)  # fmt: skip
def test_every_way_of_reading_gives_the_same_rows(path: Path, options: TableOptions) -> None:
    lookup = Lookup(TableStore(Artifact.open(path), "t", options), options.synchronous)
    rng = np.random.default_rng(1)
    for shape in ((1, 1, 1), (2, 3, 24), (1, 200, 24), (1, 0, 24)):
        ids = rng.integers(-1, ROWS, shape).astype(np.int32)
        out = ask(lookup, ids)
        np.testing.assert_array_equal(out[..., :PAYLOAD], expected(ids))
        assert not out[ids < 0].any()
    everything = np.arange(ROWS, dtype=np.int32).reshape(1, 1, -1)
    np.testing.assert_array_equal(ask(lookup, everything)[..., :PAYLOAD], expected(everything))


def test_what_is_counted(path: Path) -> None:
    store = TableStore(Artifact.open(path), "t", TableOptions(cache_bytes=1_000_000))
    lookup, cold = Lookup(store), np.setdiff1d(np.arange(ROWS), HOT)
    ask(lookup, np.array([HOT[0], HOT[1], cold[0], cold[1], cold[-1], -1]))
    s = store.statistics
    assert (s.rows, s.hot, s.cached, s.read, s.pages) == (5, 2, 0, 3, 2)  # two rows of one page
    assert s.bytes == 2 * PAGE and s.ready + s.stalls == 1 and s.hit_rate == 0.4
    ask(lookup, np.array([cold[0], cold[1]]))
    assert (s.rows, s.cached, s.read, s.pages) == (7, 2, 3, 2)
    store.reset_statistics()
    assert store.statistics.rows == 0 and store.statistics.hit_rate == 1.0


def test_a_prefetch_is_done_before_the_fetch(path: Path) -> None:
    store = TableStore(Artifact.open(path), "t", TableOptions(cache_bytes=0))
    lookup = Lookup(store)
    tickets = [lookup.prefetch(np.arange(i, i + 20)) for i in (0, 40, 80)]
    for ticket in tickets:
        assert lookup._own is not None and ticket.batch is not None
        lookup._own.wait(ticket.batch)
    for ticket, start in zip(tickets[::-1], (80, 40, 0), strict=True):  # in any order
        out = np.empty((20, RECORD), np.uint8)
        lookup.fetch(ticket, out)
        np.testing.assert_array_equal(out[:, :PAYLOAD], payloads()[start : start + 20])
    assert store.statistics.stalls == 0 and store.statistics.ready == 3


def test_more_tickets_than_the_queue_is_deep(path: Path) -> None:
    lookup = Lookup(TableStore(Artifact.open(path), "t", TableOptions(cache_bytes=0)))
    rng = np.random.default_rng(2)
    asked = [rng.integers(0, ROWS, 90) for _ in range(12)]
    tickets = [lookup.prefetch(ids) for ids in asked]
    assert any(t.job for t in tickets) and any(t.batch for t in tickets)
    for ids, ticket in zip(asked, tickets, strict=True):
        out = np.empty((90, RECORD), np.uint8)
        lookup.fetch(ticket, out)
        np.testing.assert_array_equal(out[:, :PAYLOAD], payloads()[ids])


def test_abandoned_tickets_give_their_memory_back(path: Path) -> None:
    lookup = Lookup(TableStore(Artifact.open(path), "t", TableOptions(cache_bytes=0)))
    for _ in range(5):
        for start in (0, 900):
            lookup.prefetch(np.arange(start, start + 900))
        lookup.abandon()
    assert lookup._own is not None and len(lookup._own.free) == queues.DEPTH
    np.testing.assert_array_equal(ask(lookup, np.arange(40))[:, :PAYLOAD], payloads()[:40])


def test_threads_hammer_one_store(path: Path) -> None:
    store = TableStore(Artifact.open(path), "t", TableOptions(cache_bytes=60_000))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        lookup, rng = Lookup(store), np.random.default_rng(seed)
        for _ in range(60):
            ids = (ROWS * rng.random((1, 3, 24)) ** 3).astype(np.int32)
            if not np.array_equal(ask(lookup, ids)[..., :PAYLOAD], expected(ids)):
                wrong.append((seed, ids))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    s = store.statistics
    assert s.rows == 6 * 60 * 72 == s.hot + s.cached + s.read and s.evicted > 0


def test_one_process_has_one_store_per_table(path: Path) -> None:
    a, b = Artifact.open(path), Artifact.open(path)
    assert TableStore.open(a, "t", DISK) is (first := TableStore.open(b, "t", DISK))
    assert TableStore.open(a, "t", TableOptions(tier="disk", cache_bytes=0)) is not first


def test_a_row_beyond_the_table_is_refused(path: Path) -> None:
    lookup = Lookup(TableStore(Artifact.open(path), "t"))
    with pytest.raises(SessionError, match=r"outside the table; allowed: 0\.\.1998"):
        lookup.prefetch(np.array([ROWS]))


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="tier = 'cloud'; allowed: resident, disk"):
        TableOptions(tier="cloud")
    with pytest.raises(UsageError, match="cache_bytes = -1"):
        TableOptions(cache_bytes=-1)


# ------------------------------------------------------------------------------ what can go wrong


def test_direct_reads_fall_back_and_say_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(file: Any, flags: int, *more: Any, **kw: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, flags, *more, **kw)

    monkeypatch.setattr(os, "open", refuse)
    store = TableStore(Artifact.open(path), "t")
    lookup = Lookup(store)
    assert not store.direct and lookup.queue == "threads"
    np.testing.assert_array_equal(ask(lookup, np.arange(60))[:, :PAYLOAD], payloads()[:60])


def test_without_native_reads_threads_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_CALLS", {})
    lookup = Lookup(TableStore(Artifact.open(path), "t"))
    assert lookup.queue == "threads"
    np.testing.assert_array_equal(ask(lookup, np.arange(600))[:, :PAYLOAD], payloads()[:600])


@pytest.mark.parametrize("direct", [True, False])
def test_damage_and_loss_name_file_and_offset(folder: Path, direct: bool) -> None:
    path = write(folder / f"broken{direct}.dsv4", np.empty(0, np.int64))
    artifact = Artifact.open(path)
    store = TableStore(artifact, "t", TableOptions(direct=direct, cache_bytes=0))
    lookup, offset = Lookup(store), store.cold_offset
    with path.open("r+b") as file:
        file.seek(offset + 2 * PAGE + 5)
        byte = file.read(1)
        file.seek(offset + 2 * PAGE + 5)
        file.write(bytes([byte[0] ^ 1]))
    where = f"{path}, table t, offset"
    with pytest.raises(SessionError, match=f"{where} {offset + 2 * PAGE}: row 30 does not match its seal"):
        ask(lookup, np.arange(60))
    np.testing.assert_array_equal(ask(lookup, np.arange(20))[:, :PAYLOAD], payloads()[:20])  # it goes on
    os.truncate(path, offset + 3 * PAGE + 100)
    with pytest.raises(SessionError, match=f"{where} {offset + 3 * PAGE}: a page ends after 100 of 4096"):
        ask(lookup, np.arange(50, 60))
    with pytest.raises(SessionError, match="a page ends after 0 of 4096 bytes"):
        ask(lookup, np.arange(100, 1500))  # by the thread that reads many


def test_a_read_that_the_system_refuses(path: Path) -> None:
    lookup = Lookup(TableStore(Artifact.open(path), "t", TableOptions(cache_bytes=0)))
    assert lookup._own is not None
    lookup._own.queue = queues.ThreadQueue(-1, lookup._own.memory)
    with pytest.raises(SessionError, match="a page cannot be read: Bad file descriptor"):
        ask(lookup, np.arange(60))


def test_native_reads_that_cannot_be_started(path: Path) -> None:
    memory = queues.Pages(PAGE)
    queue = queues.NativeQueue(10**6, memory)
    queue.submit(np.array([0, 1]), np.array([0, PAGE]))
    slots, results = queue.finish(block=True)
    assert list(slots) == [0, 1] and list(results) == [-errno.EBADF] * 2
    queue.close()
    queue.close()


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
