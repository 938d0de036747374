"""How looking up stored rows becomes two kernels on the runtime's memory, and one that decodes what they
bring."""

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
from dsv4c.runtime.container.handles import Handle, Ticket
from dsv4c.runtime.container.tables import TableLayout

from .context import DTYPES, Context, ints, is_bf16
from .kernels import engram_lookup, engram_store


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
    type_ = relax.TensorType([Handle.WORDS], "int64")
    return c.handles.setdefault(store, relax.Var(f"table{len(c.handles)}", type_))


def engram_prefetch(c: Context, op: Op) -> None:
    """A ticket is two tensors that only `engram_fetch` reads: what is missing, and the records that are
    there."""
    (rows,) = op.operands
    users = [u for u in op.result.users() if u.name == "engram_fetch"]
    wrong = [u.name for u in op.result.users() if u not in users]
    if wrong or len(users) != 1:
        what = f"a ticket is read by {wrong[0]}" if wrong else f"a ticket is read {len(users)} times"
        raise TargetError(what, where=op.loc, allowed="one engram_fetch")
    record, page = _sizes(users[0])
    b, t, columns = (c.dim(d) for d in rows.type.shape)
    kernel = c.kernel(engram_lookup.engram_rows_begin, record, page, ints(rows)[-1])
    ticket = relax.TensorType([b, t, columns + 1, Ticket.EACH], "int32")
    found = relax.TensorType([b, t, columns, record], "uint8")
    made = c.call(kernel, [c.values[rows], _handle(c, str(op.attrs["store"]))], ticket, found)
    c.values[op.result], c.memo["found", op.result] = made


def engram_fetch(c: Context, op: Op) -> None:
    ticket, codes, hot, *scales = op.operands
    table = _table(op, codes, hot, scales)
    known = c.tables.setdefault(table.layout.name, table)
    if known.layout != table.layout or not all(
        a.same(b) for a, b in zip(known.parts(), table.parts(), strict=True)
    ):
        raise TargetError(f"two tables are called {table.layout.name!r}", where=op.loc)
    b, t, columns = ticket.type.shape
    width, (record, page) = ints(codes)[1], _sizes(op)
    number = "uint8" if scales else DTYPES[codes.type.dtype]
    count = record // codes.type.dtype.itemsize
    type_ = relax.TensorType([c.dim(d) for d in (b, t, columns, count)], number)
    args = [c.values[ticket], c.memo["found", ticket], _handle(c, table.layout.name)]
    kernel = c.kernel(engram_lookup.engram_rows_end, record, page, ints(ticket)[-1], number)
    (records,) = c.call(kernel, args, type_)
    if scales:
        key = (record, width, ints(scales[0])[1], ints(ticket)[-1])
        values = [_values(v.type.dtype) for v in (codes, scales[0])]
        c.lower(op, engram_store.engram_records_scaled, *key, args=[records, *values])
    else:
        key = (count, width, ints(ticket)[-1], is_bf16(codes))
        c.lower(op, engram_store.engram_records_plain, *key, args=[records])


def _sizes(op: Op) -> tuple[int, int]:
    """Bytes of a record and of a page."""
    record, page = op.attrs["record"], op.attrs["page"]
    assert isinstance(record, int) and isinstance(page, int)
    return record, page


def _table(op: Op, codes: Value, hot: Value, scales: list[Value]) -> StoredTable:
    parts = [_expression(v, op) for v in (codes, hot, *scales)]
    (rows, width), a = ints(codes), op.attrs
    payload = width * codes.type.dtype.itemsize + sum(ints(s)[1] * s.type.dtype.itemsize for s in scales)
    record, page = _sizes(op)
    cache = a["cache_bytes"]
    assert isinstance(cache, int)
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
