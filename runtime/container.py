"""The artifact file `m.dsv4`: owns its layout, how it is written and how it is opened.

It must not know what a section or a tensor means; that is the business of who asks for it.

    offset 0         header, 64 bytes: magic, format version, CRC-32 of the header,
                     offset, length and SHA-256 of the manifest
    4096, 8192, ...  sections, each on a page of its own, so that code can be mapped by itself
    multiples of 64  tensors, one after the other (aligned for every SIMD width in use)
    the end          manifest: JSON with name, span and SHA-256 of every section and tensor

All numbers are little-endian. Padding is zero. The manifest comes last because the sizes and
checksums of streamed tensors are known only then; the header, written after it, makes it valid.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import mmap
import os
import secrets
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, UsageError, unknown

# Not text (high bit), and broken visibly by newline translation, as in PNG.
MAGIC = b"\x89DSV4\r\n\x1a"
FORMAT_VERSION = 1
SECTION_ALIGN = 4096
TENSOR_ALIGN = 64

_HEADER = struct.Struct("<8sIIQQ32s")

# How each tensor dtype is stored and handed out; bf16 and f8e4m3 have no NumPy type of their own.
STORAGE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f8e4m3": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
    "bool": np.dtype("?"),
}
# Names under which extension packages publish the two types that NumPy lacks.
_EXTENSION_NAME = {"bf16": "bfloat16", "f8e4m3": "float8_e4m3fn"}

Chunk = bytes | bytearray | memoryview | npt.NDArray[Any]
Check = Literal["code", "full"]


@dataclass(frozen=True)
class SectionEntry:
    """A named run of bytes; `offset` and `nbytes` locate it in the file."""

    name: str
    offset: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """A dense row-major tensor; `dtype` is a key of `STORAGE`, `offset` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str


Entry = SectionEntry | TensorEntry


class _Header(NamedTuple):
    """Where the manifest is and what it hashes to."""

    offset: int
    length: int
    sha256: bytes

    def pack(self) -> bytes:
        crc = zlib.crc32(_HEADER.pack(MAGIC, FORMAT_VERSION, 0, *self))
        return _HEADER.pack(MAGIC, FORMAT_VERSION, crc, *self)


