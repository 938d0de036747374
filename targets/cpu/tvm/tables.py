"""Writes looked-up tables into an artifact, a block of rows at a time; says what sessions need to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CompileError
from dsv4c.ir import weights as w
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.weights import TensorStore, WeightExpr
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.container.tables import PAGE, TableLayout, directory, seal

from .lowering_engram_store import StoredTable

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

BLOCK_BYTES = 16 << 20
"""Of payload per block; a few times as much is in memory."""


def write_table(table: StoredTable, store: TensorStore, writer: ArtifactWriter) -> Iterator[int]:
    """Write the four tensors of a table; yields the bytes of each.

    Raises:
        CompileError: the hot ids are not ascending or not rows of the table.
    """
    layout = table.layout
    hot = np.asarray(w.materialise(table.hot, store)).astype(np.int64)
    if len(hot) and (hot.min() < 0 or hot.max() >= layout.rows or (np.diff(hot) <= 0).any()):
        raise CompileError("hot row ids must be ascending rows of the table", where=layout.name)
    bits, ranks = directory(hot, layout.rows)
    hot_records, cold_pages = _hot_records(table, store, hot), _cold_pages(table, store, hot)
    contents: tuple[Bytes | npt.NDArray[Any] | Iterator[Bytes], ...] = (bits, ranks, hot_records, cold_pages)
    for (name, (dtype, shape)), content in zip(layout.shapes().items(), contents, strict=True):
        writer.add_tensor(name, dtype, shape, content, align=PAGE)
        yield writer.tensors[-1].nbytes


def _hot_records(table: StoredTable, store: TensorStore, hot: Ids) -> Iterator[Bytes]:
    for start, stop in _blocks(table.layout):
        low, high = np.searchsorted(hot, (start, stop))
        if low < high:
            ids = hot[low:high]
            yield seal(_payload(table, store, start, stop)[ids - start], ids, table.layout.record)


def _cold_pages(table: StoredTable, store: TensorStore, hot: Ids) -> Iterator[Bytes]:
    """Whole pages; records that do not fill one wait for the next block."""
    layout = table.layout
    left = np.empty((0, layout.record), np.uint8)
    for start, stop in _blocks(layout):
        low, high = np.searchsorted(hot, (start, stop))
        payload, ids = _payload(table, store, start, stop), np.arange(start, stop, dtype=np.int64)
        if low < high:
            cold = np.ones(stop - start, np.bool_)
            cold[hot[low:high] - start] = False
            payload, ids = payload[cold], ids[cold]
        records = seal(payload, ids, layout.record)
        records = np.concatenate([left, records]) if len(left) else records
        whole = len(records) // layout.slots * layout.slots
        left = records[whole:]
        if whole:
            yield _paged(records[:whole], layout)
    if len(left):
        last = np.zeros((layout.slots, layout.record), np.uint8)
        last[: len(left)] = left
        yield _paged(last, layout)


def _paged(records: Bytes, layout: TableLayout) -> Bytes:
    used = layout.slots * layout.record
    pages = np.zeros((len(records) // layout.slots, layout.page), np.uint8)
    pages[:, :used] = records.reshape(-1, used)
    return pages


def _blocks(layout: TableLayout) -> Iterator[tuple[int, int]]:
    size = max(1, BLOCK_BYTES // layout.payload)
    for start in range(0, layout.rows, size):
        yield start, min(start + size, layout.rows)


def _payload(table: StoredTable, store: TensorStore, start: int, stop: int) -> Bytes:
    """[stop - start, payload]: the bytes of rows, codes before scales."""
    parts = [_rows(x, store, start, stop) for x in table.parts()]
    flat = [p.reshape(len(p), -1).view(np.uint8) for p in map(np.ascontiguousarray, parts)]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)


def _rows(x: WeightExpr, store: TensorStore, start: int, stop: int) -> npt.NDArray[np.generic]:
    """Rows of an expression; of a join, only from the parts that have them."""
    if x.op != "concat":
        return w.materialise(w.rows(x, start, stop), store)
    found, at = [], 0
    for part in x.args:
        low, high = max(start - at, 0), min(stop - at, part.shape[0])
        if low < high:
            found.append(_rows(part, store, low, high))
        at += part.shape[0]
    return np.concatenate(found)


def tables_meta(tables: Mapping[str, StoredTable]) -> dict[str, Any]:
    """What the manifest says of each table; a session shares a budget of its own out by these bytes."""
    total = sum(t.cache_bytes for t in tables.values())
    return {
        name: {
            "layout": t.layout.meta(), "tier": t.tier, "cache_bytes": t.cache_bytes, "all_cache_bytes": total,
        }
        for name, t in tables.items()
    }  # fmt: skip


def state_writes(module: Module) -> dict[str, list[Any]]:
    """State -> which rows a step writes, where that is not all of it (`runtime.undo` reads it)."""
    found = ((name, _writes(value)) for name, value in module.states.items())
    return {name: writes for name, writes in found if writes}


def _writes(state: Value) -> list[Any]:
    """["ring"] or ["entries", ratio] where every op that overwrites a state does so, else nothing."""
    kinds: list[list[Any]] = []
    value: Value | None = state
    while value is not None:
        op = next((u for u in value.users() if _consumes(u, value)), None)
        if op is not None:
            entries: list[Any] = ["entries", op.attrs.get("ratio")]
            ring = [["ring"]] if op.name == "ring_write" else [[]]
            kinds += [entries] if op.name in ("entries_append", "entries_close") else ring
        value = op.results[0] if op is not None else None
    return kinds[0] if kinds and all(k == kinds[0] for k in kinds) else []


def _consumes(op: Op, value: Value) -> bool:
    index = op.definition.consumes
    return index is not None and op.operands[index] is value
