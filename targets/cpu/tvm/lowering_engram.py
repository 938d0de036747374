"""How the Engram ops become kernel calls; merged into the emitter's table by `lowering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.graph import Op

from .context import Context, ints, is_bf16
from .kernels import engram, rowwise


def compress_tokens(c: Context, op: Op) -> None:
    tokens, table = op.operands
    args = [c.values[tokens], c.weight(table)]
    key = (ints(table)[0], op.attrs["dead"], op.attrs["dead_token"])
    c.lower(op, engram.compress_tokens, *key, args=args)


def ngram_rows(c: Context, op: Op) -> None:
    a = op.attrs
    numbers = [relax.const(np.array(a[n], np.int64), "int64") for n in ("multipliers", "primes", "offsets")]
    orders = len(np.array(a["multipliers"])) - 1
    key = (orders, a["heads"], ints(op.operands[1])[0], a["pad"], a["dead"])
    c.lower(op, engram.ngram_rows, *key, args=[*(c.values[v] for v in op.operands), *numbers])


def ngram_history(c: Context, op: Op) -> None:
    kernel = c.kernel(engram.ngram_history, ints(op.operands[0])[0])
    args = [c.values[v] for v in op.operands]
    c.values[op.result] = c.update(kernel, args, 0, c.tensor(op.result.type))


def engram_rows(c: Context, op: Op) -> None:
    rows, table, *scales = op.operands
    (entries, width), (columns,) = ints(table), ints(rows)
    if not scales:
        key = (entries, width, columns, is_bf16(table))
        c.lower(op, engram.engram_rows_plain, *key, args=[c.values[rows], c.weight(table)])
        return
    values = [_values(v.type.dtype) for v in (table, scales[0])]
    args = [c.values[rows], c.weight(table), c.weight(scales[0]), *values]
    c.lower(op, engram.engram_rows_scaled, entries, width, ints(scales[0])[1], columns, args=args)


def _values(dtype: DType) -> Any:
    """[256] f32: the number that every code of an 8-bit format stands for."""
    return relax.const(decode(np.arange(256, dtype=np.uint8), dtype).astype(np.float32))


def engram_gate(c: Context, op: Op) -> None:
    x, kv, q_weight, k_weight, *ids = op.operands
    n, d = ints(x)
    if ids:
        marks = c.values[ids[0]]
    else:
        b, t = (c.dim(size) for size in x.type.shape[:2])
        kernel = c.kernel(engram.unmarked, (n + 1) * d)
        (marks,) = c.call(kernel, [c.values[kv]], relax.TensorType([b, t], "int32"))
    args = [c.values[x], c.values[kv], c.weight(q_weight), c.weight(k_weight), marks]
    a = op.attrs
    c.lower(op, engram.engram_gate, n, d, a["eps"], a["floor"], a["copysign"], a["residual"], args=args)


def stream_norm(c: Context, op: Op) -> None:
    x, weight = op.operands
    c.lower(op, engram.stream_norm, *ints(x), op.attrs["eps"], args=[c.values[x], c.weight(weight)])


def short_conv(c: Context, op: Op) -> None:
    rows, ring, taps, pos, _ = op.operands
    channels, count = ints(taps)
    key = (channels, count, op.attrs["dilation"], ints(ring)[0])
    args = [c.values[rows], c.values[ring], c.weight(taps, w.transpose), c.values[pos]]
    c.lower(op, engram.short_conv, *key, args=args)


def add_bias(c: Context, op: Op) -> None:
    x, bias = op.operands
    c.lower(op, rowwise.add_bias, ints(x)[-1], args=[c.values[x], c.weight(bias)])


ENGRAM_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "add_bias": add_bias, "compress_tokens": compress_tokens, "ngram_rows": ngram_rows,
    "ngram_history": ngram_history, "engram_rows": engram_rows, "engram_gate": engram_gate,
    "stream_norm": stream_norm, "short_conv": short_conv,
}  # fmt: skip
"""Every op of the Engram family, and the bias that one variant's projections have."""
