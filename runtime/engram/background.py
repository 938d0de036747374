"""Reading the rows of a large batch beside the step, by a thread that waits for the device.

Knows missing rows and pages; neither caches nor check sums, which belong to compiled code.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from dsv4c.runtime.container.handles import DEPTH, Ticket

from .queue import Pages, ReadQueue, open_queue
from .store import TableStore

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


class Background:
    """Reads of one table for one session, one batch after the other. Owns the memory that they go to."""

    def __init__(self, store: TableStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, "dsv4c-table")
        self._queue: ReadQueue | None = None

    def begin(self, rows: npt.NDArray[np.int32]) -> Future[tuple[Bytes, int]]:
        """Begin to read rows [n,4] as a ticket names them.

        Returns:
            A promise of their records [n,record], and how many pages were read. It holds a SessionError where
            a page cannot be read.
        """
        return self._pool.submit(self._read, rows[:, Ticket.COLD - Ticket.EACH].astype(np.int64))

    def _read(self, cold: Ids) -> tuple[Bytes, int]:
        """In waves, as many pages at once as there is memory for."""
        layout = self._store.layout
        slots, record = layout.slots, layout.record
        records = np.empty((len(cold), record), np.uint8)
        order = np.argsort(cold, kind="stable")
        number = cold[order] // slots
        pages = np.unique(number)
        for start in range(0, len(pages), DEPTH):
            part = pages[start : start + DEPTH]
            memory = self._pages(part)
            low, high = np.searchsorted(number, (part[0], part[-1] + 1))
            at = np.searchsorted(part, number[low:high])
            room = memory[:, : slots * record].reshape(-1, slots, record)
            records[order[low:high]] = room[at, cold[order[low:high]] % slots]
        return records, len(pages)

    def _pages(self, pages: Ids) -> Bytes:
        """At most DEPTH distinct pages [n,page], in memory that the next call overwrites."""
        size = self._store.layout.page
        if self._queue is None:
            self._memory = Pages(size)
            self._queue = open_queue(self._store.fd, self._memory, self._store.direct)
        results, left = np.zeros(len(pages), np.int64), len(pages)
        self._queue.submit(np.arange(len(pages)), self._store.cold_offset + pages * size)
        while left:
            slots, found = self._queue.finish(block=True)
            results[slots] = found
            left -= len(slots)
        wrong = np.flatnonzero(results != size)
        if len(wrong):
            raise self._store.read_error(int(results[wrong[0]]), int(pages[wrong[0]]))
        return self._memory.array[: len(pages)]

    def close(self) -> None:
        """Wait for reads under way."""
        self._pool.shutdown()
        if self._queue is not None:
            self._queue.close()
