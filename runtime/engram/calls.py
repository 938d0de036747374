"""What compiled code calls for its looked-up tables, and the tables of one backend.

A step gets one handle per table, an int64 tensor, and passes it back with every call: so the code names no
table and no file, and sessions with different files share the two functions. Needs tvm_ffi.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import tvm_ffi

from dsv4c.errors import ArtifactError, Dsv4cError, SessionError
from dsv4c.runtime.container import Artifact

from .lookup import Lookup, Ticket
from .options import TableOptions
from .store import TableStore

_NUMBERS = itertools.count(1)
_BOUND: dict[int, Bound] = {}


class Bound:
    """One table of one backend, and the tickets of the step that runs."""

    def __init__(self, lookup: Lookup) -> None:
        self.lookup, self.tickets, self.issued = lookup, dict[int, Ticket](), 0
        self.failure: Dsv4cError | None = None


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
        self._bound = [Bound(Lookup(store, options.synchronous)) for store in self.stores.values()]
        numbers = [next(_NUMBERS) for _ in self._bound]
        _BOUND.update(zip(numbers, self._bound, strict=True))
        self._arrays = [np.array([n], np.int64) for n in numbers]
        self._handles = {n: tvm_ffi.from_dlpack(a) for n, a in zip(names, self._arrays, strict=True)}
        weakref.finalize(self, _forget, numbers)

    def handle(self, name: str) -> Any:
        """What a program takes for the table of that name."""
        return self._handles[name]

    @property
    def fallible(self) -> bool:
        """Whether a step reads files, which can fail in the middle of it."""
        return any(store.tier == "disk" for store in self.stores.values())

    def queues(self) -> dict[str, str]:
        """How each table's pages are read: "native", "threads", or "" for a resident one."""
        return {name: bound.lookup.queue for name, bound in zip(self.stores, self._bound, strict=True)}

    def clear(self) -> Dsv4cError | None:
        """After a step that failed: drop what it left, and tell which table made it fail, if one did."""
        failures = [b.failure for b in self._bound if b.failure is not None]
        for bound in self._bound:
            bound.lookup.abandon()
            bound.tickets.clear()
            bound.failure = None
        return failures[0] if failures else None


def _forget(numbers: list[int]) -> None:
    for number in numbers:
        _BOUND.pop(number, None)


def prefetch(rows: Any, handle: Any, ticket: Any) -> None:
    """rows i32 [B,T,C], handle i64 [1] -> ticket i64 [1]: the rows' reads are under way."""
    bound = _BOUND[int(np.from_dlpack(handle)[0])]
    try:
        issued = bound.lookup.prefetch(np.asarray(np.from_dlpack(rows), np.int32))
    except Dsv4cError as error:
        bound.failure = error
        raise
    bound.issued += 1
    bound.tickets[bound.issued] = issued
    np.from_dlpack(ticket)[0] = bound.issued


def fetch(ticket: Any, handle: Any, records: Any) -> None:
    """ticket i64 [1], handle i64 [1] -> records [B,T,C,n] of any type; zeros for padding."""
    bound = _BOUND[int(np.from_dlpack(handle)[0])]
    try:
        issued = bound.tickets.pop(int(np.from_dlpack(ticket)[0]))
        out = np.from_dlpack(records)
        bound.lookup.fetch(issued, out.reshape(-1).view(np.uint8).reshape(*out.shape[:-1], -1))
    except Dsv4cError as error:
        bound.failure = error
        raise
    except OSError as error:
        bound.failure = SessionError(f"a table cannot be read: {error}", where=bound.lookup.store.path)
        raise


PREFETCH, FETCH = "dsv4c.table_prefetch", "dsv4c.table_fetch"
"""Names under which compiled code finds the two functions."""

tvm_ffi.register_global_func(PREFETCH, prefetch, override=True)
tvm_ffi.register_global_func(FETCH, fetch, override=True)
