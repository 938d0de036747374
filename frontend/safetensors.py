"""Reads a directory of safetensors files through memory maps, checking every header byte by byte.

Owns the container format and the rules for shards. Knows nothing of models or of what a tensor is for.
Source: the safetensors format description (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from dsv4c.errors import CheckpointError, Dsv4cError
from dsv4c.ir.dtypes import Array, DType

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation

STORED = {
    "F32": DType.F32, "BF16": DType.BF16, "F16": DType.F16, "F8_E4M3": DType.F8E4M3, "F8_E8M0": DType.F8E8M0,
    "I8": DType.I8, "U8": DType.F4E2M1X2, "F4": DType.F4E2M1X2, "I32": DType.I32, "I64": DType.I64,
    "BOOL": DType.BOOL,
}  # fmt: skip
"""Name in the header -> element type. U8 is only ever a container here, of packed FP4 or of E8M0."""


@dataclass(frozen=True)
class RawTensor:
    """One tensor as it lies in a file.

    Attributes:
        dtype: element type; `stored` is its name in the header.
        shape: in elements, for packed FP4 in bytes.
        offset: of the first byte, from the start of `file`.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    stored: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.stored}{list(self.shape)}"


class TensorFiles:
    """All tensors of a checkpoint directory; implements `dsv4c.ir.weights.TensorStore`.

    Attributes:
        tensors: name -> where and what; names are those of the files.
    """

    def __init__(self, tensors: Mapping[str, RawTensor]) -> None:
        self.tensors = dict(tensors)
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, directory: str | Path) -> TensorFiles:
        """Read every header of a directory; no tensor is read.

        Raises:
            CheckpointError: a file is missing, damaged or outside the directory, or index and shards differ.
        """
        root = Path(directory)
        if not root.is_dir():
            raise CheckpointError("no such directory", where=str(root))
        index = root / INDEX
        if index.exists():
            return cls(_read_indexed(root, index))
        return cls(_merge(read_header(file) for file in _shards_without_index(root)))

    def read(self, name: str) -> Array:
        """The raw storage of a tensor: a read-only view of the file, possibly unaligned, never a copy.

        Raises:
            CheckpointError: no tensor has this name, or the file has changed since it was opened.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"no tensor {name!r}", allowed="the names of the checkpoint files")
        if not tensor.nbytes:
            return np.empty(tensor.shape, tensor.dtype.storage)
        data = self._map(tensor.file)
        if len(data) < tensor.offset + tensor.nbytes:
            raise CheckpointError(f"the file shrank while tensor {name!r} was needed", where=str(tensor.file))
        count = prod(tensor.shape)
        return np.frombuffer(data, tensor.dtype.storage, count, tensor.offset).reshape(tensor.shape)

    def retyped(self, dtypes: Mapping[str, DType]) -> TensorFiles:
        """The same files with other element types of the same size, e.g. I8 that holds packed FP4."""
        return TensorFiles({n: replace(t, dtype=dtypes.get(n, t.dtype)) for n, t in self.tensors.items()})

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            try:
                with file.open("rb") as handle:
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot be mapped: {error}", where=str(file)) from None
        return self._maps[file]


# ------------------------------------------------------------------------------------ headers


def read_header(file: Path) -> list[RawTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        CheckpointError: length, JSON, dtypes, shapes or offsets are not what the format demands.
    """
    where = str(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            text = handle.read(length) if length <= min(MAX_HEADER, size) else b""
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", where=where) from None
    if size < 8:
        raise CheckpointError(f"the file has {size} bytes, too few for a header", where=where)
    if not 2 <= length <= MAX_HEADER:
        raise CheckpointError(f"header length {length}", where=where, allowed=f"2 to {MAX_HEADER}")
    if 8 + length > size:
        raise _truncated(where, 8 + length, size, "for the header alone")
    header = parse_json(_text(text, where), where, CheckpointError)
    header.pop("__metadata__", None)
    tensors = [_entry(name, value, file, 8 + length) for name, value in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_layout(tensors, 8 + length, size, where)
    return tensors


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header is not UTF-8: {error}", where=where) from None


def _truncated(where: str, expected: int, size: int, what: str = "in all") -> CheckpointError:
    return CheckpointError(
        f"the file is truncated: {expected} bytes expected {what}, {size} found", where=where,
        hint="copy or download this file again",
    )  # fmt: skip


def _entry(name: str, value: object, file: Path, start: int) -> RawTensor:
    """One header entry, its own fields checked."""

    def bad(what: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"tensor {name!r}: {what}", where=str(file), allowed=allowed)

    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(value, dict) or value.keys() != keys:
        raise bad(f"header entry {value!r}", f"an object with {', '.join(sorted(keys))}")
    stored, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(stored, str) or stored not in STORED:
        raise bad(f"dtype {stored!r}", ", ".join(STORED))
    if not _sizes(shape):
        raise bad(f"shape {shape!r}", "a list of integers that are not negative")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets!r}", "[begin, end] with begin <= end")
    if stored == "F4":
        if not shape or shape[-1] % 2:
            raise bad(f"shape {shape} of packed FP4", "an even last axis")
        shape = [*shape[:-1], shape[-1] // 2]
    tensor = RawTensor(name, STORED[stored], tuple(shape), file, start + offsets[0], stored)
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise bad(f"{offsets[1] - offsets[0]} bytes for {tensor}", f"{tensor.nbytes} bytes")
    return tensor


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_layout(tensors: list[RawTensor], start: int, size: int, where: str) -> None:
    """Tensors must tile the data part: no overlap, no hole, nothing behind the last one."""
    end, last = start, "the header"
    for tensor in tensors:
        if tensor.offset < end:
            raise CheckpointError(f"tensor {tensor.name!r} overlaps {last}", where=where)
        if tensor.offset > end:
            raise CheckpointError(
                f"{tensor.offset - end} bytes between {last} and tensor {tensor.name!r} belong to no tensor",
                where=where,
            )
        end, last = end + tensor.nbytes, f"tensor {tensor.name!r}"
    if size < end:
        raise _truncated(where, end, size)
    if size > end:
        raise CheckpointError(f"{size - end} bytes after {last} belong to no tensor", where=where)


# ------------------------------------------------------------------------------------- shards


def _merge(shards: Iterable[list[RawTensor]]) -> dict[str, RawTensor]:
    out: dict[str, RawTensor] = {}
    for shard in shards:
        for tensor in shard:
            if tensor.name in out:
                raise CheckpointError(
                    f"tensor {tensor.name!r} is in {out[tensor.name].file.name} and in {tensor.file.name}",
                    where=str(tensor.file.parent), allowed="each tensor once",
                )  # fmt: skip
            out[tensor.name] = tensor
    return out


def _shards_without_index(root: Path) -> list[Path]:
    """The single file, or all of a completely numbered set."""
    if (root / SINGLE).exists():
        return [_inside(root, SINGLE, str(root))]
    numbered = {}
    for file in sorted(root.glob("model-*.safetensors")):
        if match := re.fullmatch(r"model-(\d{5,})-of-(\d{5,})\.safetensors", file.name):
            numbered[int(match[1])] = (_inside(root, file.name, str(root)), int(match[2]))
    totals = {total for _, total in numbered.values()}
    if not numbered:
        found = ", ".join(sorted(f.name for f in root.iterdir())[:5]) or "nothing"
        allowed = f"{INDEX}, {SINGLE} or model-NNNNN-of-NNNNN.safetensors"
        raise CheckpointError(f"no weights, only {found}", where=str(root), allowed=allowed)
    if len(totals) != 1:
        raise CheckpointError(f"shards of several sets, of {sorted(totals)} files", where=str(root))
    missing = [n for n in range(1, totals.pop() + 1) if n not in numbered]
    if missing:
        raise CheckpointError(
            f"shard {missing[0]} of {len(numbered) + len(missing)} is missing", where=str(root)
        )
    return [numbered[n][0] for n in sorted(numbered)]


def _read_indexed(root: Path, index: Path) -> dict[str, RawTensor]:
    where = str(index)
    try:
        text = index.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=where) from None
    entries = parse_json(text, where, CheckpointError).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(f, str) for f in entries.values()):
        raise CheckpointError(
            "key 'weight_map' is missing or malformed", where=where, allowed="tensor: file name"
        )
    tensors = _merge(read_header(_inside(root, name, where)) for name in sorted(set(entries.values())))
    for name, file in entries.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"tensor {name!r} is not in {file}", where=where, hint="the index is stale")
    for name, tensor in tensors.items():
        if name not in entries:
            raise CheckpointError(f"tensor {name!r} of {tensor.file.name} is not listed", where=where)
    return tensors


