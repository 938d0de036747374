"""What an op costs by its types: floating-point operations, bytes of weights and of everything else.

Counts what the meaning needs, not what a kernel does: a weight is read once per step in its stored format,
a routed expert only when a token chose it, an entry only when it is visible. Knows no machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from .amounts import least
from .dims import Dim, evaluate
from .graph import Module, Op, Value
from .weights import WeightExpr

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """Of one op in one step.

    Attributes:
        flops: multiplications and additions.
        weight_bytes: bytes of weights read, in their stored formats.
        data_bytes: bytes of activations and state read and written.
    """

    flops: int
    weight_bytes: int
    data_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.data_bytes + other.data_bytes,
        )

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.data_bytes


def size_of(value: Value, sizes: Sizes) -> int:
    """Elements of a value; rows routed to one expert count as an even share of all routes (rounded up)."""
    return prod(_dim(d, sizes) for d in value.type.shape)


def bytes_of(value: Value, sizes: Sizes) -> int:
    return size_of(value, sizes) * value.type.dtype.itemsize


def _dim(d: Dim | int, sizes: Sizes) -> int:
    if isinstance(d, Dim) and not set(d.symbols()) <= sizes.keys():
        return sizes.get("routed rows", 1)
    return evaluate(d, sizes)


def op_cost(op: Op, sizes: Sizes) -> Cost:
    """The cost of one op.

    Args:
        sizes: symbol -> number; with `past`, the tokens already seen (0 without), which decides how many
            entries and ring rows attention and the index read.
    """
    if op.weight is not None:
        return Cost(0, 0, 0)
    special = _SPECIAL.get(op.name)
    if special is not None:
        return special(op, sizes)
    results = sum(size_of(v, sizes) for v in op.results)
    flops = _PER_ELEMENT.get(op.name, 1) * results
    return Cost(flops, _weights(op), _data(op, sizes))


_PER_ELEMENT = {
    "embed": 0, "repeat_streams": 0, "split_heads": 0, "gather_rows": 0, "positions": 0, "ring_write": 0,
    "entries_append": 0, "dispatch": 0, "rms_norm": 4, "unit_norm": 3, "swiglu": 6, "clamped_swiglu": 8,
    "rotary": 3, "sqrt_softplus": 12, "compress": 8, "split_columns": 0, "norm_rotary": 7, "add_route": 0,
    "merge_heads": 0, "gelu": 10, "gather_cells": 0, "image_span": 0, "merge_images": 0, "grid_angles": 10,
}  # fmt: skip
"""Operations per element of the result; exp and its kin count as five."""


def _weights(op: Op) -> int:
    """Stored bytes of the weight operands; a table that is looked up gives a few rows, which are left out."""
    if op.name in ("embed", "route_hash"):
        return 0
    found = (v.producer for v in op.operands)
    return sum(stored_bytes(p) for p in found if p is not None and p.weight is not None)


def stored_bytes(op: Op) -> int:
    """Bytes of a `weight` op as it is stored: of the codes and scales where it is a decode of these."""
    x = op.weight
    assert x is not None
    return _expression_bytes(x)


def _expression_bytes(x: WeightExpr) -> int:
    if x.op.startswith("decode"):
        return sum(a.nbytes for a in x.args)
    return sum(_expression_bytes(a) for a in x.args) if x.op in ("stack", "concat") else x.nbytes


def _data(op: Op, sizes: Sizes) -> int:
    read = (v for v in op.operands if v.producer is None or v.producer.weight is None)
    if op.definition.consumes is not None:  # in place: only the new rows move
        state = op.operands[op.definition.consumes]
        return sum(2 * bytes_of(v, sizes) for v in op.operands if v is not state and v.type.rank > 1)
    return sum(bytes_of(v, sizes) for v in read) + sum(bytes_of(v, sizes) for v in op.results)


def _matrix(op: Op, sizes: Sizes) -> Cost:
    """linear, grouped_linear, hc_mix, hc_head_mix: every row meets the whole matrix."""
    weight = op.operands[1].type.shape
    columns = _dim(weight[-1], sizes)
    rows = size_of(op.operands[0], sizes) // columns
    per_row = prod(_dim(d, sizes) for d in weight)
    if op.name == "grouped_linear":
        rows //= int(op.attrs["groups"])  # type: ignore[arg-type]
    return Cost(2 * rows * per_row, _weights(op), _data(op, sizes))


def _experts(op: Op, sizes: Sizes) -> Cost:
    routes = size_of(op.operands[1], sizes)
    experts, width, inner = (_dim(d, sizes) for d in op.operands[5].type.shape)
    read = least(routes, experts) * _weights(op) // experts
    return Cost(routes * (6 * width * inner + 8 * inner), read, _data(op, sizes))


def _attention(op: Op, sizes: Sizes) -> Cost:
    b, t, heads, d = (_dim(x, sizes) for x in op.operands[0].type.shape)
    seen = sizes.get("past", 0) + t
    visible = least(int(op.attrs["window"]), seen)  # type: ignore[arg-type]
    ratio = int(op.attrs["ratio"])  # type: ignore[arg-type]
    if ratio and len(op.operands) > 7:
        visible += least(_dim(op.operands[7].type.shape[2], sizes), seen // ratio)
    elif ratio and len(op.operands) > 6:
        visible += seen // ratio
    moved = 4 * b * (2 * t * heads * d + visible * d)
    return Cost(4 * b * t * heads * d * visible, _weights(op), moved)


def _full_attention(op: Op, sizes: Sizes) -> Cost:
    b, n, heads, d = (_dim(x, sizes) for x in op.operands[0].type.shape)
    return Cost(4 * b * heads * n * n * d, 0, _data(op, sizes))


def _index(op: Op, sizes: Sizes) -> Cost:
    b, t, heads, d = (_dim(x, sizes) for x in op.operands[0].type.shape)
    entries = (sizes.get("past", 0) + t) // int(op.attrs["ratio"])  # type: ignore[arg-type]
    readers = op.result.users() if op.name == "index_scores" else []
    restricts = readers[0] if len(readers) == 1 and readers[0].name == "index_restrict" else None
    if len(op.operands) > 5 or restricts:  # only the entries of some blocks are scored
        blocks, by = (restricts.operands[1], restricts) if restricts else (op.operands[5], op)
        entries = least(entries, _dim(blocks.type.shape[2], sizes) * int(by.attrs["size"]))  # type: ignore[arg-type]
    return Cost(2 * b * t * heads * (d + 1) * entries, 0, 4 * b * (t * heads * d + entries * d))


def _border(op: Op, sizes: Sizes) -> Cost:
    """hc_pre and hc_post_pre: the projection, and per stream element its expansion and collapse."""
    streams = op.operands[0]
    n = _dim(streams.type.shape[2], sizes)
    projection = op.operands[1 if op.name == "hc_pre" else 4].type.shape
    rows = size_of(streams, sizes) // _dim(projection[1], sizes)
    expand = 2 * n + 1 if op.name == "hc_post_pre" else 0
    flops = 2 * rows * prod(_dim(d, sizes) for d in projection) + (expand + 6) * size_of(streams, sizes)
    return Cost(flops, _weights(op), _data(op, sizes))


def _close(op: Op, sizes: Sizes) -> Cost:
    """entries_close: pooling, norm and rotation of the groups a step closes."""
    b, t, channels = (_dim(d, sizes) for d in op.operands[1].type.shape)
    ratio = int(op.attrs["ratio"])  # type: ignore[arg-type]
    seen = sizes.get("past", 0)
    closed = (seen + t) // ratio - seen // ratio
    pooled = b * closed * ratio * channels * (2 if op.attrs["overlap"] else 1)
    return Cost(8 * pooled, _weights(op), 8 * pooled)


_SPECIAL: dict[str, Callable[[Op, Sizes], Cost]] = {
    "linear": _matrix, "grouped_linear": _matrix, "hc_mix": _matrix, "hc_head_mix": _matrix,
    "expert_mlp": _experts, "attention": _attention, "full_attention": _full_attention,
    "index_scores": _index, "index_select": _index, "index_candidates": _index,
    "hc_pre": _border, "hc_post_pre": _border, "entries_close": _close,
}  # fmt: skip


def module_cost(module: Module, sizes: Sizes) -> dict[str, tuple[int, Cost]]:
    """Op name -> (how many, their cost together)."""
    out: dict[str, tuple[int, Cost]] = {}
    for op in module.ops:
        if op.weight is None:
            count, total = out.get(op.name, (0, Cost(0, 0, 0)))
            out[op.name] = count + 1, total + op_cost(op, sizes)
    return out
