"""Where the rows of Engram tables lie, and when they are asked for: before the layers that do not need them.

Chooses sizes and hot rows; how bytes are written and read is the business of targets and of the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dsv4c.errors import PassError
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.expr import OverlaidStore
from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.ops.engram_store import TIERS

from .base import Pass
from .statistics import Statistics

Ids = npt.NDArray[np.int64]

PAGE = 4096
_SEAL = 8
"""Bytes that the store adds to a row: its id and a check sum."""
_BLOCK, _BLOCK_BYTES = 512, 68
"""Rows that one block of a directory covers, and its bytes."""


@dataclass(frozen=True)
class _Table:
    """One looked-up table: the op, its name in the store, its sizes, and the rows that calibration saw."""

    op: Op
    name: str
    rows: int
    record: int
    ids: Ids
    counts: Ids

    @property
    def page(self) -> int:
        return -(-self.record // PAGE) * PAGE

    @property
    def directory(self) -> int:
        return -(-self.rows // _BLOCK) * _BLOCK_BYTES

    def pages(self, rows: int) -> int:
        """Pages that many rows take."""
        return -(-rows // (self.page // self.record))


@dataclass(frozen=True)
class LayoutEngram(Pass):
    """Each `engram_rows` becomes an `engram_prefetch`, as early as its row ids can be known, and an
    `engram_fetch` where the lookup stood.

    Row ids depend on tokens only, so their computation moves to the top of the step with the prefetch, and
    the reads run under the layers in between. Rows that calibration saw most often are kept in memory.

    Options:
        stats: the file of calibration statistics with an array `engram.TABLE`, int64 [2, n] of row ids and
            counts, for every table; required when there is a hot region.
        hot_bytes: budget of hot rows and their directories, of all tables together.
        cache_bytes: budget of the cache of rows read from disk, of all tables together; shared out by the
            lookups that the hot region does not answer.
        tier: "disk" or "resident"; a session may choose otherwise.

    Notes: under `layout_engram`, `tables`, `budget` and, with statistics, `hit_curve`: the share of the
    counted lookups that the most asked-for rows of all tables answer, by the bytes of their records.

    Raises:
        PassError: an unknown tier, a budget that holds not one row or page, statistics of another table.
    """

    name: ClassVar[str] = "layout_engram"
    doc: ClassVar[str] = "look Engram rows up in a store, asked for before the layers above them run"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    stats: str = ""
    hot_bytes: int = 0
    cache_bytes: int = 64 << 20
    tier: str = "disk"

    def run(self, module: Module) -> int:
        if self.tier not in TIERS:
            raise PassError(f"option tier = {self.tier!r}", where=self.name, allowed=", ".join(TIERS))
        if self.hot_bytes > 0 and not self.stats:
            hint = "count rows with dsv4c.passes.row_counts, or compile with hot_bytes=0"
            raise PassError("hot rows are chosen by statistics", where=self.name, allowed="stats", hint=hint)
        statistics = Statistics.load(Path(self.stats)) if self.stats else None
        lookups = [op for op in module.ops if op.name == "engram_rows" and _is_stored(op)]
        tables = [_table(op, statistics) for op in lookups]
        if not tables:
            return 0
        hot = self._hot(tables)
        cache = self._cache(tables, hot)
        own: dict[str, npt.NDArray[np.int32]] = {}
        prefetches = []
        for table, ids, share in zip(tables, hot, cache, strict=True):
            own[f"{table.name}.hot"] = ids.astype(np.int32)
            prefetches.append(self._replace(module, table, len(ids), share))
        hoist(module, prefetches)
        if module.store is not None:
            module.store = OverlaidStore(module.store, own)
        module.notes[self.name] = self._notes(tables, hot, cache)
        return len(tables)

    def _hot(self, tables: list[_Table]) -> list[Ids]:
        """The rows of each table that are asked for most per byte, within the budget; ascending ids."""
        if self.hot_bytes <= 0:
            return [np.empty(0, np.int64) for _ in tables]
        seen = [t for t in tables if len(t.ids)]
        budget = self.hot_bytes - sum(t.directory for t in seen)
        least = min((t.record for t in seen), default=0)
        if budget < least:
            raise PassError(
                f"option hot_bytes = {self.hot_bytes} holds no row beside the directories", where=self.name,
                allowed=f"{self.hot_bytes - budget + least} or more, or 0",
            )  # fmt: skip
        worth = np.concatenate([t.counts / t.record for t in tables])
        size = np.concatenate([np.full(len(t.ids), t.record, np.int64) for t in tables])
        order = np.argsort(-worth, kind="stable")
        taken = np.zeros(len(order), np.bool_)
        taken[order[np.cumsum(size[order]) <= budget]] = True
        cuts = np.cumsum([len(t.ids) for t in tables])[:-1]
        return [t.ids[mask] for t, mask in zip(tables, np.split(taken, cuts), strict=True)]

    def _cache(self, tables: list[_Table], hot: list[Ids]) -> list[int]:
        """Bytes for each table: a page each, the rest by the lookups that go past the hot rows."""
        if self.tier != "disk":
            return [0] * len(tables)
        least = [t.page for t in tables]
        if self.cache_bytes < sum(least):
            raise PassError(
                f"option cache_bytes = {self.cache_bytes} holds no page for each of {len(tables)} tables",
                where=self.name, allowed=f"{sum(least)} or more",
            )  # fmt: skip
        missed = [t.counts.sum() - _hits(t, ids) for t, ids in zip(tables, hot, strict=True)]
        past = np.array(missed, np.float64)
        share = past / past.sum() if past.sum() else np.full(len(tables), 1 / len(tables))
        rest = self.cache_bytes - sum(least)
        return [a + int(rest * b) for a, b in zip(least, share.tolist(), strict=True)]

    def _replace(self, module: Module, table: _Table, hot_rows: int, cache_bytes: int) -> Op:
        op, codes, scales = table.op, table.op.operands[1], table.op.operands[2:]
        made = Module(module.name)
        b = Builder(made)
        b.loc = op.loc
        ticket = b.op("engram_prefetch", op.operands[0], store=table.name)
        hot = b.weight(w.source(f"{table.name}.hot", DType.I32, (hot_rows,)), f"{table.name}.hot")
        found = b.op(
            "engram_fetch", ticket, codes, hot, *scales, store=table.name, tier=self.tier,
            cache_bytes=cache_bytes, record=table.record, page=table.page,
        )  # fmt: skip
        op.result.replace_with(found)
        for name, value in module.outputs.items():
            if value is op.result:
                module.outputs[name] = found
        at = module.ops.index(op)
        module.ops[at : at + 1] = made.ops
        op.drop()
        assert ticket.producer is not None
        return ticket.producer

    def _notes(self, tables: list[_Table], hot: list[Ids], cache: list[int]) -> dict[str, Any]:
        rows = []
        for t, ids, share in zip(tables, hot, cache, strict=True):
            seen = int(t.counts.sum())
            rows.append({
                "loc": t.name, "rows": t.rows, "record_bytes": t.record, "hot_rows": len(ids),
                "hot_bytes": len(ids) * t.record, "directory_bytes": t.directory if len(ids) else 0,
                "cold_bytes": t.pages(t.rows - len(ids)) * t.page, "cache_bytes": share,
                "expected_hit_rate": round(_hits(t, ids) / seen, 6) if seen else None,
            })  # fmt: skip
        budget = {"hot_bytes": self.hot_bytes, "cache_bytes": self.cache_bytes, "tier": self.tier}
        curve = _hit_curve(tables)
        return {"tables": rows, "budget": budget, **({"hit_curve": curve} if curve else {})}


def _hit_curve(tables: list[_Table]) -> list[dict[str, float]]:
    """Lookups answered by rows kept in memory, at budgets that double up to what every counted row takes."""
    counts = np.concatenate([t.counts for t in tables])
    if not len(counts):
        return []
    size = np.concatenate([np.full(len(t.ids), t.record, np.int64) for t in tables])
    order = np.argsort(-(counts / size), kind="stable")
    bytes_, hits = np.cumsum(size[order]), np.cumsum(counts[order])
    budgets = [PAGE << n for n in range(int(bytes_[-1]).bit_length()) if PAGE << n < bytes_[-1]]
    found = [(b, np.searchsorted(bytes_, b, side="right")) for b in (*budgets, int(bytes_[-1]))]
    return [{"bytes": b, "hit_rate": round(float(hits[n - 1] / hits[-1]), 6)} for b, n in found if n]


def hoist(module: Module, ops: list[Op]) -> None:
    """Move ops, and all they are computed from, to the earliest places where they may stand.

    An op that overwrites a state stays where it is, and what reads its result stays behind it; reading a
    state earlier is always right, because nothing that overwrites it can have come before.
    """
    order = {op: i for i, op in enumerate(module.ops)}
    needed = {op for last in ops for op in _computed_from(last)}
    after: dict[Op, int] = {}  # the last op that overwrites a state before which an op may not stand
    for op in sorted(needed, key=order.__getitem__):
        producers = [v.producer for v in op.operands if v.producer is not None]
        fixed = op.definition.consumes is not None
        after[op] = order[op] if fixed else max((after[p] for p in producers), default=-1)
    at = {op: (after.get(op, i), op in after and after[op] != i, i) for op, i in order.items()}
    module.ops.sort(key=at.__getitem__)


def _computed_from(op: Op) -> set[Op]:
    found, stack = {op}, [op]
    while stack:
        for value in stack.pop().operands:
            if value.producer is not None and value.producer not in found:
                found.add(value.producer)
                stack.append(value.producer)
    return found


def _is_stored(op: Op) -> bool:
    return all(v.producer is not None and v.producer.weight is not None for v in op.operands[1:])


def _table(op: Op, statistics: Statistics | None) -> _Table:
    codes, *scales = op.operands[1:]
    payload = _row_bytes(codes) + sum(_row_bytes(s) for s in scales)
    record = -(-(payload + _SEAL) // 16) * 16
    assert codes.producer is not None
    name, rows = codes.producer.loc, codes.type.shape[0]
    assert isinstance(rows, int)
    empty = np.empty(0, np.int64)
    ids, counts = row_counts(statistics, name, rows) if statistics else (empty, empty)
    return _Table(op, name, rows, record, ids, counts)


def _row_bytes(value: Value) -> int:
    width = value.type.shape[1]
    assert isinstance(width, int)
    return width * value.type.dtype.itemsize


def row_counts(statistics: Statistics, table: str, rows: int) -> tuple[Ids, Ids]:
    """(ascending row ids, counts) of a table in calibration statistics.

    Raises:
        PassError: the statistics lack the table, or name rows that it does not have.
    """
    key, hint = f"engram.{table}", "count the rows of the model that is being compiled"
    if key not in statistics.extra:
        known = ", ".join(n for n in statistics.extra if n.startswith("engram.")) or "no table"
        what = f"the statistics (of {statistics.identity}) have nothing on {key}"
        raise PassError(what, where="layout_engram", allowed=known, hint=hint)
    array = np.asarray(statistics.extra[key])
    good = array.ndim == 2 and len(array) == 2 and array.dtype == np.int64
    if not good or (array.shape[1] and (array.min() < 0 or (np.diff(array[0]) <= 0).any())):
        what = f"{key} is {array.dtype}{list(array.shape)}"
        raise PassError(what, where="layout_engram", allowed="int64[2, n], ascending row ids and counts")
    if array.shape[1] and array[0, -1] >= rows:
        what = f"of another table: row {array[0, -1]} in {key} of {statistics.identity}, the table has {rows}"
        raise PassError(what, where="layout_engram", hint=hint)
    return array[0], array[1]


def _hits(table: _Table, hot: Ids) -> int:
    return int(table.counts[np.isin(table.ids, hot)].sum())
