"""How looking up stored rows becomes calls into the runtime and a kernel that decodes what they bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.graph import Op, Value
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime.container.tables import TableLayout

from .context import DTYPES, Context, ints, is_bf16
from .kernels import engram_store

PREFETCH, FETCH = "dsv4c.table_prefetch", "dsv4c.table_fetch"
"""What the runtime registers: (rows, handle) -> ticket, and (ticket, handle) -> records."""


@dataclass(frozen=True, eq=False)
class StoredTable:
    """A table that the step looks up instead of taking it as a parameter.

    Attributes:
        layout: sizes of the table in the artifact.
        codes, hot, scales: what it is made of.
        tier, cache_bytes: what a session does unless it is told otherwise.
    """

    layout: TableLayout
    codes: WeightExpr
    hot: WeightExpr
    scales: WeightExpr | None
    tier: str
    cache_bytes: int

    def parts(self) -> tuple[WeightExpr, ...]:
        """What one row consists of, in order."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)


def _handle(c: Context, store: str) -> Any:
    """The parameter by which the runtime tells its tables apart."""
    return c.handles.setdefault(store, relax.Var(f"table{len(c.handles)}", relax.TensorType([1], "int64")))


def engram_prefetch(c: Context, op: Op) -> None:
    """The ticket is a number of the runtime's; only `engram_fetch` reads it."""
    (rows,) = op.operands
    wrong = [u.name for u in op.result.users() if u.name != "engram_fetch"]
    if wrong:
        raise TargetError(f"a ticket is read by {wrong[0]}", where=op.loc, allowed="engram_fetch")
    args = [c.values[rows], _handle(c, str(op.attrs["store"]))]
    call = relax.op.call_dps_packed(PREFETCH, args, relax.TensorType([1], "int64"))
    c.values[op.result] = c.builder.emit(call)


def engram_fetch(c: Context, op: Op) -> None:
    ticket, codes, hot, *scales = op.operands
    table = _table(op, codes, hot, scales)
    known = c.tables.setdefault(table.layout.name, table)
    if known.layout != table.layout or not all(
        a.same(b) for a, b in zip(known.parts(), table.parts(), strict=True)
    ):
        raise TargetError(f"two tables are called {table.layout.name!r}", where=op.loc)
    b, t, columns = ticket.type.shape
    width, record = ints(codes)[1], table.layout.record
    number = "uint8" if scales else DTYPES[codes.type.dtype]
    count = record // codes.type.dtype.itemsize
    shape = [c.dim(d) for d in (b, t, columns, count)]
    args = [c.values[ticket], _handle(c, table.layout.name)]
    records = c.builder.emit(relax.op.call_dps_packed(FETCH, args, relax.TensorType(shape, number)))
    if scales:
        key = (record, width, ints(scales[0])[1], ints(ticket)[-1])
        values = [_values(v.type.dtype) for v in (codes, scales[0])]
        c.lower(op, engram_store.engram_records_scaled, *key, args=[records, *values])
    else:
        key = (count, width, ints(ticket)[-1], is_bf16(codes))
        c.lower(op, engram_store.engram_records_plain, *key, args=[records])


def _table(op: Op, codes: Value, hot: Value, scales: list[Value]) -> StoredTable:
    parts = [_expression(v, op) for v in (codes, hot, *scales)]
    (rows, width), a = ints(codes), op.attrs
    payload = width * codes.type.dtype.itemsize + sum(ints(s)[1] * s.type.dtype.itemsize for s in scales)
    sizes = [a["record"], a["page"], a["cache_bytes"]]
    assert all(isinstance(n, int) for n in sizes)
    record, page, cache = (int(str(n)) for n in sizes)
    layout = TableLayout(str(a["store"]), rows, payload, record, page, ints(hot)[0])
    return StoredTable(
        layout, parts[0], parts[1], parts[2] if scales else None, str(a["tier"]), cache
    )


def _expression(value: Value, op: Op) -> WeightExpr:
    source = value.producer
    if source is None or source.weight is None:
        raise TargetError("a stored table must be a weight", where=op.loc)
    return source.weight


def _values(dtype: DType) -> Any:
    """[256] f32: the number that every code of an 8-bit format stands for."""
    return relax.const(decode(np.arange(256, dtype=np.uint8), dtype).astype(np.float32))


ENGRAM_STORE_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "engram_prefetch": engram_prefetch,
    "engram_fetch": engram_fetch,
}
"""Every op of the family."""
