"""One looked-up table of an open artifact: hot region, cache and file, shared by all sessions of a process.

Owns the memory that compiled code looks rows up in, and the counts it keeps there; copies no record itself.
Several processes share the file and the hot region, which is mapped; each has a cache of its own.
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
from dsv4c.runtime.buffers import zeros
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.handles import WAYS, Handle, Store
from dsv4c.runtime.container.layout import HEADER_BYTES
from dsv4c.runtime.container.tables import TableLayout

from .options import TableOptions, TableStatistics
from .queue import Pages

Words = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Key:
    """What two sessions must agree on to share a table."""

    file: tuple[int, int, int]
    name: str
    options: TableOptions


_OPEN: weakref.WeakValueDictionary[_Key, TableStore] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


class TableStore:
    """The table `name` of an artifact; sessions take it from `open`, which shares it.

    Compiled code works on it under a lock of its own: a cache of records with a fixed budget, eight ways per
    set, in which the least recently used way gives room.

    Attributes:
        layout: sizes.
        tier: "resident" or "disk".
        direct: whether cold rows are read past the page cache; False where the file system refuses, and for
            the resident tier.
        fd: the artifact's file, for reading pages; -1 for the resident tier.
        cold_offset: of the first page in the file.
        sets: of the cache; 0 holds nothing.

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
        self._mapped = {part: artifact.array(f"{name}.{part}") for part in ("hot", "bits", "ranks", "cold")}
        for part in ("bits", "ranks", "hot"):
            artifact.read_ahead(f"{name}.{part}")
        self.cold_offset = artifact.tensors[f"{name}.cold"].offset
        self.tier = options.tier or facts["tier"]
        self.fd, self.direct, budget = -1, False, 0
        if self.tier == "disk":
            self.fd, self.direct = _open(artifact, self.cold_offset, self.layout, options.direct)
            weakref.finalize(self, os.close, self.fd)
            budget = int(facts["cache_bytes"])
            if options.cache_bytes is not None:
                budget = options.cache_bytes * budget // max(int(facts["all_cache_bytes"]), 1)
        self.sets = budget // (WAYS * (self.layout.record + 8))
        # row ids, then ages: a set is one line of 64 bytes
        self._ages = zeros((self.sets, 2 * WAYS), np.int32)
        self._ages[:, :WAYS] = -1
        self._records = np.empty((self.sets * WAYS, self.layout.record), np.uint8)  # touched only when filled
        self._words = zeros((Store.WORDS,), np.int64)
        self._counted = self._words.copy()

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
        sizes = {"hot": self._mapped["hot"].nbytes, "directory": self.layout.directory_bytes}
        return {**sizes, "cache": self._ages.nbytes + self._records.nbytes}

    def describe(self, handle: Words) -> None:
        """Fill in the words of a `Handle` that are the same for all sessions."""
        address = {part: array.ctypes.data for part, array in self._mapped.items()}
        handle[Handle.ROWS] = self.layout.rows
        handle[Handle.HOT], handle[Handle.BITS] = address["hot"], address["bits"]
        handle[Handle.RANKS] = address["ranks"] if self.layout.blocks else 0
        handle[Handle.COLD] = address["cold"]
        handle[Handle.STORE] = self._words.ctypes.data
        handle[Handle.AGES], handle[Handle.RECORDS] = self._ages.ctypes.data, self._records.ctypes.data
        handle[Handle.SETS], handle[Handle.FILE] = self.sets, self.fd
        handle[Handle.COLD_OFFSET] = self.cold_offset

    @property
    def statistics(self) -> TableStatistics:
        """What was counted so far."""
        n = self._words - self._counted
        return TableStatistics(
            rows=int(n[Store.ROWS]), hot=int(n[Store.HOT]), cached=int(n[Store.CACHED]),
            read=int(n[Store.READ]), pages=int(n[Store.PAGES]),
            bytes=int(n[Store.PAGES]) * self.layout.page, ready=int(n[Store.READY]),
            stalls=int(n[Store.STALLS]), stall_seconds=int(n[Store.STALLED]) / 1e9,
            evicted=int(n[Store.EVICTED]),
        )  # fmt: skip

    def reset_statistics(self) -> None:
        """Count from here on."""
        self._counted = self._words.copy()

    def error(self, what: str, page: int) -> SessionError:
        """A read of a page that failed."""
        offset = self.cold_offset + page * self.layout.page
        return SessionError(
            what,
            where=f"{self.path}, table {self.layout.name}, offset {offset}",
            hint="the session is as it was before the step; copy the file again from its source",
        )

    def read_error(self, result: int, page: int) -> SessionError:
        """The error for what a read of a page gave: too few bytes, or minus an error number."""
        if result < 0:
            return self.error(f"a page cannot be read: {os.strerror(-result)}", page)
        return self.error(
            f"a page ends after {result} of {self.layout.page} bytes: the file is cut short", page
        )


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
