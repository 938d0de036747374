"""How the Engram ops become launches; part of `lowering.LOWERINGS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op

from .context import Context, blocks, ints, power
from .matrix import FORMS, POINTER, SCALES


def compress_tokens(c: Context, op: Op) -> None:
    tokens, classes = op.operands
    constants = {"DEAD": int(bool(op.attrs["dead"])), "DEAD_TOKEN": op.attrs["dead_token"], "BM": 128}
    rows = c.rows(tokens)
    c.launch(
        "compress_tokens", (blocks(rows, 128),), constants, warps=1, tokens=c.values[tokens],
        classes=c.weight(classes), out=c.result(op.result), M=rows, V=ints(classes)[0],
    )  # fmt: skip


def ngram_rows(c: Context, op: Op) -> None:
    ids, history, pos, n_valid = op.operands
    lists = [np.array(op.attrs[n], np.int64) for n in ("multipliers", "primes", "offsets")]
    heads, orders = op.attrs["heads"], len(lists[0]) - 1
    assert isinstance(heads, int)
    b, t = (c.dim(d) for d in ids.type.shape)
    constants = {
        "ORDERS": orders, "HEADS": heads, "HISTORY": ints(history)[0], "PAD": op.attrs["pad"],
        "DEAD": int(bool(op.attrs["dead"])), "BH": power(heads),
    }  # fmt: skip
    c.launch(
        "ngram_rows", (c.rows(ids),), constants, warps=1, ids=c.values[ids], history=c.values[history],
        pos=c.values[pos], n_valid=c.values[n_valid], numbers=c.literal(f"{op.loc}.numbers",
        np.concatenate(lists)),
        out=c.result(op.result), B=b, T=t,
    )  # fmt: skip


def ngram_history(c: Context, op: Op) -> None:
    history, ids, pos, n_valid = op.operands
    b, t = (c.dim(d) for d in ids.type.shape)
    size = ints(history)[0]
    c.launch(
        "ngram_history", (b,), {"HISTORY": size, "BH": power(size)}, warps=1, history=c.values[history],
        ids=c.values[ids], pos=c.values[pos], n_valid=c.values[n_valid], B=b, T=t,
    )  # fmt: skip
    c.values[op.result] = c.values[history]


def engram_rows(c: Context, op: Op) -> None:
    rows, table, *scales = op.operands
    (entries, width), (columns,) = ints(table), ints(rows)
    if table.type.dtype not in FORMS:
        raise TargetError(f"a table of {table.type.dtype.value}", where=c.where, allowed="f32, bf16, f8e4m3")
    tile, count = min(power(columns * width, 32), 1024), c.rows(rows)
    constants = {
        "FORM": FORMS[table.type.dtype], "SCALE": SCALES[scales[0].type.dtype] if scales else 0,
        "COLUMNS": columns, "WIDTH": width, "GROUPS": ints(scales[0])[1] if scales else 1, "BN": tile,
    }  # fmt: skip
    types = {"W": POINTER.get(table.type.dtype, "*u8"), "S": "*u8" if scales else "*fp32"}
    assert not scales or scales[0].type.dtype is DType.F8E8M0
    c.launch(
        "engram_rows", (count, blocks(columns * width, tile)), constants, types=types, rows=c.values[rows],
        w=c.weight(table), scale=c.weight(scales[0]) if scales else c.unused, out=c.result(op.result),
        M=count,
        V=entries, SROWS=entries if scales else 0,
    )  # fmt: skip


def engram_gate(c: Context, op: Op) -> None:
    x, kv, q_weight, k_weight, *ids = op.operands
    (n, d), rows = ints(x), c.rows(x)
    constants = {
        "N": n, "D": d, "COPYSIGN": int(bool(op.attrs["copysign"])),
        "RESIDUAL": int(bool(op.attrs["residual"])),
        "MARKED": len(ids), "BD": power(d, 32),
    }  # fmt: skip
    eps, floor = op.attrs["eps"], op.attrs["floor"]
    assert isinstance(eps, int | float) and isinstance(floor, int | float)
    c.launch(
        "engram_gate", (rows, n), constants, warps=8 if d > 1024 else 4, x=c.values[x], kv=c.values[kv],
        q_weight=c.weight(q_weight), k_weight=c.weight(k_weight),
        ids=c.values[ids[0]] if ids else c.unused_ids,
        out=c.result(op.result), M=rows, KS=c.values[kv].stride, eps=float(eps), floor=float(floor),
    )  # fmt: skip


def stream_norm(c: Context, op: Op) -> None:
    """The kernel of `rms_norm`, with a weight for every stream."""
    x, weight = op.operands
    (n, d), rows, eps = ints(x), c.rows(x), op.attrs["eps"]
    assert isinstance(eps, int | float)
    c.launch(
        "norm", (rows, n), {"HEADS": n, "D": d, "WEIGHTS": n, "BD": power(d, 32)},
        warps=max(1, min(8, power(d) // 256)), x=c.values[x], weight=c.weight(weight), y=c.result(op.result),
        M=rows, XS=c.values[x].stride, eps=float(eps),
    )  # fmt: skip


def short_conv(c: Context, op: Op) -> None:
    rows, ring, weight, pos, n_valid = op.operands
    (slots, n), (_, taps), dilation = ints(ring), ints(weight), op.attrs["dilation"]
    assert isinstance(dilation, int)
    b, t = (c.dim(s) for s in rows.type.shape[:2])
    tile = min(power(n, 32), 1024)
    constants = {"N": n, "TAPS": taps, "DILATION": dilation, "RING": slots, "BN": tile}
    c.launch(
        "short_conv", (c.rows(rows), blocks(n, tile)), constants, rows=c.values[rows], ring=c.values[ring],
        weight=c.weight(weight), pos=c.values[pos], n_valid=c.values[n_valid], y=c.result(op.result), B=b,
        T=t, XS=c.values[rows].stride,
    )  # fmt: skip


ENGRAM_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "compress_tokens": compress_tokens, "ngram_rows": ngram_rows, "ngram_history": ngram_history,
    "engram_rows": engram_rows, "engram_gate": engram_gate, "stream_norm": stream_norm,
    "short_conv": short_conv,
}  # fmt: skip
"""What this file adds to the emitter."""
