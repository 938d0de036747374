"""Writes safetensors files tensor by tensor; what is all zero can be left out as a hole of the file.

Owns the bytes of a file. Knows nothing of models or of what a tensor is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from dsv4c.ir.dtypes import Array, DType

from .safetensors import STORED

Chunks = Callable[[], Iterator[Array]]

_STORED_NAMES = {
    **{dtype: name for name, dtype in STORED.items()}, DType.F4E2M1X2: "I8",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor to write: its bytes come from `chunks`, in order, when it is its turn.

    Attributes:
        shape: in stored elements, for packed FP4 in bytes.
        chunks: None is zeros, for which nothing is written: they read as zeros, and take no room where the
            file system knows holes.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: Chunks | None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(file: Path, tensors: Sequence[StoredTensor]) -> None:
    """Stream tensors into one safetensors file; it appears under its name only when complete."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        end = offset + t.nbytes
        header[t.name] = {
            "dtype": _STORED_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(file.name + ".part")
    with temporary.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        end = out.tell()
        for t in tensors:
            end += t.nbytes
            if t.chunks is None:
                out.seek(end)
                continue
            written = sum(out.write(np.ascontiguousarray(chunk).data) for chunk in t.chunks())
            assert written == t.nbytes, t.name
        out.truncate(end)  # the last tensor may be a hole
    temporary.replace(file)
