"""One user of a table: starts reading rows, and hands them out when they are needed.

A lookup belongs to one thread at a time; many lookups share a `TableStore`.
"""

from __future__ import annotations

import os
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsv4c.errors import SessionError
from dsv4c.runtime.container.tables import unbroken

from .queue import DEPTH, Pages, ReadQueue, open_queue
from .store import TableStore

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


@dataclass(eq=False)
class Ticket:
    """Rows on their way.

    Attributes:
        ids: of the rows that are no padding; `where` says which of the flat ids they are, None that all are.
        records: [n,record], complete when nothing is missing.
        missing: indices into `ids` of the rows to read; `cold` their numbers among the cold rows.
        job: the wait for a batch too large to be started at once.
    """

    where: npt.NDArray[np.intp] | None
    ids: Ids
    records: Bytes
    missing: npt.NDArray[np.intp]
    cold: Ids
    batch: _Batch | None = None
    job: Future[None] | None = None


@dataclass(eq=False)
class _Batch:
    """Distinct pages under way: ascending page numbers, and the slots of memory that they go to."""

    pages: Ids
    slots: Ids


class _Reader:
    """A queue with its memory: at most `DEPTH` pages under way, whichever batch they belong to."""

    def __init__(self, store: TableStore) -> None:
        self.store, self.size = store, store.layout.page
        self.memory = Pages(self.size)
        self.queue: ReadQueue = open_queue(store.fd, self.memory, store.direct)
        self.free = np.arange(DEPTH)
        self._done, self._results = np.ones(DEPTH, np.bool_), np.zeros(DEPTH, np.int64)

    def start(self, pages: Ids) -> _Batch:
        """Begin to read distinct pages, at most as many as memory is free for."""
        batch = _Batch(pages, self.free[: len(pages)])
        self.free = self.free[len(pages) :]
        self._done[batch.slots] = False
        self.queue.submit(batch.slots, self.store.cold_offset + pages * self.size)
        return batch

    def done(self, batch: _Batch) -> bool:
        """Whether all pages have come; does not wait."""
        if not self._done[batch.slots].all():
            self._take(block=False)
        return bool(self._done[batch.slots].all())

    def wait(self, batch: _Batch) -> None:
        while not self._done[batch.slots].all():
            self._take(block=True)

    def _take(self, block: bool) -> None:
        slots, results = self.queue.finish(block)
        self._results[slots] = results
        self._done[slots] = True

    def release(self, batch: _Batch) -> None:
        """Wait for a batch and give its memory back."""
        self.wait(batch)
        self.free = np.concatenate([self.free, batch.slots])

    def records(self, batch: _Batch, cold: Ids, ids: Ids) -> Bytes:
        """The records of cold rows [n], all of whose pages are in the batch, which is then released.

        Raises:
            SessionError: a page could not be read, or is not what was written.
        """
        self.release(batch)
        slots, record = self.store.layout.slots, self.store.layout.record
        self._check_reads(batch)
        page = batch.slots[np.searchsorted(batch.pages, cold // slots)]
        room = self.memory.array[:, : slots * record].reshape(DEPTH, slots, record)
        found: Bytes = room[page, cold % slots]
        good = unbroken(found, ids)
        if not good.all():
            bad = int(np.flatnonzero(~good)[0])
            what = f"row {ids[bad]} does not match its seal: the file is damaged"
            self._fail(what, int(cold[bad] // slots))
        return found

    def _check_reads(self, batch: _Batch) -> None:
        results = self._results[batch.slots]
        if not (results == self.size).all():
            bad = int(np.flatnonzero(results != self.size)[0])
            result, page = int(results[bad]), int(batch.pages[bad])
            if result < 0:
                self._fail(f"a page cannot be read: {os.strerror(-result)}", page)
            self._fail(f"a page ends after {result} of {self.size} bytes: the file is cut short", page)

    def _fail(self, what: str, page: int) -> None:
        raise SessionError(
            what,
            where=f"{self.store.path}, table {self.store.layout.name}, offset "
            f"{self.store.cold_offset + page * self.size}",
            hint="the session is as it was before the step; copy the file again from its source",
        )


class Lookup:
    """Prefetches and fetches rows of one table.

    Args:
        synchronous: read when rows are fetched, not when they are prefetched.
    """

    def __init__(self, store: TableStore, synchronous: bool = False) -> None:
        self.store, self.synchronous = store, synchronous
        disk = store.tier == "disk"
        self._own = _Reader(store) if disk else None
        self._behind = _Reader(store) if disk else None
        self._pool = ThreadPoolExecutor(1, "dsv4c-table") if disk else None
        self._pending: list[Ticket] = []
        weakref.finalize(self, _close, self._own, self._behind, self._pool)

    @property
    def queue(self) -> str:
        """How pages are read: "native", "threads", or "" for a resident table."""
        return self._own.queue.name if self._own else ""

    def prefetch(self, ids: npt.NDArray[np.integer]) -> Ticket:
        """Begin to read the rows of ids (any shape; -1 is padding).

        Raises:
            SessionError: an id is beyond the table.
        """
        own, where = ids.reshape(-1).astype(np.int64), None
        if own.size and own.min() < 0:
            where = np.flatnonzero(own >= 0)
            own = own[where]
        records = np.empty((len(own), self.store.layout.record), np.uint8)
        missing, cold = self.store.gather(own, records)
        ticket = Ticket(where, own, records, missing, cold)
        if len(missing) and not self.synchronous:
            self._begin(ticket)
        self._pending.append(ticket)
        return ticket

    def _begin(self, ticket: Ticket) -> None:
        """Few pages are started here and now; many are read by a thread, which waits for the device."""
        assert self._own is not None and self._pool is not None
        pages = _distinct(ticket.cold // self.store.layout.slots)
        if len(pages) <= len(self._own.free):
            ticket.batch = self._own.start(pages)
        else:
            ticket.job = self._pool.submit(self._read_all, ticket, pages)

    def _read_all(self, ticket: Ticket, pages: Ids) -> None:
        reader = self._behind
        assert reader is not None
        order = np.argsort(ticket.cold, kind="stable")
        number = ticket.cold[order] // self.store.layout.slots
        for start in range(0, len(pages), DEPTH):
            part = pages[start : start + DEPTH]
            batch = reader.start(part)
            low, high = np.searchsorted(number, (part[0], part[-1] + 1))
            self._fill(reader, batch, ticket, order[low:high])

    def _fill(
        self, reader: _Reader, batch: _Batch, ticket: Ticket, which: npt.NDArray[np.intp] | slice
    ) -> None:
        """Put what was read into the ticket and the cache."""
        at = ticket.missing[which]
        found = reader.records(batch, ticket.cold[which], ticket.ids[at])
        ticket.records[at] = found
        self.store.keep(ticket.ids[at], found)
        self.store.count_pages(len(batch.pages))

    def fetch(self, ticket: Ticket, out: Bytes) -> None:
        """Wait for a ticket and write its records into out u8 [..., record]; zeros where the id is padding.

        Raises:
            SessionError: a row cannot be read or is damaged; names file and offset.
        """
        self._pending.remove(ticket)
        if len(ticket.missing):
            self._complete(ticket)
        flat = out.reshape(-1, self.store.layout.record)
        if ticket.where is None:
            flat[...] = ticket.records
        else:
            flat[...] = 0
            flat[ticket.where] = ticket.records

    def _complete(self, ticket: Ticket) -> None:
        start = time.perf_counter()
        if ticket.batch is None and ticket.job is None:
            self._begin(ticket)
        if ticket.batch is not None:
            assert self._own is not None
            ready = self._own.done(ticket.batch)
            self._fill(self._own, ticket.batch, ticket, slice(None))
        else:
            assert ticket.job is not None
            ready = ticket.job.done()
            ticket.job.result()
        self.store.count_wait(ready, time.perf_counter() - start)

    def abandon(self) -> None:
        """Forget every ticket that was not fetched; waits for their reads, which own memory until then."""
        for ticket in self._pending:
            if ticket.batch is not None:
                assert self._own is not None
                self._own.release(ticket.batch)
            elif ticket.job is not None:
                ticket.job.exception()
        self._pending.clear()


def _distinct(numbers: Ids) -> Ids:
    """`np.unique`, without its overhead on a few numbers."""
    ordered = np.sort(numbers)
    new = np.empty(len(ordered), np.bool_)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def _close(own: _Reader | None, behind: _Reader | None, pool: ThreadPoolExecutor | None) -> None:
    """Readers hold the memory that reads go to, until the queues are through with it."""
    if pool is not None:
        pool.shutdown()
    for reader in (own, behind):
        if reader is not None:
            reader.queue.close()
