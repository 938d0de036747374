"""What a hash routing table becomes when experts go: the arithmetic of the weight operation `reroute`.

Plain NumPy on the table's numbers; knows no expressions, no graph and no reason to drop an expert.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CompileError

from .dtypes import Array

NONE = -1
"""Fills the rest of a row of choices."""


def reroute_table(table: Array, choices: npt.NDArray[np.int64], where: str = "") -> Array:
    """[V,k] experts -> [V,k] experts under new numbers, distinct in every row.

    Args:
        table: expert ids, distinct in every row, each below len(choices).
        choices: int64 [E,c]; row e holds the new numbers that may stand for expert e, best first, then NONE.

    Entries with one choice take it. Then, slot by slot, every other entry takes the first of its choices that
    its row does not hold yet.

    Raises:
        CompileError: the table names an expert without a row, or a row runs out of choices.
    """
    ids = table.astype(np.int64)
    wrong = np.flatnonzero(((ids < 0) | (ids >= len(choices))).any(axis=1))
    if len(wrong):
        raise CompileError(f"token {wrong[0]} goes to an expert beyond {len(choices) - 1}", where=where)
    several = (choices[:, 1:] != NONE).any(axis=1)
    out = np.where(several[ids], NONE, choices[ids, 0])
    for slot in range(ids.shape[1]):
        rows = np.flatnonzero(several[ids[:, slot]])
        wanted = choices[ids[rows, slot]]
        free = (wanted != NONE) & ~(wanted[:, :, None] == out[rows][:, None, :]).any(axis=2)
        out[rows, slot] = np.where(
            free.any(axis=1), np.take_along_axis(wanted, free.argmax(axis=1)[:, None], axis=1)[:, 0], NONE
        )
    ordered = np.sort(out, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    bad = np.flatnonzero(twice | (ordered == NONE).any(axis=1))
    if len(bad):
        raise CompileError(
            f"token {bad[0]} finds no distinct experts among the choices", where=where,
            allowed=f"at least {ids.shape[1]} choices for an expert that goes",
        )  # fmt: skip
    return out.astype(table.dtype)
