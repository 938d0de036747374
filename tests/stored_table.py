"""What tests of stored tables share: a small table in an artifact, and compiled kernels that look it up."""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from dsv4c.runtime.buffers import zeros
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.container.handles import DEPTH, Queue, Tier
from dsv4c.runtime.container.handles import Ticket as Words
from dsv4c.runtime.container.tables import PAGE, TableLayout, directory, seal
from dsv4c.runtime.engram import TableOptions
from dsv4c.runtime.engram.calls import Tables

Arr = npt.NDArray[Any]
ROWS, PAYLOAD, RECORD = 1999, 264, 272
FENCE = tuple(range(1, 17))
"""Read as a ticket it is one row that a job brings which nobody knows."""


def payloads(rows: int = ROWS, payload: int = PAYLOAD) -> Arr:
    return np.random.default_rng(3).integers(0, 256, (rows, payload), np.uint8)


@functools.cache
def sealed(rows: int = ROWS, payload: int = PAYLOAD) -> Arr:
    """Every record of the table."""
    records = seal(payloads(rows, payload), np.arange(rows), -(-(payload + 8) // 16) * 16)
    records.flags.writeable = False
    return records


def expected(ids: Arr) -> Arr:
    """Records; zeros for padding."""
    return np.where(ids[..., None] < 0, 0, sealed()[np.maximum(ids, 0)]).astype(np.uint8)


@contextmanager
def disk() -> Iterator[Path]:
    """A folder on the disk of the repository: others are often in memory, which takes no direct reads."""
    here = Path(__file__).parents[1] / "build"
    here.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=here) as name:
        yield Path(name)


def write(
    path: Path, hot: Arr, rows: int = ROWS, payload: int = PAYLOAD, tier: str = "disk",
    cache_bytes: int = 40_000,
) -> Path:  # fmt: skip
    """An artifact with one table `t`, written the plain way."""
    records = sealed(rows, payload)
    size = records.shape[1]
    layout = TableLayout("t", rows, payload, size, -(-size // PAGE) * PAGE, len(hot))
    pages = np.zeros((layout.pages, layout.page), np.uint8)
    for i, record in enumerate(np.delete(records, hot, axis=0)):
        at = i % layout.slots * size
        pages[i // layout.slots, at : at + size] = record
    bits, ranks = directory(hot, rows)
    with ArtifactWriter(path) as w:
        for (name, (dtype, shape)), array in zip(
            layout.shapes().items(), (bits, ranks, records[hot], pages), strict=True
        ):
            w.add_tensor(name, dtype, shape, array, align=PAGE)
        facts = {"layout": layout.meta(), "tier": tier, "cache_bytes": cache_bytes}
        w.set_meta("tables", {"t": {**facts, "all_cache_bytes": cache_bytes}})
        w.set_meta("tvm", {"tables": ["t"]})
    return path


@functools.cache
def kernels(record: int, page: int, columns: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """(engram_rows_begin, engram_rows_end) for one size of records, pages and rows of a token."""
    import tvm

    from dsv4c.targets import parse_target
    from dsv4c.targets.cpu.tvm.emit import cross_attributes
    from dsv4c.targets.cpu.tvm.kernels.engram_lookup import engram_rows_begin, engram_rows_end

    made = {
        "begin": engram_rows_begin(record, page, columns),
        "end": engram_rows_end(record, page, columns, "uint8"),
    }
    target = tvm.target.Target({"kind": "llvm", **cross_attributes(parse_target("cpu")[1])})
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in made.items()})
    code = tvm.compile(module, target=target)
    return code["begin"], code["end"]


@dataclass(frozen=True, eq=False)
class Ticket:
    """Rows on their way.

    Attributes:
        shape: of what was asked for.
        words: the ticket's numbers, and `FENCE`, which nobody may read or write.
        found: the records that memory had [B,S,columns,record].
    """

    shape: tuple[int, ...]
    words: Arr
    found: Arr

    @classmethod
    def blank(cls, shape: tuple[int, ...], rows: tuple[int, int, int], record: int) -> Ticket:
        words = zeros((rows[0] * rows[1] * (rows[2] + 1) * Words.EACH + len(FENCE),), np.int32)
        words[-len(FENCE) :] = FENCE
        return cls(shape, words, zeros((*rows, record), np.uint8))

    @property
    def numbers(self) -> Arr:
        """[B,S,columns+1,4], as kernels take it."""
        b, s, columns, _ = self.found.shape
        return self.words[: -len(FENCE)].reshape(b, s, columns + 1, Words.EACH)

    @property
    def head(self) -> Arr:
        """MISSING, PAGES, WHO, JOB."""
        return self.words[: Words.EACH]

    @property
    def missing(self) -> Arr:
        """INDEX, ID, COLD, SLOT of each missing row."""
        return self.words[Words.EACH :].reshape(-1, Words.EACH)[: self.head[Words.MISSING]]


class Lookup:
    """Table `t` of an artifact as one session's compiled code looks it up."""

    def __init__(self, artifact: Artifact, options: TableOptions | None = None) -> None:
        self.tables = Tables(artifact, options)
        self.store, self.native = self.tables.stores["t"], self.tables._queue
        self.bound, self.layout = self.tables._bound["t"], self.store.layout
        self.queue = self.tables.queues()["t"]

    def prefetch(self, ids: Arr) -> Ticket:
        """Begin to read rows [n] or [B,S,columns]; -1 is padding."""
        rows = zeros(ids.shape if ids.ndim == 3 else (1, len(ids), 1), np.int32)
        rows[...] = ids.reshape(rows.shape)
        ticket = Ticket.blank(ids.shape, rows.shape, self.layout.record)
        begin, _ = kernels(self.layout.record, self.layout.page, rows.shape[2])
        self._call(begin, rows, self.bound.words, ticket.numbers, ticket.found)
        assert tuple(ticket.words[-len(FENCE) :]) == FENCE
        return ticket

    def fetch(self, ticket: Ticket) -> Arr:
        """u8 [...,record]: the rows of a ticket."""
        out = zeros(ticket.found.shape, np.uint8)
        out[...] = 7
        _, end = kernels(self.layout.record, self.layout.page, out.shape[2])
        self._call(end, ticket.numbers, ticket.found, self.bound.words, out)
        assert tuple(ticket.words[-len(FENCE) :]) == FENCE
        return out.reshape(*ticket.shape, self.layout.record)

    def ask(self, ids: Arr) -> Arr:
        return self.fetch(self.prefetch(ids))

    def check(self, ids: Arr) -> None:
        """Ask, and compare with what was written."""
        np.testing.assert_array_equal(self.ask(ids), expected(ids))

    def receive(self, records: Arr, ids: Arr) -> Arr:
        """Records [n,record] as the kernel hands them out when a read of rows `ids` brought them."""
        ticket = Ticket.blank(ids.shape, (1, len(ids), 1), records.shape[1])
        ticket.head[:] = len(ids), 0, Tier.HOST, 1
        ticket.missing[:, 0], ticket.missing[:, 1] = np.arange(len(ids)), ids
        self.bound.jobs[1] = job = Future()
        job.set_result((records, 1))
        return self.fetch(ticket)

    def abandon(self) -> None:
        """Forget every ticket that was not fetched, as after a step that failed."""
        assert self.tables.clear() is None

    def settle(self) -> None:
        """Wait until the system is through with all reads under way, and take none of their results."""
        wait(self.bound.jobs.values())
        if self.native is None:
            return
        results = self.native.words[Queue.RESULTS : Queue.RESULTS + DEPTH]
        assert not self.native.words[Queue.STARTED]  # all were handed over
        # `struct aio_ring`, which lies at the context: id, size, head, tail, a number to know it by
        ring = (ctypes.c_uint32 * 5).from_address(int(self.native.words[Queue.CONTEXT]))
        assert ring[4] == 0xA10A10A1
        while (ring[3] - ring[2]) % ring[1] < (results == Queue.PENDING).sum():
            time.sleep(0.001)

    def all_free(self) -> bool:
        """Whether no slot and no job is taken."""
        if self.native is not None:
            free = self.native.words[Queue.FREE_SLOTS : Queue.FREE_SLOTS + DEPTH]
            if self.native.words[Queue.FREE] != DEPTH or len(set(free.tolist())) != DEPTH:
                return False
        return not self.bound.jobs

    def _call(self, kernel: Callable[..., None], *arrays: Arr) -> None:
        try:
            kernel(*(tvm_ffi.from_dlpack(_compact(a)) for a in arrays))
        except Exception as error:
            failure = self.tables.clear()
            if failure is None:
                raise
            raise failure from error


def _compact(array: Arr) -> Arr:
    """With the strides that kernels expect: NumPy has others where nothing is in an array."""
    strides = [array.itemsize * prod(array.shape[i + 1 :]) for i in range(array.ndim)]
    return np.lib.stride_tricks.as_strided(array, strides=strides)
