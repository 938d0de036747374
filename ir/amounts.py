"""Numbers that depend on the sizes of a step, as trees that JSON carries; knows no op.

`ir.cost` only adds, multiplies, divides and takes the `least` of its numbers, so it computes with amounts as
it does with integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, overload

Tree = int | str | list[Any]
"""A number, the name of a size, or [operation, Tree, Tree] with an operation of + - * // min."""


@dataclass(frozen=True)
class Amount:
    """A tree that is no plain number; integers are themselves."""

    tree: Tree

    def __add__(self, other: Amount | int) -> Amount | int:
        return self if other == 0 else Amount(["+", self.tree, tree_of(other)])

    def __radd__(self, other: int) -> Amount | int:
        return self if other == 0 else Amount(["+", other, self.tree])

    def __sub__(self, other: Amount | int) -> Amount | int:
        return self if other == 0 else Amount(["-", self.tree, tree_of(other)])

    def __rsub__(self, other: int) -> Amount | int:
        return Amount(["-", other, self.tree])

    def __mul__(self, other: Amount | int) -> Amount | int:
        return 0 if other == 0 else self if other == 1 else Amount(["*", self.tree, tree_of(other)])

    def __rmul__(self, other: int) -> Amount | int:
        return 0 if other == 0 else self if other == 1 else Amount(["*", other, self.tree])

    def __floordiv__(self, other: Amount | int) -> Amount | int:
        return self if other == 1 else Amount(["//", self.tree, tree_of(other)])

    def __rfloordiv__(self, other: int) -> Amount | int:
        return Amount(["//", other, self.tree])


@overload
def least(a: int, b: int) -> int: ...
@overload
def least(a: Amount | int, b: Amount | int) -> Amount | int: ...
def least(a: Amount | int, b: Amount | int) -> Amount | int:
    """The smaller of two numbers."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return Amount(["min", tree_of(a), tree_of(b)])


def tree_of(x: Amount | int) -> Tree:
    """What JSON carries of a number."""
    return x.tree if isinstance(x, Amount) else x


def symbolic(name: str) -> int:
    """The size of that name; for code that takes integers and does arithmetic with them only."""
    return cast(int, Amount(name))
