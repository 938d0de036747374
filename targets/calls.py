"""What the manifest says of a program's calls: for which op and at which place each is, and its cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dsv4c.ir.amounts import Tree, symbolic, tree_of
from dsv4c.ir.cost import Cost, op_cost
from dsv4c.ir.dims import Dim
from dsv4c.ir.graph import Module, Op


def calls_meta(module: Module, callers: Sequence[Op], calls: Sequence[str]) -> dict[str, Any]:
    """The calls of a program in order, as a profile needs them.

    Args:
        callers: the op of each call.
        calls: the function that each calls.

    Returns:
        `functions`, the names that are called; `costs`, each [flops, bytes of weights, other bytes] as trees
        of `ir.amounts` over the sizes of the arguments and `past`, the tokens already seen; `ops`, each
        [name, location, its cost]; `order`, per call [op, function]. Costs, ops and functions are named by
        their places in these lists.
    """
    sizes = _sizes(module)
    functions: dict[str, int] = {}
    costs: dict[str, int] = {}
    ops: dict[Op, tuple[int, int]] = {}
    order = []
    for op, function in zip(callers, calls, strict=True):
        if op not in ops:
            cost = json.dumps(_trees(op_cost(op, sizes)))
            ops[op] = len(ops), costs.setdefault(cost, len(costs))
        order.append([ops[op][0], functions.setdefault(function, len(functions))])
    return {
        "functions": list(functions),
        "costs": [json.loads(cost) for cost in costs],
        "ops": [[op.name, op.loc, cost] for op, (_, cost) in ops.items()],
        "order": order,
    }


def _sizes(module: Module) -> dict[str, int]:
    """Every symbol of the arguments, and `past`."""
    shapes = (v.type.shape for v in module.arguments().values())
    names = {name for shape in shapes for d in shape if isinstance(d, Dim) for name in d.symbols()}
    return {name: symbolic(name) for name in sorted(names | {"past"})}


def _trees(cost: Cost) -> list[Tree]:
    return [tree_of(n) for n in (cost.flops, cost.weight_bytes, cost.data_bytes)]