def _inside(root: Path, name: str, where: str) -> Path:
    """`root`/`name`, refused unless it is a file directly in the directory, links followed."""
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"file {name!r} lies outside the directory", where=where, allowed="a plain file name"
        )
    file = root / name
    if not file.exists():
        raise CheckpointError(f"file {name!r} is missing", where=where, hint="the download may be incomplete")
    if not file.is_file():
        raise CheckpointError(f"{name!r} is not a file", where=where)
    if not _link_allowed(root, file):
        raise CheckpointError(f"file {name!r} is a link that leaves the directory", where=where)
    return file


def _link_allowed(root: Path, file: Path) -> bool:
    """A link may stay in the directory, or follow the one layout of a model cache: snapshots/ID -> blobs/."""
    target, home = file.resolve(), root.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.parent in (home, cache)


def parse_json(text: str, where: str, error: type[Dsv4cError]) -> dict[str, object]:
    """A JSON object; repeated keys, NaN and Infinity are refused.

    Raises:
        error: with `where`, for anything that is not such an object.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        out: dict[str, object] = {}
        for key, value in items:
            if key in out:
                raise error(f"key {key!r} appears twice", where=where, allowed="each key once")
            out[key] = value
        return out

    def constant(word: str) -> object:
        raise error(f"the number {word} is not JSON", where=where, allowed="finite numbers")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except ValueError as problem:
        raise error(f"not valid JSON: {problem}", where=where) from None
    except RecursionError:
        raise error("not valid JSON: nested too deeply", where=where) from None
    if not isinstance(value, dict):
        raise error(f"the file holds a {type(value).__name__}", where=where, allowed="one JSON object")
    return value
