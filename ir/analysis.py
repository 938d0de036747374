"""Questions about a graph that networkx answers: a valid order, live ranges, the critical path."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx

from .graph import Module, Op, Value


def is_ordered(module: Module) -> bool:
    """Whether `module.ops` is a topological order of its data flow."""
    place = {op: i for i, op in enumerate(module.ops)}
    return all(place[a] < place[b] for a, b in module.to_networkx().edges)


def live_ranges(module: Module) -> dict[Value, tuple[int, int]]:
    """For every op result: the index of the op that makes it, and of the last that reads it.

    Outputs live to the end, `len(module.ops)`; an unread value ends where it starts.
    """
    place = {op: i for i, op in enumerate(module.ops)}
    outputs, end = module.output_values(), len(module.ops)
    ranges = {}
    for op in module.ops:
        for value in op.results:
            last = max((place[user] for user in value.users()), default=place[op])
            ranges[value] = (place[op], end if value in outputs else last)
    return ranges


def critical_path(module: Module, cost: Callable[[Op], float] = lambda op: 1.0) -> list[Op]:
    """The chain of dependent ops with the largest total cost, first to last."""
    graph = module.to_networkx()
    weighted = nx.DiGraph()
    weighted.add_nodes_from(graph.nodes)
    weighted.add_weighted_edges_from((a, b, cost(b)) for a, b in graph.edges)
    return list(nx.dag_longest_path(weighted, weight="weight"))
