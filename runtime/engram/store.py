"""One looked-up table of an open artifact: hot region, cache and file, shared by all sessions of a process.

Knows where records are, and counts; `lookup` reads them. Several processes share the file and the hot region,
which is mapped; each has a cache of its own.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, SessionError
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.layout import HEADER_BYTES
from dsv4c.runtime.container.tables import Directory, TableLayout

from .cache import RecordCache
from .options import TableOptions, TableStatistics
from .queue import Pages

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Key:
    """What two sessions must agree on to share a table."""

    file: tuple[int, int, int]
    name: str
    options: TableOptions


_OPEN: weakref.WeakValueDictionary[_Key, TableStore] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


class TableStore:
    """The table `name` of an artifact. Thread-safe; sessions take it from `open`, which shares it.

    Attributes:
        layout: sizes.
        tier: "resident" or "disk".
        direct: whether cold rows are read past the page cache; False where the file system refuses, and for
            the resident tier.
        fd: the artifact's file, for reading pages; -1 for the resident tier.
        cold_offset: of the first page in the file.

    Raises:
        ArtifactError: the artifact has no such table, its tensors do not fit, or its file was replaced.
    """

    def __init__(self, artifact: Artifact, name: str, options: TableOptions | None = None) -> None:
        options = options or TableOptions()
        facts = _facts(artifact, name)
        self.path, self.layout = str(artifact.path), TableLayout(**facts["layout"])
        for tensor, (dtype, shape) in self.layout.shapes().items():
            entry = artifact.tensors.get(tensor)
            if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
                what = f"tensor {tensor!r} of table {name!r} is missing or of another shape"
                raise ArtifactError(what, where=self.path, allowed=f"{dtype}{list(shape)}")
        self._directory = Directory(artifact.array(f"{name}.bits"), artifact.array(f"{name}.ranks"))
        self._hot: Bytes = artifact.array(f"{name}.hot")
        for part in ("bits", "ranks", "hot"):
            artifact.read_ahead(f"{name}.{part}")
        cold: Bytes = artifact.array(f"{name}.cold")
        self.cold_offset = artifact.tensors[f"{name}.cold"].offset
        slots, record = self.layout.slots, self.layout.record
        self._cold = cold[:, : slots * record].reshape(-1, slots, record) if cold.size else cold
        self.tier = options.tier or facts["tier"]
        self.fd, self.direct = -1, False
        share = int(facts["cache_bytes"])
        if options.cache_bytes is not None:
            share = options.cache_bytes * share // max(int(facts["all_cache_bytes"]), 1)
        if self.tier == "disk":
            self.fd, self.direct = _open(artifact, self.cold_offset, self.layout, options.direct)
            weakref.finalize(self, os.close, self.fd)
        self._cache = RecordCache(share if self.tier == "disk" else 0, record)
        self._lock, self.statistics = threading.Lock(), TableStatistics()

    @classmethod
    def open(cls, artifact: Artifact, name: str, options: TableOptions | None = None) -> TableStore:
        """The store that this process has open already for the same file, table and options, or a new one."""
        options = options or TableOptions()
        found = os.stat(artifact.path)
        key = _Key((found.st_dev, found.st_ino, found.st_mtime_ns), name, options)
        with _LOCK:
            store = _OPEN.get(key)
            if store is None:
                store = _OPEN[key] = cls(artifact, name, options)
            return store

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of hot region, directory and cache; the first two are mapped and shared between processes."""
        sizes = {"hot": self._hot.nbytes, "directory": self.layout.directory_bytes}
        return {**sizes, "cache": self._cache.nbytes}

    def gather(self, ids: Ids, out: Bytes) -> tuple[npt.NDArray[np.intp], Ids]:
        """Copy what memory has of rows ids [n], none negative, into out [n,record].

        Returns:
            Which rows are still missing, as indices, and their numbers among the cold rows.

        Raises:
            SessionError: an id is beyond the table.
        """
        if len(ids) and ids.max() >= self.layout.rows:
            allowed = f"0..{self.layout.rows - 1}"
            raise SessionError("a row id is outside the table", where=self.layout.name, allowed=allowed)
        rest, cold = np.arange(len(ids)), ids
        if self.layout.hot_rows:
            hot, rank = self._directory.find(ids)
            at = np.flatnonzero(hot)
            out[at] = self._hot[rank[at]]
            rest = np.flatnonzero(~hot)
            cold = (ids - rank)[rest]
        n, past = len(ids), len(rest)
        if self.tier == "resident":
            out[rest] = self._cold[cold // self.layout.slots, cold % self.layout.slots]
            self.count(n, n - past, past)
            return np.empty(0, np.intp), np.empty(0, np.int64)
        with self._lock:
            found = self._cache.take(ids[rest], out, rest)
        missing = np.flatnonzero(~found)
        self.count(n, n - past, past - len(missing), len(missing))
        return rest[missing], cold[missing]

    def keep(self, ids: Ids, records: Bytes) -> None:
        """Put records [n,record] that were read into the cache; the same id may come twice."""
        with self._lock:
            self.statistics.evicted += self._cache.put(ids, records)

    def count(self, rows: int, hot: int, cached: int, read: int = 0) -> None:
        """Where the rows of one call came from."""
        with self._lock:
            s = self.statistics
            s.rows, s.hot, s.cached, s.read = s.rows + rows, s.hot + hot, s.cached + cached, s.read + read

    def count_pages(self, pages: int) -> None:
        with self._lock:
            self.statistics.pages += pages
            self.statistics.bytes += pages * self.layout.page

    def count_wait(self, ready: bool, seconds: float) -> None:
        """How a fetch found its reads."""
        with self._lock:
            if ready:
                self.statistics.ready += 1
            else:
                self.statistics.stalls += 1
                self.statistics.stall_seconds += seconds

    def reset_statistics(self) -> None:
        with self._lock:
            self.statistics = TableStatistics()


def _facts(artifact: Artifact, name: str) -> dict[str, Any]:
    tables: dict[str, Any] = artifact.meta.get("tables", {})
    if name not in tables:
        known = ", ".join(tables) or "none"
        raise ArtifactError(f"has no table {name!r}", where=str(artifact.path), allowed=known)
    facts: dict[str, Any] = tables[name]
    return facts


def _open(artifact: Artifact, offset: int, layout: TableLayout, direct: bool) -> tuple[int, bool]:
    """(descriptor, whether it reads past the page cache) of the artifact's file, tried on the first page."""
    where = str(artifact.path)
    try:
        fd = os.open(artifact.path, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=where) from error
    try:
        if os.pread(fd, HEADER_BYTES, 0) != artifact.header:
            what = "the file was replaced since it was opened"
            raise ArtifactError(what, where=where, hint="open it again")
        past = _reopen_direct(fd, artifact, offset, layout) if direct and layout.pages else -1
    except BaseException:
        os.close(fd)
        raise
    if past < 0:
        return fd, False
    os.close(fd)
    return past, True


def _reopen_direct(fd: int, artifact: Artifact, offset: int, layout: TableLayout) -> int:
    """A descriptor with O_DIRECT, or -1: some file systems refuse to open so, others only to read."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return -1
    past = -1
    try:
        past = os.open(artifact.path, os.O_RDONLY | flag)
        same = os.path.sameopenfile(fd, past)
        if same and os.preadv(past, [Pages(layout.page, 1).array[0]], offset) == layout.page:
            return past
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EIO):
            raise ArtifactError(f"cannot be read: {error.strerror}", where=str(artifact.path)) from error
    if past >= 0:
        os.close(past)
    return -1
