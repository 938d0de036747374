"""Opening an artifact: one private map, checks in two depths, arrays without copies."""

from __future__ import annotations

import difflib
import hashlib
import mmap
import os
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, UsageError, unknown
from dsv4c.runtime.container.layout import (
    HEADER_BYTES,
    STORAGE,
    Entry,
    Header,
    Manifest,
    SectionEntry,
    TensorEntry,
    gaps,
)

Check = Literal["code", "full"]


@dataclass(frozen=True, eq=False)
class Artifact:
    """An opened artifact. Its file is mapped once; every array is a view that keeps the map alive.

    The map is private: the views count as writable, which DLPack asks for, untouched pages are
    shared between processes, and whatever is written never reaches the file.
    """

    path: Path
    meta: dict[str, Any]
    sections: dict[str, SectionEntry]
    tensors: dict[str, TensorEntry]
    _map: mmap.mmap = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], check: Check = "code") -> Artifact:
        """Maps the file and checks it.

        Args:
            check: "code" checks the header, the manifest, every section's bytes and the place of
                every tensor, and costs no read of the weights; "full" reads and checks every byte.

        Raises:
            ArtifactError: the path cannot be read, is no artifact, is newer than this reader, cut
                short or damaged; the message names the section or tensor.
        """
        if check not in get_args(Check):
            raise UsageError(f"unknown check {check!r}", where=str(path), allowed=", ".join(get_args(Check)))
        where, mapped = str(path), _map_file(Path(path))
        header = Header.unpack(mapped[:HEADER_BYTES], len(mapped), where)
        manifest = _read_manifest(mapped, header, where)
        artifact = cls(Path(path), *manifest, mapped)
        padding = gaps([*manifest.sections.values(), *manifest.tensors.values()], header.offset, where)
        for entry in manifest.sections.values():
            artifact._verify(entry)
        if check == "full":
            artifact._verify_padding(padding)
            artifact.verify_tensors()
        return artifact

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def header(self) -> bytes:
        """The first bytes of the mapped file; no two artifacts with other contents share them."""
        return self._map[:HEADER_BYTES]

    def read_ahead(self, name: str) -> None:
        """Ask the system to bring a tensor into memory, in the background."""
        entry = self.tensors[name]
        start = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.nbytes and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, start, entry.offset + entry.nbytes - start)

    def section_span(self, name: str) -> tuple[int, int]:
        """Offset in the file and size in bytes; the offset is a multiple of 4096."""
        if name not in self.sections:
            raise unknown("section", name, self.sections, ArtifactError, where=str(self.path))
        entry = self.sections[name]
        return entry.offset, entry.nbytes

    def section(self, name: str) -> bytes:
        """A copy of the section's bytes."""
        offset, size = self.section_span(name)
        return self._map[offset : offset + size]

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor without a copy, in its storage dtype (bf16 as uint16, f8e4m3 as uint8)."""
        if name not in self.tensors:
            raise _no_tensor(name, self.tensors, str(self.path))
        entry = self.tensors[name]
        stored = STORAGE[entry.dtype]
        if entry.nbytes == 0:  # nothing to view
            return np.empty(entry.shape, stored)
        count = entry.nbytes // stored.itemsize
        return np.frombuffer(self._map, stored, count, entry.offset).reshape(entry.shape)

    def verify_tensors(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Hashes every tensor as it is mapped; raises ArtifactError with the name of the first bad one.

        Args:
            progress: called after each tensor with its name, the bytes done and the bytes in all.
        """
        done, entries = 0, list(self.tensors.values())
        # hashlib works without the interpreter's lock; beyond a few threads the disk is the limit.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(self._verify, entry) for entry in entries]
            try:
                for entry, job in zip(entries, jobs, strict=True):
                    job.result()
                    done += entry.nbytes
                    if progress is not None:
                        progress(entry.name, done, self.weight_bytes)
            finally:
                pool.shutdown(cancel_futures=True)

    def _verify(self, entry: Entry) -> None:
        with memoryview(self._map) as whole, whole[entry.offset : entry.offset + entry.nbytes] as view:
            found = hashlib.sha256(view).hexdigest()
        if found != entry.sha256:
            raise ArtifactError(
                f"{entry} does not match its checksum: the file is damaged",
                where=str(self.path),
                hint="copy it again from its source, or compile it again",
            )
        if isinstance(entry, SectionEntry):
            _release(self._map, entry.offset, entry.nbytes)

    def _verify_padding(self, padding: list[tuple[int, int]]) -> None:
        """Padding must be zero, so that no byte of the file escapes the checks."""
        for start, end in padding:
            if any(self._map[start:end]):
                raise ArtifactError(f"padding at byte {start} is not zero", where=str(self.path))


def _release(mapped: mmap.mmap, offset: int, size: int) -> None:
    """Let go of the pages of a section, which is read once or never again; they stay in the page cache."""
    if hasattr(mmap, "MADV_DONTNEED") and size and offset % mmap.PAGESIZE == 0:
        mapped.madvise(mmap.MADV_DONTNEED, offset, size)


def _map_file(path: Path) -> mmap.mmap:
    where = str(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # before opening: a pipe would block
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise ArtifactError(f"this is {kind}", where=where, allowed="an artifact file (*.dsv4)")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                Header.unpack(b"", 0, where)
            return _map_private(file.fileno())
    except OSError as e:
        raise ArtifactError(f"cannot be read: {e.strerror or e}", where=where) from e


def _map_private(fd: int) -> mmap.mmap:
    """ACCESS_COPY, without the promise of memory for every page.

    Linux refuses a plain writable private map of a file larger than memory and swap together,
    although nobody will write to it; MAP_NORESERVE lifts that. Python 3.11 lacks the constant.
    """
    if sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64", "riscv64", "loongarch64"):
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)


def _read_manifest(mapped: mmap.mmap, header: Header, where: str) -> Manifest:
    raw = mapped[header.offset :]
    if hashlib.sha256(raw).digest() != header.sha256:
        raise ArtifactError("the manifest does not match its checksum: the file is damaged", where=where)
    return Manifest.decode(raw, where)


def _no_tensor(name: str, known: dict[str, TensorEntry], where: str) -> ArtifactError:
    """There may be thousands of names; the nearest ones say enough."""
    near = difflib.get_close_matches(name, known, n=3) or list(known)[:3]
    allowed = f"{len(known)} names, e.g. {', '.join(near)}" if near else "none: it has no tensors"
    return ArtifactError(f"unknown tensor {name!r}", where=where, allowed=allowed)
