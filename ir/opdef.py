"""How an op is declared: operands, typed attributes, result types, effects, and its one-line meaning.

One declaration serves the constructor's checks, the verifier, the printer, the parser and the
documentation; nothing else in the project lists what an op takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dsv4c.errors import IRError

from .attrs import Attr, AttrKind
from .dims import Dim
from .types import Shape, TensorType

Infer = Callable[["Signature"], tuple[TensorType, ...]]


@dataclass(frozen=True)
class AttrDef:
    """An attribute an op carries; a `default` makes it optional in constructors (it is always printed)."""

    name: str
    kind: AttrKind
    default: Attr | None = None


@dataclass(frozen=True)
class OpDef:
    """The declaration of an op.

    Attributes:
        name: the word in the text.
        operands: names, in order. A trailing ``?`` marks an optional one (only at the end), a trailing
            ``*`` one that repeats (only the last).
        attrs: typed attributes.
        infer: result types from operand types and attributes; raises `IRError` where they do not fit.
        consumes: index of a state operand that the op overwrites; its old value is dead afterwards.
        source: where the meaning is specified.
        doc: the meaning in one sentence.
    """

    name: str
    operands: tuple[str, ...]
    infer: Infer
    attrs: tuple[AttrDef, ...] = ()
    consumes: int | None = None
    source: str = ""
    doc: str = ""

    @property
    def arity(self) -> tuple[int, int | None]:
        """Fewest and most operands; None is no upper bound."""
        required = sum(1 for o in self.operands if o[-1] not in "?*")
        return required, None if self.operands and self.operands[-1].endswith("*") else len(self.operands)


class Signature:
    """What `infer` sees: operand types by position and name, attributes, and checks that read well."""

    def __init__(
        self, definition: OpDef, types: Sequence[TensorType], attrs: Mapping[str, Attr], where: str
    ) -> None:
        self.definition, self.types, self.attrs, self.where = definition, list(types), dict(attrs), where
        least, most = definition.arity
        if len(types) < least or (most is not None and len(types) > most):
            self.fail(f"takes {least}{'' if most == least else ' or more'} operands, got {len(types)}")

    def fail(self, what: str) -> None:
        raise IRError(
            f"{self.definition.name} {what}", where=self.where, allowed=", ".join(self.definition.operands)
        )

    def type(self, index: int) -> TensorType:
        return self.types[index]

    def shape(self, index: int, rank: int | None = None) -> Shape:
        """The shape of operand `index`, whose rank must be `rank` when given."""
        if index >= len(self.types):
            self.fail(f"needs operand {self.name(index)}")
        t = self.types[index]
        if rank is not None and t.rank != rank:
            self.fail(f"needs {self.name(index)} of rank {rank}, got {t}")
        return t.shape

    def name(self, index: int) -> str:
        return self.definition.operands[min(index, len(self.definition.operands) - 1)].rstrip("?*")

    def equal(self, a: Dim | int, b: Dim | int, what: str) -> None:
        """Two dimensions that must be the same."""
        if a != b:
            self.fail(f"needs {what} to agree, got {a} and {b}")

    def fits(self, index: int, *shape: Dim | int) -> None:
        """Operand `index` must have exactly this shape."""
        if self.types[index].shape != shape:
            wanted = ", ".join(str(d) for d in shape)
            self.fail(f"needs {self.name(index)} [{wanted}], got {self.types[index]}")

    def choice(self, name: str, *allowed: str) -> None:
        """Attribute `name` must be one of these words."""
        if self.attrs[name] not in allowed:
            self.fail(f"has {name} = {self.attrs[name]!r} (known: {', '.join(allowed)})")

    def int(self, name: str) -> int:
        value = self.attrs[name]
        assert isinstance(value, int)
        return value


def static(sig: Signature, dim: Dim | int, what: str) -> int:
    """A dimension that must be a number."""
    if not isinstance(dim, int):
        sig.fail(f"needs a static {what}, got {dim}")
    assert isinstance(dim, int)
    return dim
