"""The layout of an artifact: header, entries, storage types, and what makes a manifest sane.

Owns everything that writer and reader must agree on; touches no file.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from dsv4c.errors import ArtifactError

# Not text (high bit), and broken visibly by newline translation, as in PNG.
MAGIC = b"\x89DSV4\r\n\x1a"
FORMAT_VERSION = 1
SECTION_ALIGN = 4096
TENSOR_ALIGN = 64

_HEADER = struct.Struct("<8sIIQQ32s")

# How each tensor dtype is stored and handed out; those without a NumPy type as plain bits.
STORAGE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f8e4m3": np.dtype("u1"),
    "f8e4m3fnuz": np.dtype("u1"),
    "f8e8m0": np.dtype("u1"),
    "f4e2m1x2": np.dtype("u1"),
    "i4x2": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
    "bool": np.dtype("?"),
}


@dataclass(frozen=True)
class SectionEntry:
    """A named run of bytes; `offset` (a multiple of 4096) counts from the file's start."""

    name: str
    offset: int
    nbytes: int
    sha256: str

    def __str__(self) -> str:
        return f"section {self.name!r}"


@dataclass(frozen=True)
class TensorEntry:
    """A dense row-major tensor; `dtype` is a key of `STORAGE`, `offset` a multiple of 64."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str

    def __str__(self) -> str:
        return f"tensor {self.name!r}"


Entry = SectionEntry | TensorEntry
E = TypeVar("E", SectionEntry, TensorEntry)


class Manifest(NamedTuple):
    """Everything an artifact says about itself."""

    meta: dict[str, Any]
    sections: dict[str, SectionEntry]
    tensors: dict[str, TensorEntry]

    def encode(self) -> bytes:
        sections = [asdict(entry) for entry in self.sections.values()]
        tensors = [asdict(entry) for entry in self.tensors.values()]
        tree = {"meta": self.meta, "sections": sections, "tensors": tensors}
        return json.dumps(tree, separators=(",", ":")).encode()

    @staticmethod
    def decode(raw: bytes, where: str) -> Manifest:
        """Reads and checks the JSON; a checksum shows only that it is what was written, not that it is sane.

        Raises:
            ArtifactError: a part is missing, an entry is malformed, or a name is used twice.
        """
        try:
            tree = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise ArtifactError(f"the manifest is not JSON: {e}", where=where) from e
        tree = tree if isinstance(tree, dict) else {}
        meta, sections, tensors = (tree.get(key) for key in Manifest._fields)
        if not (isinstance(meta, dict) and isinstance(sections, list) and isinstance(tensors, list)):
            allowed = ", ".join(Manifest._fields)
            raise ArtifactError("the manifest is incomplete", where=where, allowed=allowed)
        entries = _parse_table(SectionEntry, sections, where), _parse_table(TensorEntry, tensors, where)
        return Manifest(meta, *entries)


class Header(NamedTuple):
    """The first 64 bytes: where the manifest is, in bytes, and its SHA-256."""

    offset: int
    length: int
    sha256: bytes

    @staticmethod
    def of(manifest: bytes, offset: int) -> Header:
        return Header(offset, len(manifest), hashlib.sha256(manifest).digest())

    def pack(self) -> bytes:
        crc = zlib.crc32(_HEADER.pack(MAGIC, FORMAT_VERSION, 0, *self))
        return _HEADER.pack(MAGIC, FORMAT_VERSION, crc, *self)

    @staticmethod
    def unpack(head: bytes, size: int, where: str) -> Header:
        """Reads the header from the first bytes of a file of `size` bytes; ArtifactError says what is off."""

        def fail(what: str, allowed: str = "", hint: str = "") -> NoReturn:
            raise ArtifactError(what, where=where, allowed=allowed, hint=hint)

        if size == 0:
            fail("truncated at 0 bytes: the file is empty")
        if head[: len(MAGIC)] != MAGIC[:size]:
            fail("this is not a dsv4c artifact", hint="artifacts are made by: dsv4c compile")
        if size < _HEADER.size:
            fail(f"truncated at {size} bytes, inside the header", hint="copy it again from its source")
        version = int.from_bytes(head[8:12], "little")  # at this place in every version
        if version > FORMAT_VERSION:
            hint = "update dsv4c, or compile again with this one"
            fail(f"format version {version} is newer than this dsv4c", f"up to {FORMAT_VERSION}", hint)
        header = Header(*_HEADER.unpack_from(head)[3:])
        if header.pack() != head[: _HEADER.size]:
            fail("the header does not match its checksum: the file is damaged")
        end = header.offset + header.length
        if size < end:
            fail(f"truncated at {size} bytes of {end}", hint="copy it again from its source")
        if size > end:
            fail(f"{size - end} bytes follow the artifact's end at {end}")
        return header


HEADER_BYTES = _HEADER.size


def is_shape(shape: object) -> bool:
    """True for a tuple or list of integers >= 0 (no bools)."""
    return isinstance(shape, tuple | list) and all(type(n) is int and n >= 0 for n in shape)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; `dtype` must be a key of `STORAGE`."""
    return math.prod(shape) * STORAGE[dtype].itemsize


