"""The sizes that a target of fixed shapes compiles for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.errors import PassError
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level

from .base import Pass


@dataclass(frozen=True)
class BindShapes(Pass):
    """Leaves in `meta["static_shapes"]` which programs an emitter of fixed shapes makes.

    One program per entry of `tokens`, ascending: a step takes the smallest that holds its tokens, or several
    of the largest. The graph stays symbolic, so that it can be evaluated at any size.

    Args:
        tokens: tokens per sequence of a program, as "1,128"; 1 is decoding.
        batch: sequences side by side.
        context: positions that states have room for.
        stages: programs that a step passes through, each with some of the layers, for as many devices.
    """

    name: ClassVar[str] = "bind_shapes"
    doc: ClassVar[str] = "fix the batch, the context and the tokens per call that programs are made for"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    gives: ClassVar[Level | None] = Level.FUSED
    spreads: ClassVar[str] = "stages"
    tokens: str = "1,128"
    batch: int = 1
    context: int = 4096
    stages: int = 1

    def run(self, module: Module) -> int:
        tokens = self._tokens()
        for option, value in (("batch", self.batch), ("context", self.context), ("stages", self.stages)):
            if value < 1:
                raise PassError(f"option {option} = {value}", where=self.name, allowed="1 or more")
        longest = module.meta.get("max_positions")
        context = min(self.context, longest) if isinstance(longest, int) else self.context
        if tokens[-1] > context:
            raise PassError(
                f"a program of {tokens[-1]} tokens", where=self.name,
                allowed=f"at most the context, {context}",
                hint="give tokens and context that fit: bind_shapes{tokens=..., context=...}",
            )  # fmt: skip
        shapes = {"batch": self.batch, "context": context, "tokens": tokens, "stages": self.stages}
        module.meta["static_shapes"], module.notes[self.name] = shapes, shapes
        return len(tokens)

    def _tokens(self) -> list[int]:
        words = [w.strip() for w in self.tokens.split(",")]
        if not all(w.isdecimal() and int(w) > 0 for w in words):
            allowed = 'whole numbers from 1, as in "1,128"'
            raise PassError(f"option tokens = {self.tokens!r}", where=self.name, allowed=allowed)
        return sorted({int(w) for w in words})