class ArtifactWriter:
    """Writes one artifact, as a context manager; the file appears under `path` whole or not at all.

    Until a clean exit the data has no name in the directory (O_TMPFILE), so even SIGKILL leaves
    nothing behind; an existing artifact is replaced atomically. Only where the file system cannot
    do that is a temporary name used, removed by every exit that Python gets to see.

    Raises:
        ArtifactError: the target cannot be written, a name is used twice, a tensor's bytes do
            not fit its dtype and shape, or a value cannot be stored as JSON.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._meta: dict[str, Any] = {}
        self._sections: dict[str, SectionEntry] = {}
        self._tensors: dict[str, TensorEntry] = {}
        self._file: BinaryIO | None = None
        self._failed = ""

    def __enter__(self) -> ArtifactWriter:
        _check_target(self.path)
        with self._reporting_os_errors():
            self._dir = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fd, self._temp = _open_unnamed(self.path, self._dir)
            except OSError:
                os.close(self._dir)
                raise
        atexit.register(self._discard)
        self._file = os.fdopen(fd, "wb", buffering=1 << 20)
        self._file.seek(SECTION_ALIGN)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None):  # type: ignore[no-untyped-def]  # noqa: E501
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()
            atexit.unregister(self._discard)
            os.close(self._dir)

    def set_meta(self, key: str, value: Any) -> None:
        """Stores `value`, which must survive JSON, under `key`; a later call replaces an earlier one."""
        try:
            self._meta[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as e:
            raise self._error(f"meta {key!r} cannot be stored as JSON: {e}") from e

    def add_section(self, name: str, data: bytes) -> None:
        """Appends `data` as the section `name`, aligned to 4096 bytes."""
        self._claim("section", name, self._sections)
        with self._appending(f"section {name!r}"):
            offset = self._pad(SECTION_ALIGN)
            self._open_file().write(data)
        self._sections[name] = SectionEntry(name, offset, len(data), hashlib.sha256(data).hexdigest())

    def add_tensor(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[Chunk] | Chunk) -> None:
        """Appends a tensor from consecutive pieces of its row-major bytes; holds one piece at a time.

        Args:
            dtype: a key of `STORAGE`; bf16 is given as uint16, f8e4m3 as uint8.
            shape: may be `()` and may contain zeros.
            chunks: buffers, taken as they are, or arrays, whose dtype must be the storage dtype.
        """
        self._claim("tensor", name, self._tensors)
        where = f"tensor {name!r}"
        nbytes = _tensor_bytes(dtype, shape, self._error, where)
        if isinstance(chunks, bytes | bytearray | memoryview | np.ndarray):
            chunks = (chunks,)
        with self._appending(where):
            # Weights start on a page of their own: they are dropped from memory, code is not.
            after_code = not self._tensors or self._file_end() == self._section_end()
            offset = self._pad(SECTION_ALIGN if after_code else TENSOR_ALIGN)
            digest = self._stream(where, dtype, nbytes, chunks)
        self._tensors[name] = TensorEntry(name, dtype, tuple(shape), offset, nbytes, digest)

    def _stream(self, where: str, dtype: str, nbytes: int, chunks: Iterable[Chunk]) -> str:
        file, digest, done = self._open_file(), hashlib.sha256(), 0
        for chunk in chunks:
            raw = _raw_bytes(chunk, dtype, self._error, where)
            done += len(raw)
            if done > nbytes:  # stop here: the source may be endless
                raise self._error(f"{where} got at least {done} bytes, its dtype and shape need {nbytes}")
            digest.update(raw)
            file.write(raw)
        if done != nbytes:
            raise self._error(f"{where} got {done} bytes, its dtype and shape need {nbytes}")
        return digest.hexdigest()

    def _finish(self) -> None:
        if self._failed:
            raise self._error(f"not written: {self._failed} was left incomplete")
        manifest = json.dumps(
            {
                "meta": self._meta,
                "sections": [asdict(s) for s in self._sections.values()],
                "tensors": [asdict(t) for t in self._tensors.values()],
            },
            separators=(",", ":"),
        ).encode()
        with self._reporting_os_errors():
            file, offset = self._open_file(), self._pad(TENSOR_ALIGN)
            file.write(manifest)
            file.seek(0)
            file.write(_Header(offset, len(manifest), hashlib.sha256(manifest).digest()).pack())
            file.flush()
            os.fsync(file.fileno())
            self._publish(file.fileno())

    def _publish(self, fd: int) -> None:
        """Gives the finished file its name; the directory is synced so that the name lasts too."""
        name, d = self.path.name, self._dir
        if self._temp is None:
            # src_dir_fd makes Python use linkat(AT_SYMLINK_FOLLOW), without which the link itself is linked.
            source = f"/proc/self/fd/{fd}"
            try:
                os.link(source, name, src_dir_fd=d, dst_dir_fd=d)
            except FileExistsError:  # a link cannot replace; a rename can
                self._temp = _temp_name(self.path)
                os.link(source, self._temp, src_dir_fd=d, dst_dir_fd=d)
        if self._temp is not None:
            os.replace(self._temp, name, src_dir_fd=d, dst_dir_fd=d)
            self._temp = None
        os.fsync(d)

    def _discard(self) -> None:
        """Closes the file and removes its temporary name, if it has one."""
        if self._file is not None:
            with suppress(OSError):  # a full disk: what is buffered is not wanted any more
                self._file.close()
            self._file = None
        if self._temp is not None:
            with suppress(OSError):
                os.unlink(self._temp, dir_fd=self._dir)
            self._temp = None

    def _claim(self, kind: str, name: str, taken: dict[str, Any]) -> None:
        self._open_file()
        if not isinstance(name, str) or not name or not name.isprintable():
            raise self._error(f"{name!r} cannot name a {kind}", allowed="non-empty printable text")
        if name in taken:
            raise self._error(f"{kind} name {name!r} is used twice")

    @contextmanager
    def _appending(self, what: str) -> Iterator[None]:
        """A failure in here leaves half an entry in the file, so the file must not be published."""
        try:
            with self._reporting_os_errors():
                yield
        except BaseException:
            self._failed = self._failed or what
            raise

    @contextmanager
    def _reporting_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise self._error(f"cannot be written: {e.strerror or e}") from e

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise self._error("the writer is not open", hint="use it as a context manager")
        return self._file

    def _file_end(self) -> int:
        return self._open_file().tell()

    def _section_end(self) -> int:
        return max((s.offset + s.nbytes for s in self._sections.values()), default=0)

    def _pad(self, align: int) -> int:
        end = self._file_end()
        self._open_file().write(bytes(-end % align))
        return end + -end % align

    def _error(self, what: str, *, allowed: str = "", hint: str = "") -> ArtifactError:
        return ArtifactError(what, where=str(self.path), allowed=allowed, hint=hint)
