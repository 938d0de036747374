"""Looking up table rows in two halves, so that what lies on disk is read while other layers run.

Knows operands and sizes of the store; where rows really lie is the business of a target's runtime.
"""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.dtypes import DType
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32, i32

Types = tuple[TensorType, ...]

TIERS = ("resident", "disk")


def _engram_prefetch(sig: Signature) -> Types:
    return (i32(*sig.shape(0, 3)),)


def _engram_fetch(sig: Signature) -> Types:
    b, t, columns = sig.shape(0, 3)
    rows, width = (static(sig, s, "table shape") for s in sig.shape(1, 2))
    if static(sig, sig.shape(2, 1)[0], "count of hot rows") > rows or sig.type(2).dtype is not DType.I32:
        sig.fail(f"needs hot i32[n], n at most {rows}, got {sig.type(2)}")
    payload = width * sig.type(1).dtype.itemsize
    if (sig.type(1).dtype is DType.F8E4M3) != (len(sig.types) > 3):
        sig.fail(f"needs f8e4m3 codes with scales or plain numbers without, got {sig.type(1)}")
    if len(sig.types) > 3:
        if sig.type(3).dtype is not DType.F8E8M0:
            sig.fail(f"needs scales of f8e8m0, got {sig.type(3)}")
        sig.equal(rows, sig.shape(3, 2)[0], "the rows of codes and scales")
        groups = static(sig, sig.shape(3, 2)[1], "scale count")
        if not groups or width % groups:
            sig.fail(f"cannot split {width} codes into {groups} groups of one scale")
        payload += groups * sig.type(3).dtype.itemsize
    record, page = sig.int("record"), sig.int("page")
    if record % 16 or record < payload + 8 or page % 4096 or page < record:
        sig.fail(f"needs records of 16n >= {payload + 8} bytes in pages of 4096n, got {record} in {page}")
    sig.choice("tier", *TIERS)
    return (f32(b, t, static(sig, columns, "column count") * width),)


ENGRAM_STORE: tuple[OpDef, ...] = (
    OpDef(
        "engram_prefetch",
        ("rows",),
        _engram_prefetch,
        (AttrDef("store", AttrKind.STR),),
        source="Engram 7",
        doc="A ticket for the rows, whose reading from the table `store` begins; as a value, the row ids.",
    ),
    OpDef(
        "engram_fetch",
        ("ticket", "codes", "hot", "scales?"),
        _engram_fetch,
        (
            AttrDef("store", AttrKind.STR),
            AttrDef("tier", AttrKind.STR),
            AttrDef("cache_bytes", AttrKind.INT),
            AttrDef("record", AttrKind.INT),
            AttrDef("page", AttrKind.INT),
        ),
        source="Engram 5, 7",
        doc="engram_rows of a ticket's rows; rows in `hot` (ascending ids) are kept in memory, the others in "
        "pages of the store.",
    ),
)
