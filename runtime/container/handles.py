"""How the runtime's side of a looked-up table lies in memory: words (int64) that compiled code reads and
writes.

Shared by who compiles and who runs, which must agree on it to the word. A table of a session is its `Handle`,
which nobody writes once it is made. It points to the `Store`, which all sessions of a process share under its
lock, and to the `Queue`, which belongs to one session's backend.
"""

from __future__ import annotations

DEPTH = 512
"""Reads of pages that may be under way in one queue; also its slots of memory."""
WAYS = 8
"""Records per set of a cache."""
SPREAD = 0x9E3779B1
"""The set of row i is i * SPREAD modulo the number of sets; below 2^63."""
OLDEST = 2**31 - 1
"""The last age of a record: then all become equally old."""


class Tier:
    """How rows that are not hot are found; `Handle.TIER`."""

    RESIDENT = 0
    NATIVE = 1
    """On disk, read by compiled code."""
    HOST = 2
    """On disk, read by the runtime's threads."""


class Handle:
    """Words of a table as one session sees it. Addresses are of memory that lives as long as the session.

    NUMBER: by which the runtime knows it. ROWS: ids are below. HOT, BITS, RANKS, COLD: addresses of the
    mapped tensors of `tables`; RANKS is 0 without hot rows. AGES i32 [SETS, 16]: row ids (-1 is none), then
    ages, of the records of a set, in one line of 64 bytes. RECORDS u8 [SETS * WAYS, record]. COLD_OFFSET: of
    the first page in the file. LATE: 1 to read when rows are fetched, not when they are prefetched.
    """

    NUMBER, TIER, LATE, ROWS = range(4)
    HOT, BITS, RANKS, COLD = range(4, 8)
    STORE, AGES, RECORDS, SETS = range(8, 12)
    QUEUE, FILE, COLD_OFFSET = range(12, 15)
    WORDS = 16


class Store:
    """Words of what sessions share: a `pthread_mutex_t`, all zeros when free, the last age, and counts.

    Counts are those of `TableStatistics`; STALLED is in nanoseconds.
    """

    LOCK, AGE = 0, 8
    ROWS, HOT, CACHED, READ, PAGES, READY, STALLS, STALLED, EVICTED = range(9, 18)
    WORDS = 24


class Queue:
    """Words of a queue of Linux native asynchronous I/O.

    CONTEXT, SUBMIT, EVENTS: what `io_setup` gave, and numbers of the system calls. MEMORY, SIZE: slots of
    SIZE bytes. FREE counts the entries of FREE_SLOTS; STARTED those of POINTERS, requests that are not yet
    handed to the system. RESULTS per slot: bytes read, minus an error number, or `PENDING`. REQUESTS are
    `iocb`, 8 words per slot, READ are `io_event`, 4 words each. NEVER: a timespec of no time.
    """

    CONTEXT, SUBMIT, GET_EVENTS, MEMORY, SIZE, FREE, STARTED = range(7)
    NEVER = 8
    FREE_SLOTS = 16
    RESULTS = FREE_SLOTS + DEPTH
    POINTERS = RESULTS + DEPTH
    REQUESTS = POINTERS + DEPTH
    EVENTS = REQUESTS + 8 * DEPTH
    WORDS = EVENTS + 4 * DEPTH
    PENDING = 2**40


class Ticket:
    """Numbers (int32) of a ticket, 4 per row and 4 in front: how many rows are MISSING, from how many PAGES,
    WHO reads them (0 before anybody does, else a `Tier`) and the JOB of the runtime, which overwrites it with
    whether the job was DONE in time.

    Behind them, for each missing row: its INDEX in the call, its ID, its number among the COLD rows, and the
    SLOT its page goes to.
    """

    MISSING, PAGES, WHO, JOB = range(4)
    DONE = JOB
    INDEX, ID, COLD, SLOT = range(4, 8)
    EACH = 4


class Failure:
    """Why compiled code calls the runtime: ROW (id) is beyond the table; READ (page, result); SEAL (page, row
    id) of a damaged record; SYSTEM (error number): native I/O itself failed."""

    ROW, READ, SEAL, SYSTEM = range(4)


FAIL, BEGIN, WAIT = "dsv4c.table_fail", "dsv4c.table_begin", "dsv4c.table_wait"
"""What the runtime registers. FAIL(number, reason, a, b) raises. BEGIN(number, ticket) begins to read a
ticket's missing rows in the background; WAIT(number, ticket, records) puts them where they belong."""
