"""Writing an artifact: streamed, bounded by one chunk of memory, and atomic."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import secrets
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container.holes import spans
from dsv4c.runtime.container.layout import (
    SECTION_ALIGN,
    STORAGE,
    TENSOR_ALIGN,
    Header,
    Manifest,
    SectionEntry,
    TensorEntry,
    is_shape,
    tensor_bytes,
)

Chunk = bytes | bytearray | memoryview | npt.NDArray[Any]

# Names under which extension packages publish the types that NumPy lacks.
_EXTENSION_NAME = {"bf16": "bfloat16", "f8e4m3": "float8_e4m3fn", "f8e8m0": "float8_e8m0fnu"}


class ArtifactWriter:
    """Writes one artifact, as a context manager; the file appears under `path` whole or not at all.

    Until a clean exit the data has no name in the directory (O_TMPFILE), so even SIGKILL leaves
    nothing behind. An existing artifact is replaced atomically; only then, for the moment between
    two system calls, is there a temporary name. Where the file system knows no nameless files the
    temporary name lasts longer, and every exit that Python gets to see removes it.

    Whole pages of zeros become holes of the file, where the file system knows them; every byte and checksum
    is as if they had been written.

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
        self._temp: str | None = None
        self._after_tensor = False
        self._incomplete = ""

    def __enter__(self) -> ArtifactWriter:
        _check_target(self.path)
        with self._reporting_os_errors(), ExitStack() as undo:
            self._dir = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            undo.callback(os.close, self._dir)
            fd, self._temp = _open_unnamed(self.path, self._dir)
            undo.pop_all()
        self._file = os.fdopen(fd, "wb", buffering=1 << 20)
        self._file.seek(SECTION_ALIGN)
        atexit.register(self._discard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()
            atexit.unregister(self._discard)
            os.close(self._dir)

    @property
    def tensors(self) -> list[TensorEntry]:
        """What has been added so far, in order."""
        return list(self._tensors.values())

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
            self._write(data)
        size, digest = memoryview(data).nbytes, hashlib.sha256(data).hexdigest()
        self._sections[name] = SectionEntry(name, offset, size, digest)
        self._after_tensor = False

    def add_tensor(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        chunks: Iterable[Chunk] | Chunk,
        align: int = TENSOR_ALIGN,
    ) -> None:
        """Appends a tensor from consecutive pieces of its row-major bytes; holds one piece at a time.

        Args:
            dtype: a key of `STORAGE`; bf16 is given as uint16, f8e4m3 as uint8.
            shape: may be `()` and may contain zeros.
            chunks: buffers, taken as they are, or arrays, whose dtype must be the storage dtype.
            align: 64, or 4096 for a tensor that is read by pages.
        """
        self._claim("tensor", name, self._tensors)
        where = f"tensor {name!r}"
        nbytes = self._tensor_bytes(where, dtype, shape)
        if isinstance(chunks, bytes | bytearray | memoryview | np.ndarray):
            chunks = (chunks,)
        with self._appending(where):
            # The first weight starts a page, so that dropping weights from memory keeps the code.
            offset = self._pad(align if self._after_tensor else SECTION_ALIGN)
            digest = self._stream(where, dtype, nbytes, chunks)
        self._tensors[name] = TensorEntry(name, dtype, tuple(shape), offset, nbytes, digest)
        self._after_tensor = True

    def _stream(self, where: str, dtype: str, nbytes: int, chunks: Iterable[Chunk]) -> str:
        digest, done = hashlib.sha256(), 0
        for chunk in chunks:
            raw = self._raw_bytes(where, dtype, chunk)
            done += len(raw)
            if done > nbytes:  # now, not at the end: the source may be endless
                raise self._error(f"{where} got at least {done} bytes, its dtype and shape need {nbytes}")
            digest.update(raw)
            self._write(raw)
        if done != nbytes:
            raise self._error(f"{where} got {done} bytes, its dtype and shape need {nbytes}")
        return digest.hexdigest()

    def _finish(self) -> None:
        if self._incomplete:
            raise self._error(f"not written, because {self._incomplete} was left incomplete")
        manifest = Manifest(self._meta, self._sections, self._tensors).encode()
        offset, file = self._pad(TENSOR_ALIGN), self._open_file()
        self._write(manifest)
        with self._reporting_os_errors():
            file.seek(0)
            file.write(Header.of(manifest, offset).pack())
            file.flush()
            os.fsync(file.fileno())
            self._publish(file.fileno())

    def _publish(self, fd: int) -> None:
        """Gives the finished file its name; the directory is synced so that the name lasts too."""
        name, d = self.path.name, self._dir
        if self._temp is None:
            # With src_dir_fd Python calls linkat(AT_SYMLINK_FOLLOW): the file, not the link in /proc.
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
        """Closes the file and removes its temporary name, if it still has one."""
        if self._file is not None:
            with suppress(OSError):  # a full disk: what is buffered is not wanted any more
                self._file.close()
            self._file = None
        if self._temp is not None:
            with suppress(OSError):
                os.unlink(self._temp, dir_fd=self._dir)
            self._temp = None

    def _claim(self, kind: str, name: str, taken: Container[str]) -> None:
        self._open_file()
        if not isinstance(name, str) or not name or not name.isprintable():
            raise self._error(f"{name!r} cannot name a {kind}", allowed="non-empty printable text")
        if name in taken:
            raise self._error(f"{kind} name {name!r} is used twice")

    def _tensor_bytes(self, where: str, dtype: str, shape: tuple[int, ...]) -> int:
        if dtype not in STORAGE:
            raise self._error(f"{where} has unknown dtype {dtype!r}", allowed=", ".join(STORAGE))
        if not is_shape(shape):
            raise self._error(f"{where} has shape {shape!r}", allowed="a tuple of integers >= 0")
        return tensor_bytes(dtype, shape)

    def _raw_bytes(self, where: str, dtype: str, chunk: Chunk) -> memoryview:
        """The bytes of a chunk as a flat view; an array of the wrong dtype is refused, not converted."""
        if isinstance(chunk, np.ndarray):
            stored = STORAGE[dtype]
            if chunk.dtype != stored and chunk.dtype.name != _EXTENSION_NAME.get(dtype):
                raise self._error(f"{where} of {dtype} got an array of {chunk.dtype}", allowed=stored.name)
            return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        view = memoryview(chunk)
        plain = view.c_contiguous and view.nbytes and view.format in ("B", "b", "c")
        return view.cast("B") if plain else memoryview(view.tobytes())

    @contextmanager
    def _appending(self, what: str) -> Iterator[None]:
        """A failure in here leaves half an entry in the file, so the file must not be published."""
        try:
            yield
        except BaseException:
            self._incomplete = self._incomplete or what
            raise

    @contextmanager
    def _reporting_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise self._error(f"cannot be written: {e.strerror or e}") from e

    def _write(self, data: bytes | memoryview) -> None:
        file = self._open_file()
        with self._reporting_os_errors():
            for hole, part in spans(data, file.tell()):
                if hole:  # something always follows, at the latest the manifest, so the size comes out right
                    file.seek(len(part), os.SEEK_CUR)
                else:
                    file.write(part)

    def _pad(self, align: int) -> int:
        end = self._open_file().tell()
        self._write(bytes(-end % align))
        return end + -end % align

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise self._error("the writer is not open", hint="use it as a context manager")
        return self._file

    def _error(self, what: str, *, allowed: str = "", hint: str = "") -> ArtifactError:
        return ArtifactError(what, where=str(self.path), allowed=allowed, hint=hint)


def _check_target(path: Path) -> None:
    """Refuses what cannot become an artifact now, before hours of work are lost to it."""
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise ArtifactError(f"the output is {kind}", where=str(path), hint="name a file, e.g. m.dsv4")
    if not path.parent.is_dir():
        raise ArtifactError(
            "the output directory does not exist", where=str(path), hint=f"mkdir -p {path.parent}"
        )


def _temp_name(path: Path) -> str:
    return f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _open_unnamed(path: Path, directory: int) -> tuple[int, str | None]:
    """A new file in `directory`: (descriptor, None) if it has no name yet, else its temporary name."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):  # both are needed: see _publish
        with suppress(OSError):  # some network and overlay file systems refuse
            return os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666), None
    temp = _temp_name(path)
    return os.open(temp, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666, dir_fd=directory), temp
