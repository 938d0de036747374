"""Looked-up tables at run time by compiled kernels: records, directory, cache, lookups, threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_table import PAYLOAD, RECORD, ROWS, Lookup, disk, expected, payloads, sealed, write
from support import Arr

from dsv4c.errors import ArtifactError, SessionError, UsageError
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.handles import OLDEST, WAYS, Store, Ticket, Tier
from dsv4c.runtime.container.tables import PAGE, TableLayout, directory, seal
from dsv4c.runtime.engram import TableOptions, TableStore

DISK = TableOptions(tier="disk")
NO_CACHE = TableOptions(cache_bytes=0)
ONE_SET = TableOptions(cache_bytes=WAYS * (RECORD + 8))
HOT = np.sort(np.random.default_rng(5).choice(ROWS, 300, replace=False))
NO_HOT = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with disk() as path:
        yield path


@pytest.fixture
def path(folder: Path) -> Path:
    """A file of the test's own: what sessions of one file share would outlive it."""
    return write(folder / "table.dsv4", HOT)


@pytest.fixture
def cold_path(folder: Path) -> Path:
    """A table without hot rows."""
    return write(folder / "cold.dsv4", NO_HOT)


# ------------------------------------------------------------------------------ records, directory


def unbroken(lookup: Lookup, records: Arr, ids: Arr) -> list[bool]:
    """Whether the kernel takes each record for that of its row."""
    good = []
    for i in range(len(ids)):
        try:
            found = lookup.receive(records[i : i + 1], ids[i : i + 1])
        except SessionError as error:
            assert f"row {ids[i]} does not match its seal" in str(error)
            good.append(False)
        else:
            np.testing.assert_array_equal(found, records[i : i + 1])
            good.append(True)
    return good


