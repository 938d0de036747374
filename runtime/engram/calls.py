"""The looked-up tables of one backend, and what compiled code calls where it cannot go on alone.

A step gets one handle per table, an int64 tensor of `container.handles.Handle`: so the code names no table
and no file, and sessions with different files share it. Needs tvm_ffi.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, Dsv4cError, SessionError
from dsv4c.runtime.buffers import zeros
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.handles import BEGIN, FAIL, WAIT, Failure, Handle, Ticket, Tier
from dsv4c.runtime.ffi import tvm_ffi

from .background import Background
from .options import TableOptions
from .queue import NativeQueue, Pages
from .store import TableStore

_NUMBERS = itertools.count(1)
_BOUND: dict[int, Bound] = {}
_NAMES = {Tier.RESIDENT: "", Tier.NATIVE: "native", Tier.HOST: "threads"}


class Bound:
    """One table of one backend, and the large batches of the step that runs."""

    def __init__(self, store: TableStore, queue: NativeQueue | None, late: bool) -> None:
        self.store, self.number = store, next(_NUMBERS)
        self.background = Background(store) if store.tier == "disk" else None
        self.jobs: dict[int, Future[tuple[npt.NDArray[np.uint8], int]]] = {}
        self.failure: Dsv4cError | None = None
        disk = Tier.NATIVE if queue is not None and store.direct else Tier.HOST
        self.tier = disk if store.tier == "disk" else Tier.RESIDENT
        self.words = zeros((Handle.WORDS,), np.int64)
        store.describe(self.words)
        self.words[Handle.NUMBER], self.words[Handle.TIER] = self.number, self.tier
        self.words[Handle.LATE] = late
        self.words[Handle.QUEUE] = queue.words.ctypes.data if queue is not None else 0
        self.handle = tvm_ffi.from_dlpack(self.words)

    def abandon(self) -> None:
        """Forget what was begun; waits for it."""
        for job in self.jobs.values():
            job.exception()
        self.jobs.clear()
        self.failure = None


class Tables:
    """The looked-up tables of one backend.

    Attributes:
        stores: by name.

    Raises:
        ArtifactError: a table is missing or does not fit.
    """

    def __init__(self, artifact: Artifact, options: TableOptions | None = None) -> None:
        options, names = options or TableOptions(), artifact.meta["tvm"].get("tables", [])
        if not all(isinstance(n, str) for n in names):
            raise ArtifactError("names of tables must be text", where=str(artifact.path))
        self.stores = {name: TableStore.open(artifact, name, options) for name in names}
        self._queue = _open_queue([s for s in self.stores.values() if s.direct])
        self._bound = {n: Bound(s, self._queue, options.synchronous) for n, s in self.stores.items()}
        bound = list(self._bound.values())
        _BOUND.update({b.number: b for b in bound})
        weakref.finalize(self, _close, bound, self._queue)

    def handle(self, name: str) -> Any:
        """What a program takes for the table of that name."""
        return self._bound[name].handle

    @property
    def fallible(self) -> bool:
        """Whether a step reads files, which can fail in the middle of it."""
        return any(store.tier == "disk" for store in self.stores.values())

    def queues(self) -> dict[str, str]:
        """How each table's pages are read: "native", "threads", or "" for a resident one."""
        return {name: _NAMES[bound.tier] for name, bound in self._bound.items()}

    def clear(self) -> Dsv4cError | None:
        """After a step that failed: drop what it left, and tell which table made it fail, if one did."""
        failures = [b.failure for b in self._bound.values() if b.failure is not None]
        if self._queue is not None:
            self._queue.abandon()
        for bound in self._bound.values():
            bound.abandon()
        return failures[0] if failures else None


def _open_queue(stores: list[TableStore]) -> NativeQueue | None:
    """A queue for compiled code, or None: another system, a sandbox, or the machine's quota is used up."""
    if not stores:
        return None
    try:
        return NativeQueue(-1, Pages(max(s.layout.page for s in stores)))
    except OSError:
        return None


def _close(bound: list[Bound], queue: NativeQueue | None) -> None:
    """Wait for reads under way: until then they own memory."""
    for b in bound:
        del _BOUND[b.number]
        if b.background is not None:
            b.background.close()
    if queue is not None:
        queue.close()


def _ticket(address: ctypes.c_void_p) -> npt.NDArray[np.int32]:
    """The numbers of a ticket [1 + n, 4] for n missing rows."""
    assert address.value is not None
    count = ctypes.c_int32.from_address(address.value + 4 * Ticket.MISSING).value
    memory = (ctypes.c_int32 * (Ticket.EACH * (1 + count))).from_address(address.value)
    return np.frombuffer(memoryview(memory), np.int32).reshape(-1, Ticket.EACH)


def fail(number: int, reason: int, a: int, b: int) -> None:
    """See `container.handles.Failure`.

    Raises:
        SessionError: always.
    """
    bound = _BOUND[number]
    store = bound.store
    if reason == Failure.ROW:
        allowed = f"0..{store.layout.rows - 1}"
        bound.failure = SessionError(
            "a row id is outside the table", where=store.layout.name, allowed=allowed
        )
    elif reason == Failure.SEAL:
        bound.failure = store.error(f"row {b} does not match its seal: the file is damaged", a)
    elif reason == Failure.READ:
        bound.failure = store.read_error(b, a)
    else:
        bound.failure = SessionError(f"a table cannot be read: {os.strerror(a)}", where=store.path)
    raise bound.failure


def begin(number: int, ticket: ctypes.c_void_p) -> None:
    """Begin to read the missing rows of a ticket in the background, and note the job in it."""
    bound, numbers = _BOUND[number], _ticket(ticket)
    assert bound.background is not None
    job = max(bound.jobs, default=0) + 1
    bound.jobs[job] = bound.background.begin(numbers[1:].copy())
    numbers[0, Ticket.JOB] = job


def wait(number: int, ticket: ctypes.c_void_p, records: int) -> None:
    """Wait for a job, put its records to their places at the address `records`, and complete the ticket.

    Raises:
        SessionError: a page could not be read.
    """
    bound, numbers = _BOUND[number], _ticket(ticket)
    job = bound.jobs.pop(int(numbers[0, Ticket.JOB]))
    numbers[0, Ticket.DONE] = job.done()
    try:
        found, pages = job.result()
    except Dsv4cError as error:
        bound.failure = error
        raise
    except OSError as error:
        bound.failure = SessionError(f"a table cannot be read: {error}", where=bound.store.path)
        raise bound.failure from error
    index = numbers[1:, Ticket.INDEX - Ticket.EACH]
    memory = (ctypes.c_uint8 * ((int(index.max()) + 1) * found.shape[1])).from_address(records)
    np.frombuffer(memory, np.uint8).reshape(-1, found.shape[1])[index] = found
    numbers[0, Ticket.PAGES] = pages


for _name, _function in ((FAIL, fail), (BEGIN, begin), (WAIT, wait)):
    tvm_ffi.register_global_func(_name, _function, override=True)
