"""Storage of weights: BF16 wherever the stored format fits it exactly, else F32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.errors import PassError
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level
from dsv4c.ir.types import TensorType
from dsv4c.ir.weights import WeightExpr

from .base import Pass

_MATRIX_READERS = frozenset({"linear", "grouped_linear", "expert_mlp", "embed"})


@dataclass(frozen=True)
class NarrowWeights(Pass):
    """Chooses the dtype in which each weight is stored.

    Matrices whose every value is a BF16 number by construction (BF16 sources; FP8 and FP4 codes times a
    power of two) and that nothing but matrix products and embeddings reads are stored as BF16 under
    `storage="auto"`; everything else, and everything under `storage="f32"`, as F32. Values do not change:
    emission checks each cast.
    """

    name: ClassVar[str] = "narrow_weights"
    doc: ClassVar[str] = "store each weight in the smallest of BF16 and F32 that holds it exactly"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    storage: str = "auto"

    def run(self, module: Module) -> int:
        if self.storage not in ("auto", "f32"):
            raise PassError(f"option storage = {self.storage!r}", where=self.name, allowed="auto, f32")
        changed = 0
        for op in module.weights():
            assert op.weight is not None
            if not op.weight.dtype.is_float:
                continue
            matrix = all(user.name in _MATRIX_READERS for user in op.result.users())
            narrow = self.storage == "auto" and matrix and is_bf16(op.weight)
            wanted = store_as(op.weight, DType.BF16 if narrow else DType.F32)
            changed += wanted.dtype is not op.weight.dtype
            op.weight = wanted
            op.result.type = TensorType(wanted.dtype, op.result.type.shape)
        return changed


def is_bf16(x: WeightExpr) -> bool:
    """Whether every value is a BF16 number by construction of its format.

    FP8 and FP4 carry at most 4 significant bits and an E8M0 scale only moves the exponent.
    """
    match x.op:
        case "source":
            return x.dtype is DType.BF16
        case "decode_fp8" | "decode_fp4":
            return x.args[1].dtype is DType.F8E8M0
        case "rope_frequencies":
            return False
        case _:
            return all(is_bf16(a) for a in x.args)


def store_as(x: WeightExpr, dtype: DType) -> WeightExpr:
    """`x` as `dtype`, with the cast moved below stacks and joins so that emission can stream."""
    if x.dtype is dtype:
        return x
    if x.op == "stack":
        return w.stack(tuple(store_as(a, dtype) for a in x.args))
    if x.op == "concat":
        return w.concat(tuple(store_as(a, dtype) for a in x.args))
    return w.cast(x, dtype)
