"""What a lowering sees: the op's operands as ONNX tensors, its attributes, and the graph to append to.

A lowering is a function ``(g, op) -> tensor(s)``. Integer values are INT64 inside the graph whatever the IR
says. The value of an `entries_append` is never one tensor but `Entries`: the rows kept by the runtime, and
the rows of this call, which are all that the step hands back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Op, Value

from .blocks import Body, over_token_blocks
from .graph import Graph, V

__all__ = ["Context", "Entries", "Lowering", "V", "integer", "number", "size"]


@dataclass(frozen=True)
class Entries:
    """Append-only rows: `old` [B,U,D], of which row b uses the first pos_b // ratio, and `new` [B,E,D].

    New row i of batch row b is entry pos_b // ratio + i; U is at least 1.
    """

    old: V
    new: V


Lowered = V | Entries
Result = Lowered | tuple[V, ...]


class Context(Graph):
    """The graph under construction and what became of the module's values."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[Value, Lowered] = {}

    def token_blocks(self, tokens: V, per_token: V, cap: int, body: Body, integers: bool = False) -> V:
        """[B,T,C]: `body` over blocks of tokens, as `blocks.over_token_blocks` does it."""
        kind = self.index if integers else TensorProto.FLOAT
        return over_token_blocks(self, tokens, per_token, cap, body, kind)

    def known(self, x: V) -> npt.NDArray[Any] | None:
        """The number or numbers behind a tensor, where sizes fold; here none do."""
        return None

    def tensor(self, op: Op, index: int) -> V:
        """Operand `index` as a tensor."""
        value = self.values[op.operands[index]]
        if isinstance(value, Entries):
            readers = "attention, index_select"
            raise TargetError(f"{op.name} reads entries as one tensor", where=op.loc, allowed=readers)
        return value

    def tensors(self, op: Op, count: int) -> list[V]:
        """The first `count` operands."""
        return [self.tensor(op, i) for i in range(count)]

    def entries(self, op: Op, index: int) -> Entries:
        """Operand `index` as the result of an `entries_append`."""
        value = self.values[op.operands[index]]
        if not isinstance(value, Entries):
            raise TargetError(f"{op.name} reads entries that no entries_append made", where=op.loc)
        return value


Lowering = Callable[[Context, Op], Result]


def integer(op: Op, name: str) -> int:
    """A whole-number attribute."""
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


def number(op: Op, name: str) -> float:
    """A numeric attribute."""
    value = op.attrs[name]
    assert isinstance(value, int | float)
    return float(value)


def size(op: Op, index: int, axis: int) -> int:
    """A static size of an operand's type."""
    dim = op.operands[index].type.shape[axis]
    if not isinstance(dim, int):
        raise TargetError(f"{op.name} needs a static size, got {dim}", where=op.loc)
    return dim
