"""How a looked-up table lies in an artifact: sealed records, pages of them, and the directory of hot rows.

Arithmetic on bytes, shared by who writes tables and who reads them; touches no file and knows no number
format: a row's payload is its bytes, codes before scales.

    record    payload, zeros, row id (u32), seal (u32); a multiple of 16 bytes
    page      a multiple of 4096 bytes, as many whole records as fit, zeros; no record lies in two pages
    hot       the records of the hot rows, by ascending row id, without pages
    cold      the pages of all other rows, by ascending row id
    bits      one bit per row of the table: whether it is hot
    ranks     one u32 per 512 rows: how many rows before them are hot

With r the number of hot rows before row i, i is hot record r, or cold record i - r: page (i - r) // slots,
slot (i - r) % slots. So one count finds both, and the directory costs 1.0625 bits per row of the table; a
table without hot rows has none.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError

PAGE = 4096
"""Bytes; what O_DIRECT reads begin and end at, for every block device in use."""
BLOCK = 512
"""Rows per entry of `ranks`."""

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

SEED = np.uint32(0x9E3779B1)
"""What check sums begin with."""


@dataclass(frozen=True)
class TableLayout:
    """The sizes of one table.

    Attributes:
        name: of the table; the tensors are `name.hot`, `name.cold`, `name.bits` and `name.ranks`.
        rows: row ids are below this.
        payload: bytes of a row.
        record, page: bytes; see the module.
        hot_rows: rows of the hot region.

    Raises:
        ArtifactError: the sizes contradict each other.
    """

    name: str
    rows: int
    payload: int
    record: int
    page: int
    hot_rows: int = 0

    def __post_init__(self) -> None:
        sizes = [v for k, v in asdict(self).items() if k != "name"]
        if not all(type(n) is int and n >= 0 for n in sizes) or not self.payload or not self.rows:
            raise ArtifactError(f"table {self.name!r} has sizes {sizes}", allowed="integers, 1 or more")
        if self.record % 16 or self.record < self.payload + 8 or self.page % PAGE or self.page < self.record:
            what = f"table {self.name!r} has records of {self.record} bytes in pages of {self.page}"
            allowed = f"room for {self.payload} + 8 bytes, multiples of 16 and {PAGE}"
            raise ArtifactError(what, allowed=allowed)
        if self.hot_rows > self.rows or self.rows > 2**31:
            raise ArtifactError(f"table {self.name!r} has {self.hot_rows} hot rows of {self.rows}")

    @property
    def slots(self) -> int:
        """Records per page."""
        return self.page // self.record

    @property
    def cold_rows(self) -> int:
        return self.rows - self.hot_rows

    @property
    def pages(self) -> int:
        return -(-self.cold_rows // self.slots)

    @property
    def blocks(self) -> int:
        """Entries of `ranks`; 0 without hot rows."""
        return -(-self.rows // BLOCK) if self.hot_rows else 0

    @property
    def directory_bytes(self) -> int:
        """Memory of `bits` and `ranks`."""
        return self.blocks * (BLOCK // 8 + 4)

    @property
    def nbytes(self) -> int:
        """Of all four tensors."""
        return self.directory_bytes + self.hot_rows * self.record + self.pages * self.page

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor -> (dtype, shape)."""
        return {
            f"{self.name}.bits": ("i64", (self.blocks, BLOCK // 64)),
            f"{self.name}.ranks": ("i32", (self.blocks,)),
            f"{self.name}.hot": ("u8", (self.hot_rows, self.record)),
            f"{self.name}.cold": ("u8", (self.pages, self.page)),
        }

    def meta(self) -> dict[str, Any]:
        """What the manifest keeps; `TableLayout(**meta)` reads it back."""
        return asdict(self)


def seal(payload: Bytes, ids: Ids, record: int) -> Bytes:
    """Payloads u8 [n,p] of rows `ids` -> records u8 [n,record]."""
    out = np.zeros((len(ids), record), np.uint8)
    out[:, : payload.shape[1]] = payload
    words = out.view(np.uint32)
    words[:, -2] = ids
    words[:, -1] = _seals(words)
    return out


def _seals(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A sum of all words but the last with distinct odd factors, modulo 2^32.

    An odd factor is invertible, so no change of a single word goes unseen; a change of several does once in
    2^32. Far cheaper in NumPy than a CRC of many short records.
    """
    products = words[:, :-1] * _factors(words.shape[1] - 1)
    return np.asarray(products.sum(axis=1, dtype=np.uint32) + SEED)


@cache
def _factors(count: int) -> npt.NDArray[np.uint32]:
    odd = np.arange(count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return np.asarray(odd * SEED)  # odd times odd


def directory(hot: Ids, rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """(bits [blocks, 8], ranks [blocks]) of ascending hot row ids; empty for no ids."""
    blocks = -(-rows // BLOCK) if len(hot) else 0
    bits = np.zeros(blocks * BLOCK // 8, np.uint8)
    for start in range(0, blocks * BLOCK, 1 << 24):
        stop = min(start + (1 << 24), blocks * BLOCK)
        low, high = np.searchsorted(hot, (start, stop))
        mask = np.zeros(stop - start, np.bool_)
        mask[hot[low:high] - start] = True
        bits[start // 8 : stop // 8] = np.packbits(mask, bitorder="little")
    ranks = np.searchsorted(hot, np.arange(blocks, dtype=np.int64) * BLOCK)
    return bits.view("<i8").reshape(blocks, BLOCK // 64), ranks.astype(np.int32)
