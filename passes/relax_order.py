"""Leaves it to a target in which order it sums the products of a few rows.

Without that, few rows are summed in the order of many, so that a token has the same bits however a prompt is
cut into calls. Knows no target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level

from .base import Pass

PRODUCTS = frozenset({"linear", "grouped_linear", "expert_mlp"})


@dataclass(frozen=True)
class RelaxOrder(Pass):
    """Sets `order = "any"` on every product.

    What they mean stays; the last bits of an artifact may then depend on how many rows a call has, but never
    on the number of threads.
    """

    name: ClassVar[str] = "relax_order"
    doc: ClassVar[str] = "let products of few rows be summed in the fastest order, not in that of many"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.FUSED, Level.TARGET})

    def run(self, module: Module) -> int:
        products = [op for op in module.ops if op.name in PRODUCTS and op.attrs["order"] == "one"]
        for op in products:
            op.attrs["order"] = "any"
        return len(products)
