"""Over how many devices the layers of a launch plan are spread, and for which states they are weighed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from dsv4c.errors import PassError
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level

from .base import Pass


@dataclass(frozen=True)
class SpreadLayers(Pass):
    """Leaves in `meta["spread"]` over how many devices an emitter of launch plans cuts the model.

    Each device gets a run of whole layers, so that the fullest has as little as can be; weights count, and
    the states of `batch` sequences of `context` positions. Programs take any sizes all the same, and the
    graph stays whole, so that it can be evaluated.

    Args:
        devices: equal ones, at most as many as layers; 1 leaves the model on one.
        batch: sequences side by side.
        context: positions that states have room for; no more than the model allows.
    """

    name: ClassVar[str] = "spread_layers"
    doc: ClassVar[str] = "cut a launch plan into runs of layers, one for each of several devices"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED})
    spreads: ClassVar[str] = "devices"
    devices: int = 1
    batch: int = 1
    context: int = 8192

    def run(self, module: Module) -> int:
        for option in fields(self):
            value = getattr(self, option.name)
            if value < 1:
                raise PassError(f"option {option.name} = {value}", where=self.name, allowed="1 or more")
        longest = module.meta.get("max_positions")
        context = min(self.context, longest) if isinstance(longest, int) else self.context
        spread = {"devices": self.devices, "batch": self.batch, "context": context}
        module.meta["spread"], module.notes[self.name] = spread, spread
        return self.devices - 1