def gaps(entries: Iterable[Entry], end: int, where: str) -> list[tuple[int, int]]:
    """The stretches of padding (start, stop) between header, entries and the manifest at `end`.

    Raises:
        ArtifactError: an entry leaves the file's body, two overlap, or a stretch is no mere padding.
    """
    found, at, before = [], HEADER_BYTES, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < HEADER_BYTES or entry.offset + entry.nbytes > end:
            raise ArtifactError(f"{entry} lies outside the file's body", where=where)
        if entry.nbytes == 0:
            continue
        if entry.offset < at:
            raise ArtifactError(f"{entry} overlaps {before}", where=where)
        found.append((at, entry.offset))
        at, before = entry.offset + entry.nbytes, str(entry)
    found.append((at, end))
    for start, stop in found:
        if stop - start >= SECTION_ALIGN:
            raise ArtifactError(f"{stop - start} bytes at {start} belong to no entry", where=where)
    return found


def _parse_table(kind: type[E], rows: list[Any], where: str) -> dict[str, E]:
    entries: dict[str, E] = {}
    for row in rows:
        entry = _parse_entry(kind, row, where)
        if entry.name in entries:
            raise ArtifactError(f"the manifest lists {entry} twice", where=where)
        entries[entry.name] = entry
    return entries


def _parse_entry(kind: type[E], row: Any, where: str) -> E:
    try:
        entry = kind(**row)
        if kind is TensorEntry:
            entry = kind(**{**row, "shape": tuple(row["shape"])})
    except TypeError as e:
        raise ArtifactError(f"the manifest has a malformed entry: {str(row)[:80]}", where=where) from e
    if wrong := _wrong_with(entry):
        raise ArtifactError(f"the manifest's entry of {entry} is malformed: {wrong}", where=where)
    return entry


def _wrong_with(entry: Any) -> str:
    """What is wrong with an entry taken by itself, or nothing; its fields may still be of any type."""
    if not (isinstance(entry.name, str) and isinstance(entry.sha256, str)):
        return "name and sha256 must be text"
    if not is_shape((entry.offset, entry.nbytes)):
        return f"offset {entry.offset!r}, size {entry.nbytes!r}"
    if isinstance(entry, SectionEntry):
        return f"offset {entry.offset} is not aligned" if entry.offset % SECTION_ALIGN else ""
    if entry.offset % TENSOR_ALIGN:
        return f"offset {entry.offset} is not aligned"
    if not isinstance(entry.dtype, str) or entry.dtype not in STORAGE:
        return f"unknown dtype {entry.dtype!r}"
    if not is_shape(entry.shape):
        return f"shape {entry.shape!r}"
    need = tensor_bytes(entry.dtype, entry.shape)
    return "" if need == entry.nbytes else f"{entry.nbytes} bytes where dtype and shape need {need}"
