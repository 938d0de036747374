"""Tensor types: an element type and a shape of integers and symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4c.errors import ParseError

from .dims import Dim, evaluate, parse_dim
from .dtypes import DType

Shape = tuple[Dim | int, ...]


@dataclass(frozen=True)
class TensorType:
    """`f32[B, T, 128]`."""

    dtype: DType
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype.value}[{', '.join(str(d) for d in self.shape)}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_shape(self, *shape: Dim | int) -> TensorType:
        return TensorType(self.dtype, shape)

    def concrete(self, env: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its value in `env`."""
        return tuple(evaluate(d, env) for d in self.shape)


def f32(*shape: Dim | int) -> TensorType:
    return TensorType(DType.F32, shape)


def i32(*shape: Dim | int) -> TensorType:
    return TensorType(DType.I32, shape)


def parse_type(text: str) -> TensorType:
    """The inverse of `str(TensorType)`.

    Raises:
        ParseError: unknown dtype or malformed shape.
    """
    head, bracket, tail = text.strip().partition("[")
    names = {d.value: d for d in DType}
    if head not in names or not bracket or not tail.endswith("]"):
        raise ParseError(f"{text!r} is not a type", allowed="dtype[dims], dtype one of " + ", ".join(names))
    inner = tail[:-1].strip()
    return TensorType(names[head], tuple(parse_dim(d) for d in inner.split(",")) if inner else ())
