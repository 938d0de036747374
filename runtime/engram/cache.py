"""A cache of records with a fixed budget: eight ways per set, the least recently used way gives room.

Everything is a NumPy operation over all rows of a call, so that a lookup costs microseconds and an entry
eight bytes beside its record. Not locked; `store` does that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

WAYS = 8
_SPREAD = 0x9E3779B1
"""Times a row id it stays below 2^63."""


class RecordCache:
    """Records by row id.

    Args:
        budget: bytes of records, keys and ages together; below one set the cache holds nothing.
        record: bytes of a record.
    """

    def __init__(self, budget: int, record: int) -> None:
        self.sets = budget // (WAYS * (record + 8))
        self._keys = np.full((self.sets, WAYS), -1, np.int32)
        self._used = np.zeros((self.sets, WAYS), np.uint32)
        self._records = np.empty((self.sets * WAYS, record), np.uint8)  # touched only when filled
        self._tick = 0

    @property
    def nbytes(self) -> int:
        """Never more than the budget."""
        return self._keys.nbytes + self._used.nbytes + self._records.nbytes

    def _set_of(self, ids: Ids) -> Ids:
        return ids * _SPREAD % self.sets

    def _now(self) -> int:
        """The next age; before the numbers run out, all records become equally old."""
        if self._tick == 2**32 - 1:
            self._used[...], self._tick = self._keys >= 0, 1
        self._tick += 1
        return self._tick

    def take(self, ids: Ids, out: Bytes, at: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Copy the records of ids [n] that are here into rows at [n] of out; returns which [n] were."""
        if not self.sets or not len(ids):
            return np.zeros(len(ids), np.bool_)
        home = self._set_of(ids)
        match = self._keys[home] == ids[:, None]
        found: npt.NDArray[np.bool_] = match.any(axis=1)
        which, way = np.nonzero(match)
        if len(which):
            home = home[which]
            self._used[home, way] = self._now()
            out[at[which]] = self._records[home * WAYS + way]
        return found

    def put(self, ids: Ids, records: Bytes) -> int:
        """Keep records u8 [n,record] of ids [n]; returns how many others had to go.

        One that is already here stays as it is; the same id may come twice.
        """
        evicted, now = 0, self._now()
        while self.sets and len(ids):
            home = self._set_of(ids)
            new = ~(self._keys[home] == ids[:, None]).any(axis=1)
            if not new.all():
                ids, records, home = ids[new], records[new], home[new]
            way = self._used[home].argmin(axis=1)
            before = self._keys[home, way]
            self._keys[home, way] = ids  # of rows that take the same way, the last one stays
            stayed = self._keys[home, way] == ids
            self._used[home, way] = now
            places = (home * WAYS + way)[stayed]
            self._records[places] = records[stayed]
            evicted += len(set(places[before[stayed] >= 0].tolist()))
            ids, records = ids[~stayed], records[~stayed]
        return evicted
