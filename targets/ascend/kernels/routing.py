"""What the expert kernels are told about one call: which rows belong to which expert, and back.

Plain NumPy, so that a runtime can do the same on its device or its host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Arr = npt.NDArray[Any]


@dataclass(frozen=True)
class Routing:
    """Routed rows sorted by expert, in token order within one.

    Attributes:
        tokens: int32 [R], the row of x flattened to [B * T, d] that each sorted row copies.
        picks: int32 [R], where its routing weight stands in [B * T * k].
        blocks: int32 [G,3], (expert, first row, rows); no block crosses an expert's border.
        slots: int32 [B * T,k], the sorted rows of a token in ascending expert, -1 where there is none.
    """

    tokens: Arr
    picks: Arr
    blocks: Arr
    slots: Arr


def route(ids: Arr, n_valid: Arr, experts: int, rows: int) -> Routing:
    """Sort ids [B,T,k] into blocks of at most `rows` rows; tokens from n_valid [B] on are padding."""
    batch, count, k = ids.shape
    real = np.broadcast_to(np.arange(count)[None, :, None] < n_valid[:, None, None], ids.shape).reshape(-1)
    flat = np.where(real, ids.reshape(-1), experts)
    picks = np.argsort(flat, kind="stable")[: int(real.sum())].astype(np.int32)
    sizes = np.bincount(flat[picks], minlength=experts)[:experts]
    ends = np.cumsum(sizes)
    blocks = [
        (expert, first, min(rows, end - first))
        for expert, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True))
        for first in range(end - size, end, rows)
    ]
    tokens = picks // k
    slots = np.full((batch * count, k), -1, np.int32)
    filled = np.zeros(batch * count, np.int32)
    for row, token in enumerate(tokens.tolist()):  # rows ascend by expert, and so do the slots of a token
        slots[token, filled[token]] = row
        filled[token] += 1
    return Routing(tokens, picks, np.array(blocks, np.int32).reshape(-1, 3), slots)
