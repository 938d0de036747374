"""Storage of weights: packed where a pipeline asks for it, BF16 where that fits exactly, else F32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.errors import PassError
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.layouts import unpacked
from dsv4c.ir.levels import Level
from dsv4c.ir.packed import is_bf16, packed_form
from dsv4c.ir.types import TensorType
from dsv4c.ir.weights import WeightExpr

from .base import Pass

_STORAGE = ("auto", "f32", "packed", "int8", "fp8", "fp16")

_KEPT = {
    "int8": frozenset({"int8"}),
    "fp8": frozenset({"fp8", "fp8_f32", "fp8_fnuz", "mxfp8", "mxfp4"}),
}
"""Storage -> the only schemes that stay codes and scales under it."""

_MATRIX_READERS = frozenset({"linear", "grouped_linear", "expert_mlp", "expert_statistics", "embed"})

_MATRIX_OPERANDS = {"hc_pre": 1, "hc_post_pre": 4}
"""Ops of which one operand is a matrix for a product."""

PACKED_READERS = frozenset({"linear", "grouped_linear", "expert_mlp", "expert_statistics", "embed"})
"""Ops that may read codes and scales in place of numbers."""

_TABLE_READERS = frozenset({"engram_rows", "engram_fetch"})
"""Decode the stored format themselves; their tables are far too large to be stored as anything else."""


@dataclass(frozen=True)
class NarrowWeights(Pass):
    """Chooses the form in which each weight is stored.

    Matrices whose every value is a BF16 number by construction (BF16 sources; FP8 and FP4 codes times a
    power of two) and that nothing but matrix products and embeddings reads are stored as BF16 under
    `storage="auto"`; everything else, and everything under `storage="f32"`, as F32. `storage="packed"` is
    "auto" but for weights that have a packed form and that only `PACKED_READERS` read: they stay codes and
    scales, an f32 expression whose `packed_form` tells how it is stored. `storage="int8"` and
    `storage="fp8"` are "f32" but for such weights in the scheme int8, or with E4M3 or E2M1 codes (fp8,
    fp8_f32, fp8_fnuz, mxfp8, mxfp4), and `storage="fp16"` but for matrices of FP16 numbers: for targets that
    compute from nothing else. Values do not change: emission checks each cast.
    """

    name: ClassVar[str] = "narrow_weights"
    doc: ClassVar[str] = "store each weight in the smallest of BF16 and F32 that holds it exactly"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    storage: str = "auto"

    def run(self, module: Module) -> int:
        if self.storage not in _STORAGE:
            allowed = ", ".join(_STORAGE)
            raise PassError(f"option storage = {self.storage!r}", where=self.name, allowed=allowed)
        changed = 0
        for op in module.weights():
            assert op.weight is not None
            if not op.weight.dtype.is_float or _is_table(op):
                continue
            if stays_packed(op) and (self.storage == "packed" or _scheme(op) in _KEPT.get(self.storage, ())):
                continue
            matrix = all(reads_matrix(user, index) for user, index in op.result.uses)
            if self.storage == "fp16" and matrix and op.weight.dtype is DType.F16:
                continue
            narrow = self.storage in ("auto", "packed") and matrix and is_bf16(op.weight)
            wanted = store_as(op.weight, DType.BF16 if narrow else DType.F32)
            changed += not wanted.same(op.weight)
            op.weight = wanted
            op.result.type = TensorType(wanted.dtype, op.result.type.shape)
        return changed


def _scheme(op: Op) -> str:
    """The name of the scheme that a `weight` op is stored in; "" where it is not packed."""
    held = packed_form(op.weight) if op.weight is not None else None
    return held.scheme.name if held else ""


def _is_table(op: Op) -> bool:
    """Whether a `weight` op is looked up by row, in a format that its reader decodes."""
    looked_up = any(user.name in _TABLE_READERS for user in op.result.users())
    return looked_up and op.result.type.dtype is not DType.F16


def reads_matrix(op: Op, index: int) -> bool:
    """Whether operand `index` is a matrix for a product, whose kernel takes BF16."""
    return op.name in _MATRIX_READERS or _MATRIX_OPERANDS.get(op.name) == index


def stays_packed(op: Op) -> bool:
    """Whether a `weight` op has a packed form, and no reader that needs numbers."""
    readers = op.result.users()
    packable = bool(readers) and all(user.name in PACKED_READERS for user in readers)
    return packable and op.weight is not None and packed_form(op.weight) is not None


def store_as(x: WeightExpr, dtype: DType) -> WeightExpr:
    """`x` as `dtype`, with the cast moved below stacks and joins so that emission can stream.

    What has a packed form and is wanted as F32 says so, or the emitter would leave it packed.
    """
    packed = dtype is DType.F32 and packed_form(x) is not None
    if x.dtype is dtype and not packed:
        return x
    if x.op == "stack":
        return w.stack(tuple(store_as(a, dtype) for a in x.args))
    if x.op == "concat":
        return w.concat(tuple(store_as(a, dtype) for a in x.args))
    return unpacked(x) if packed else w.cast(x, dtype)
