"""What a MODEL-level module asks of a machine: bytes by layer and expert, and ops grouped by equal cost.

Owns the reading of a module for estimates; knows no device and no split. Costs of ops are those of `ir.cost`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from dsv4c.errors import TargetError, UsageError, unknown
from dsv4c.ir.cost import stored_bytes
from dsv4c.ir.dims import Dim
from dsv4c.ir.dtypes import DType
from dsv4c.ir.expr import WeightExpr
from dsv4c.ir.formats import SCHEMES, Scheme
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.levels import Level
from dsv4c.ir.packed import packed_form
from dsv4c.passes.narrow_weights import PACKED_READERS
from dsv4c.passes.requantise import OPTION_OF
from dsv4c.passes.weight_classes import class_of, weight_class

from .onnx.ops import HOST_OPS

ALIASES = {"fp4": "mxfp4"}
"""Short names of schemes: what the released checkpoints call FP4 is MXFP4."""

CLASSES = tuple(dict.fromkeys(OPTION_OF.values()))
"""What `weights` may name, the options of the pass `requantise`; other weights stay as they are stored."""

NUMBERS = {
    DType.F32: "f32", DType.BF16: "bf16", DType.F16: "fp16", DType.I8: "int8", DType.F8E4M3: "fp8",
    DType.F8E4M3FNUZ: "fp8", DType.F4E2M1X2: "fp4", DType.I4X2: "int4",
}  # fmt: skip
"""Element type of stored codes -> how its numbers are called in estimates."""

CONTEXT_OPS = frozenset({
    "attention", "index_scores", "index_topk", "compress", "entries_append", "ring_write", "candidate_blocks",
    "index_restrict",
})  # fmt: skip
"""Ops that read or write the state; they are a class of their own, "context"."""

_LAYER = re.compile(r"^layers\.(\d+)\.")
_EXPERT = re.compile(r"\.ffn\.experts\.(\d+)(\.|$)")
_STEP = frozenset({"B", "T", "L", "ctx"})


@dataclass(frozen=True)
class Layer:
    """Bytes of the weights of one layer, in the chosen formats.

    Attributes:
        dense: of everything but the routed experts.
        experts: of each routed expert.
        chosen: experts a token is sent to.
    """

    dense: int
    experts: tuple[int, ...]
    chosen: int

    @property
    def total(self) -> int:
        return self.dense + sum(self.experts)


@dataclass(frozen=True, eq=False)
class Work:
    """Ops of one layer and class that cost the same.

    Attributes:
        op: one of them.
        count: how many.
        layer: where; -1 ahead of the first layer, the number of layers behind the last.
        part: weight class, "context" or "other".
        numbers: what its weights are stored in, a value of `NUMBERS`; "" for an op without a matrix.
        weight_bytes: that one op reads.
        expert: whether it belongs to one routed expert.
    """

    op: Op
    count: int
    layer: int
    part: str
    numbers: str
    weight_bytes: int
    expert: bool


@dataclass(frozen=True, eq=False)
class Workload:
    """A module as estimates see it.

    Attributes:
        layers: bytes by layer.
        ahead, behind: bytes of weights ahead of the first layer and behind the last.
        host: bytes of tables that are looked up on the host, which no device holds.
        work: all ops, grouped.
        width: values of a token inside a layer.
        streams: values of a token between two layers.
    """

    module: Module
    layers: tuple[Layer, ...]
    ahead: int
    behind: int
    host: int
    work: tuple[Work, ...]
    width: int
    streams: int

    @cached_property
    def weight_bytes(self) -> int:
        return self.ahead + self.behind + sum(layer.total for layer in self.layers)

    def state_bytes(self, layer: int, context: int, item: int) -> int:
        """Bytes of one sequence's state in one layer, at `item` bytes a float."""
        return sum(
            prod(v.type.concrete({"B": 1, "ctx": context})) * (item if v.type.dtype.is_float else 4)
            for name, v in self.module.states.items()
            if name.startswith(f"layers.{layer}.")
        )


def survey(module: Module, weights: Mapping[str, str] | None = None) -> Workload:
    """Read a module.

    Args:
        weights: class of `CLASSES` -> scheme of `ir.formats.SCHEMES` or an alias; classes that are not named
            stay as the module stores them.

    Raises:
        UsageError: `weights` names an unknown class or scheme.
        TargetError: the module is not at level MODEL or has no layers with routed experts.
    """
    schemes = check_weights(weights or {})
    if module.level is not Level.MODEL:
        raise TargetError(f"the module is at level {module.level.name}", where="estimate", allowed="MODEL")
    places = _places(module)
    count = max(places.values(), default=0)
    stored = {op: _stored(op, schemes) for op in module.weights() if not _is_hosts(op)}
    host = sum(stored_bytes(op) for op in module.weights() if _is_hosts(op))
    layers = tuple(_layers(module, places, stored, count))
    if not layers or not all(layer.experts for layer in layers):
        raise TargetError("the module has no layers of routed experts", where=module.name, allowed="a model")
    streams = next((op.result.type.shape for op in module.ops if op.name == "repeat_streams"), None)
    if streams is None:
        raise TargetError("the module has no residual streams", where=module.name, allowed="a whole model")
    n, d = (int(str(size)) for size in streams[-2:])
    ends = [sum(stored[op][0] for op in stored if places[op] == at) for at in (-1, count)]
    return Workload(module, layers, ends[0], ends[1], host, tuple(_work(module, places, stored)), d, n * d)


