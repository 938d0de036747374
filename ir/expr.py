"""The node of a lazy weight, and where the bytes of its leaves come from; knows no operation by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from dsv4c.errors import IRError

from .attrs import Attr
from .dtypes import Array, DType


class TensorStore(Protocol):
    """Where the bytes of `source` expressions come from."""

    def read(self, name: str) -> Array:
        """The raw storage of a checkpoint tensor (BF16 as uint16, FP8 and packed FP4 as uint8), read-only."""
        ...


@dataclass(frozen=True, eq=False)
class OverlaidStore:
    """A store with tensors of its own in front, such as statistics that an expression reads."""

    base: TensorStore
    own: Mapping[str, Array]

    def read(self, name: str) -> Array:
        return self.own[name] if name in self.own else self.base.read(name)


@dataclass(frozen=True, eq=False)
class WeightExpr:
    """One node of a lazy weight: an operation of `WEIGHT_OPS`, its operands and attributes.

    Attributes:
        op: a key of `WEIGHT_OPS`.
        args: operand expressions.
        attrs: attribute name -> value, in declaration order.
        dtype, shape: of the result; shapes of packed FP4 count bytes.
    """

    op: str
    args: tuple[WeightExpr, ...]
    attrs: tuple[tuple[str, Attr], ...]
    dtype: DType
    shape: tuple[int, ...]

    def attr(self, name: str) -> Attr:
        return dict(self.attrs)[name]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def sources(self) -> Iterator[WeightExpr]:
        """Every `source` leaf, left to right."""
        if self.op == "source":
            yield self
        for arg in self.args:
            yield from arg.sources()

    def same(self, other: WeightExpr) -> bool:
        """Structural equality."""
        return (self.op, self.attrs, self.dtype, self.shape, len(self.args)) == (
            other.op, other.attrs, other.dtype, other.shape, len(other.args),
        ) and all(a.same(b) for a, b in zip(self.args, other.args, strict=True))  # fmt: skip


def expect(ok: bool, what: str, x: WeightExpr) -> None:
    """Raise `IRError` with the type of `x` unless `ok`."""
    if not ok:
        raise IRError(f"{what}, got {x.dtype.value}{list(x.shape)}", where=describe(x))


def describe(x: WeightExpr) -> str:
    """A short name for messages: the first checkpoint tensor below, or the operation."""
    return next((str(s.attr("name")) for s in x.sources()), x.op)