@pytest.mark.parametrize("payload", [1, 8, 264, 4088, 8000])
def test_records_come_back_and_name_themselves(folder: Path, payload: int) -> None:
    record = -(-(payload + 8) // 16) * 16
    ids = np.array([0, 5, 2**31 - 1])
    given = np.random.default_rng(0).integers(0, 256, (3, payload), np.uint8)
    records = seal(given, ids, record)
    assert records.shape == (3, record)
    np.testing.assert_array_equal(records[:, :payload], given)
    path = write(folder / f"payload{payload}.dsv4", NO_HOT, 40, payload)
    lookup = Lookup(Artifact.open(path), NO_CACHE)
    np.testing.assert_array_equal(lookup.receive(records, ids), records)
    assert unbroken(lookup, records, ids) == [True] * 3
    assert unbroken(lookup, records, ids[::-1].copy()) == [False, True, False]  # whole, but other rows
    with pytest.raises(SessionError, match="row 6 does not match its seal"):
        lookup.receive(records, np.array([0, 6, 2**31 - 1]))
    np.testing.assert_array_equal(lookup.ask(np.arange(40)), sealed(40, payload))


def test_every_changed_byte_is_seen(path: Path) -> None:
    lookup, row = Lookup(Artifact.open(path), NO_CACHE), np.array([9])
    records = seal(payloads(1), row, RECORD)
    assert unbroken(lookup, records, row) == [True]
    for at in range(RECORD):
        broken = records.copy()
        broken[0, at] ^= 0x40
        assert unbroken(lookup, broken, row) == [False], at
    assert unbroken(lookup, np.zeros((1, RECORD), np.uint8), np.array([0])) == [False]  # a hole in a file


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 5000])
def test_the_directory_counts(folder: Path, rows: int) -> None:
    rng, everything = np.random.default_rng(rows), np.arange(rows)
    for count in {1, rows // 3, rows} - {0}:
        hot = np.sort(rng.choice(rows, count, replace=False))
        path = write(folder / f"rows{rows}-{count}.dsv4", hot, rows, 8)
        lookup = Lookup(Artifact.open(path), TableOptions(synchronous=True, cache_bytes=0))
        ticket = lookup.prefetch(everything)
        cold, named = np.setdiff1d(everything, hot), ticket.missing[:, :3]
        np.testing.assert_array_equal(named[:, Ticket.ID - Ticket.EACH], cold)
        np.testing.assert_array_equal(named[:, Ticket.INDEX - Ticket.EACH], cold)
        np.testing.assert_array_equal(named[:, Ticket.COLD - Ticket.EACH], cold - np.searchsorted(hot, cold))
        np.testing.assert_array_equal(ticket.found[0, hot, 0], sealed(rows, 8)[hot])  # ranks of hot rows
        assert lookup.store.statistics.hot == count
        np.testing.assert_array_equal(lookup.fetch(ticket), sealed(rows, 8))


def test_the_directory_costs_what_it_says(folder: Path) -> None:
    hot = np.arange(0, 100_000, 7)
    layout = TableLayout("t", 100_000, PAYLOAD, RECORD, PAGE, len(hot))
    bits, ranks = directory(hot, layout.rows)
    assert bits.nbytes + ranks.nbytes == layout.directory_bytes
    assert layout.directory_bytes * 8 / layout.rows == pytest.approx(1.0625, rel=0.01)
    assert TableLayout("t", 100_000, PAYLOAD, RECORD, PAGE).directory_bytes == 0
    lookup = Lookup(Artifact.open(write(folder / "none.dsv4", NO_HOT, 100)), NO_CACHE)
    assert lookup.store.memory_bytes["directory"] == 0
    ticket = lookup.prefetch(np.arange(100))
    np.testing.assert_array_equal(ticket.missing[:, Ticket.COLD - Ticket.EACH], np.arange(100))
    np.testing.assert_array_equal(lookup.fetch(ticket), sealed(100))
    assert lookup.store.statistics.hot == 0


@pytest.mark.parametrize("change", [{"record": 271}, {"record": 256}, {"page": 4095}, {"page": 0},
                                    {"hot_rows": ROWS + 1}, {"rows": 0}, {"payload": -1}])  # fmt: skip
def test_sizes_that_contradict_each_other_are_refused(change: dict[str, int]) -> None:
    sizes = {"rows": ROWS, "payload": PAYLOAD, "record": RECORD, "page": PAGE, "hot_rows": 0} | change
    with pytest.raises(ArtifactError, match="table 't' has"):
        TableLayout("t", **sizes)


# ------------------------------------------------------------------------------ cache


def put(lookup: Lookup, ids: list[int]) -> int:
    """Read rows; how many others had to go."""
    before = lookup.store.statistics.evicted
    lookup.check(np.array(ids))
    return lookup.store.statistics.evicted - before


def held(lookup: Lookup, ids: list[int]) -> list[bool]:
    """Which rows of a table without hot ones the cache has; they are used now."""
    ticket = lookup.prefetch(np.array(ids))
    found = np.ones(len(ids), np.bool_)
    found[ticket.missing[:, Ticket.INDEX - Ticket.EACH]] = False
    lookup.abandon()
    records = ticket.found[0, :, 0]
    np.testing.assert_array_equal(records[found], sealed()[np.array(ids)[found]])
    assert not records[~found].any()
    return list(found)


@pytest.mark.parametrize("budget", [0, 100, 2239, 2240, 100_000])
def test_the_cache_keeps_its_budget(cold_path: Path, budget: int) -> None:
    lookup = Lookup(Artifact.open(cold_path), TableOptions(cache_bytes=budget))
    store = lookup.store
    assert store.memory_bytes["cache"] <= budget and store.sets == budget // (WAYS * (RECORD + 8))
    evicted, kept = put(lookup, list(range(500))), sum(held(lookup, list(range(500))))
    assert kept <= store.sets * WAYS
    assert (kept > 0 and kept + evicted == 500) if store.sets else (kept, evicted) == (0, 0)


def test_the_least_recently_used_goes_first(cold_path: Path) -> None:
    lookup = Lookup(Artifact.open(cold_path), ONE_SET)
    assert lookup.store.sets == 1
    assert [put(lookup, [i]) for i in range(WAYS)] == [0] * WAYS
    assert held(lookup, [0, 1]) == [True, True]
    assert put(lookup, [100]) == 1
    assert held(lookup, [2]) == [False] and all(held(lookup, [0, 1, 3, 4, 5, 6, 7, 100]))
    assert put(lookup, [101, 101]) == 1  # the same row twice
    assert sum(held(lookup, [*range(WAYS), 100, 101])) == WAYS
    assert held(lookup, [101, 0]) == [True, False]  # the oldest of those used last


def test_ages_start_anew_before_they_run_out(cold_path: Path) -> None:
    lookup = Lookup(Artifact.open(cold_path), ONE_SET)
    put(lookup, [1])
    lookup.store._words[Store.AGE] = OLDEST - 1
    for i in range(2, 6):
        assert put(lookup, [i]) == 0
    assert lookup.store._words[Store.AGE] == 4 and lookup.store._ages[:, WAYS:].max() == 4
    assert all(held(lookup, [1, 2, 3, 4, 5]))
    lookup.store._words[Store.AGE] = OLDEST  # while a row is found
    assert all(held(lookup, [3, 1])) and lookup.store._words[Store.AGE] == 3
    assert [put(lookup, [i]) for i in range(6, 12)] == [0, 0, 0, 1, 1, 1]  # others are equally old
    assert all(held(lookup, [1, 3]))


# ------------------------------------------------------------------------------ lookups


@pytest.mark.parametrize(
    "options",
    [
        TableOptions(), TableOptions(tier="resident"), TableOptions(synchronous=True),
        TableOptions(direct=False), TableOptions(cache_bytes=0),
        TableOptions(direct=False, synchronous=True, cache_bytes=0),
    ],
)  # fmt: skip
def test_every_way_of_reading_gives_the_same_rows(path: Path, options: TableOptions) -> None:
    lookup = Lookup(Artifact.open(path), options)
    rng = np.random.default_rng(1)
    for shape in ((1, 1, 1), (2, 3, 24), (1, 200, 24), (1, 0, 24)):
        lookup.check(rng.integers(-1, ROWS, shape).astype(np.int32))
    lookup.check(np.arange(ROWS))
    lookup.check(np.full(7, -1))
    assert lookup.all_free()


def test_what_is_counted(path: Path) -> None:
    lookup = Lookup(Artifact.open(path), TableOptions(cache_bytes=1_000_000))
    store, cold = lookup.store, np.setdiff1d(np.arange(ROWS), HOT)
    lookup.ask(np.array([HOT[0], HOT[1], cold[0], cold[1], cold[-1], -1]))
    s = store.statistics
    assert (s.rows, s.hot, s.cached, s.read, s.pages) == (5, 2, 0, 3, 2)  # two rows of one page
    assert s.bytes == 2 * PAGE and s.ready + s.stalls == 1 and s.hit_rate == 0.4
    lookup.ask(np.array([cold[0], cold[1]]))
    s = store.statistics
    assert (s.rows, s.cached, s.read, s.pages, s.ready + s.stalls) == (7, 2, 3, 2, 1)
    store.reset_statistics()
    assert store.statistics.rows == 0 and store.statistics.hit_rate == 1.0


@pytest.mark.parametrize("direct", [True, False])
def test_a_prefetch_is_done_before_the_fetch(path: Path, direct: bool) -> None:
    lookup = Lookup(Artifact.open(path), TableOptions(cache_bytes=0, direct=direct))
    tickets = [lookup.prefetch(np.arange(i, i + 20)) for i in (0, 40, 80)]
    assert all(t.head[Ticket.WHO] for t in tickets)  # somebody reads already
    lookup.settle()
    for ticket, start in zip(tickets[::-1], (80, 40, 0), strict=True):  # in any order
        np.testing.assert_array_equal(lookup.fetch(ticket), sealed()[start : start + 20])
    s = lookup.store.statistics
    assert s.stalls == 0 and s.ready == 3 and s.stall_seconds == 0


def test_a_synchronous_table_is_read_when_it_is_fetched(path: Path) -> None:
    lookup = Lookup(Artifact.open(path), TableOptions(cache_bytes=0, synchronous=True))
    ticket = lookup.prefetch(np.arange(20))
    assert len(ticket.missing) and not ticket.head[Ticket.WHO] and lookup.all_free()
    np.testing.assert_array_equal(lookup.fetch(ticket), sealed()[:20])


def test_more_tickets_than_the_queue_is_deep(path: Path) -> None:
    lookup = Lookup(Artifact.open(path), NO_CACHE)
    rng = np.random.default_rng(2)
    asked = [rng.integers(0, ROWS, 90) for _ in range(12)]
    tickets = [lookup.prefetch(ids) for ids in asked]
    native = {Tier.NATIVE} if lookup.queue == "native" else set()
    assert {int(t.head[Ticket.WHO]) for t in tickets} == {Tier.HOST} | native
    for ids, ticket in zip(asked, tickets, strict=True):
        np.testing.assert_array_equal(lookup.fetch(ticket), sealed()[ids])
    assert lookup.all_free()


def test_abandoned_tickets_give_their_memory_back(path: Path) -> None:
    lookup = Lookup(Artifact.open(path), NO_CACHE)
    for _ in range(5):
        for start, count in ((0, 250), (900, 250), (0, 1900)):  # the last is more than the queue is deep
            lookup.prefetch(np.arange(start, start + count))
        assert not lookup.all_free()
        lookup.abandon()
        assert lookup.all_free()
    lookup.check(np.arange(40))


def test_threads_hammer_one_store(path: Path) -> None:
    options = TableOptions(cache_bytes=60_000)
    store = TableStore.open(Artifact.open(path), "t", options)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        lookup, rng = Lookup(Artifact.open(path), options), np.random.default_rng(seed)
        assert lookup.store is store
        for _ in range(60):
            ids = (ROWS * rng.random((1, 3, 24)) ** 3).astype(np.int32)
            if not np.array_equal(lookup.ask(ids), expected(ids)):
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
    assert Lookup(a, DISK).store is first


@pytest.mark.parametrize("tier", ["disk", "resident"])
def test_a_row_beyond_the_table_is_refused(path: Path, tier: str) -> None:
    lookup = Lookup(Artifact.open(path), TableOptions(tier=tier))
    for ids in ([ROWS], [0, 2**31 - 1]):
        with pytest.raises(SessionError, match=r"outside the table; allowed: 0\.\.1998"):
            lookup.prefetch(np.array(ids))
    assert lookup.store.statistics.rows == 0
    lookup.check(np.array([ROWS - 1]))  # nothing stayed locked


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="tier = 'cloud'; allowed: resident, disk"):
        TableOptions(tier="cloud")
    with pytest.raises(UsageError, match="cache_bytes = -1"):
        TableOptions(cache_bytes=-1)