def check_weights(weights: Mapping[str, str]) -> dict[str, Scheme]:
    """Class -> scheme; raises `UsageError` for an unknown class or scheme."""
    for kind, name in weights.items():
        if kind not in CLASSES:
            raise unknown("weight class", kind, CLASSES, UsageError, "weights")
        if ALIASES.get(name, name) not in SCHEMES:
            raise unknown(f"format of {kind}", name, [*SCHEMES, *ALIASES], UsageError, "weights")
    return {kind: SCHEMES[ALIASES.get(name, name)] for kind, name in weights.items()}


def number_classes(module: Module) -> list[str]:
    """Those of `CLASSES` without a matrix in codes or FP16: artifacts for devices hold them as F32."""
    narrow = {
        OPTION_OF.get(weight_class(op), "")
        for op in module.weights()
        if op.weight is not None and (op.weight.dtype is DType.F16 or packed_form(op.weight) is not None)
    }
    return [kind for kind in CLASSES if kind not in narrow]


def _places(module: Module) -> dict[Op, int]:
    """Op -> its layer; what names none is ahead of the first (-1) or behind the last (their number)."""
    found = {op: _LAYER.match(op.loc) for op in module.ops}
    count = 1 + max((int(m.group(1)) for m in found.values() if m), default=-1)
    out: dict[Op, int] = {}
    begun = False
    for op, match in found.items():
        begun = begun or match is not None
        out[op] = int(match.group(1)) if match else count if begun else -1
    return out


def _is_hosts(op: Op) -> bool:
    """Whether a weight op is read on the host alone."""
    readers = op.result.users()
    return bool(readers) and all(user.name in HOST_OPS for user in readers)


def _stored(op: Op, schemes: Mapping[str, Scheme]) -> tuple[int, str]:
    """Bytes of a weight op and what its numbers are stored in."""
    assert op.weight is not None
    scheme = schemes.get(OPTION_OF.get(weight_class(op), ""))
    readers = op.result.users()
    if scheme and len(op.weight.shape) == 2 and all(user.name in PACKED_READERS for user in readers):
        rows, columns = op.weight.shape
        return scheme.nbytes(rows, columns), NUMBERS[scheme.code]
    return stored_bytes(op), NUMBERS.get(_code(op.weight), "f32")


def _code(x: WeightExpr) -> DType:
    """The element type of the numbers below casts, slices and decodings."""
    while x.args and x.op != "encode_codes":
        x = x.args[0]
    return x.dtype


def _layers(
    module: Module, places: Mapping[Op, int], stored: Mapping[Op, tuple[int, str]], count: int
) -> Iterator[Layer]:
    dense = [0] * count
    experts: list[dict[int, int]] = [{} for _ in range(count)]
    chosen = [0] * count
    for op in module.ops:
        at = places[op]
        if op.name == "dispatch" and 0 <= at < count:
            chosen[at] = int(str(op.operands[1].type.shape[-1]))
        if op not in stored or not 0 <= at < count:
            continue
        if match := _EXPERT.search(op.loc):
            index = int(match.group(1))
            experts[at][index] = experts[at].get(index, 0) + stored[op][0]
        else:
            dense[at] += stored[op][0]
    for at in range(count):
        yield Layer(dense[at], tuple(experts[at][e] for e in sorted(experts[at])), chosen[at])


def _work(module: Module, places: Mapping[Op, int], stored: Mapping[Op, tuple[int, str]]) -> Iterator[Work]:
    """Groups by place, class, attributes, shapes and weights; the experts of a layer mostly fall together."""
    groups: dict[object, list[Op]] = {}
    for op in module.ops:
        if op.weight is None and op.name not in HOST_OPS:
            shapes = tuple(_shape(v.type.shape) for v in op.operands) if op.name != "combine" else ()
            weights = tuple(stored[p] for v in op.operands if (p := v.producer) in stored and p)
            expert = _EXPERT.search(op.loc) is not None
            key = (
                places[op],
                expert,
                op.loc if not expert else "",
                op.name,
                *op.attrs.values(),
                shapes,
                weights,
            )
            groups.setdefault(key, []).append(op)
    for ops in groups.values():
        op = ops[0]
        expert = _EXPERT.search(op.loc) is not None
        held = [stored[p] for v in op.operands if (p := v.producer) in stored and p]
        if op.name in ("embed", "route_hash"):  # a few rows of a table
            held = []
        numbers = held[0][1] if held else ""
        yield Work(op, len(ops), places[op], _part(op), numbers, sum(n for n, _ in held), expert)


def _shape(shape: tuple[Dim | int, ...]) -> tuple[Dim | int | str, ...]:
    """A shape in which the rows of all experts are called the same."""
    return tuple("rows" if isinstance(d, Dim) and not set(d.symbols()) <= _STEP else d for d in shape)


def _part(op: Op) -> str:
    return "context" if op.name in CONTEXT_OPS else class_of(f"{op.loc}.")
