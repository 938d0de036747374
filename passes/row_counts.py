"""Counting which table rows a text asks for: calibration of `layout_engram`.

Runs only the ops between tokens and row ids, by their meaning; reads no table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator

from .cleanup import EliminateDeadCode

Ids = npt.NDArray[np.int64]
CHUNK = 256


def looked_up_rows(module: Module, tokens: npt.ArrayLike) -> dict[str, Ids]:
    """The rows that one sequence of tokens asks of every table.

    Args:
        module: with `engram_rows` (at level MODEL or FUSED) and its inputs `tokens` and `n_valid`.
        tokens: [T].

    Returns:
        Table, as its weight is located -> row ids [T, columns] in the order of the tokens.
    """
    hashing = _hashing(module)
    evaluator = Evaluator(hashing)
    ids, found = np.asarray(tokens)[None], dict[str, list[Ids]]()
    state = evaluator.fresh_state(B=1, ctx=ids.shape[1])
    for start in range(0, ids.shape[1], CHUNK):
        part = ids[:, start : start + CHUNK]
        given = {"tokens": part, "n_valid": np.array([part.shape[1]])}
        step = evaluator({name: given[name] for name in hashing.inputs}, state)
        state = step.state
        for name, rows in step.outputs.items():
            found.setdefault(name, []).append(rows[0].astype(np.int64))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def row_counts(module: Module, texts: Sequence[npt.ArrayLike]) -> dict[str, Ids]:
    """Counts of table rows over texts, each from a fresh state, as `Statistics.extra` takes them.

    Returns:
        `engram.TABLE` -> int64 [2, n]: ascending row ids, and how often each was asked for.
    """
    rows: dict[str, list[Ids]] = {}
    for tokens in texts:
        for name, ids in looked_up_rows(module, tokens).items():
            rows.setdefault(name, []).append(ids.reshape(-1))
    return {
        f"engram.{name}": np.stack(np.unique(np.concatenate(ids), return_counts=True)).astype(np.int64)
        for name, ids in rows.items()
    }


def _hashing(module: Module) -> Module:
    """A copy whose outputs are the row ids of every table, and the states that they depend on."""
    copy = clone(module)
    tables = {}
    for op in copy.ops:
        if op.name == "engram_rows" and op.operands[1].producer is not None:
            tables[op.operands[1].producer.loc] = op.operands[0]
    needed = {"pos", *(n for n in copy.states if n.endswith("history"))}
    copy.outputs = {**tables, **{name: v for name, v in copy.outputs.items() if name in needed}}
    copy.states = {name: v for name, v in copy.states.items() if name in needed}
    EliminateDeadCode().run(copy)
    copy.inputs = {name: v for name, v in copy.inputs.items() if v.uses}
    return copy
