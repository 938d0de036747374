"""What the vision tower of an artifact is called with (V4.1 specification, sections 9.2 to 9.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .load import ImagePatches
from .rules import ImagePlan

Arr = npt.NDArray[Any]

START, NEWLINE, END = -1, -2, -3
"""How a layout names the rows of a span that are no image token."""


def tower_inputs(image: ImagePatches, downsample: int) -> list[Arr]:
    """The inputs of the program `vision` in order, for one image.

    Args:
        downsample: patches each way of an image token.

    Returns:
        patches f32 [1,N,3 p p], places i32 [1,N,2], cells i32 [1,M,k k], layout i32 [1,S].
    """
    return [image.patches[None], *tower_indices(image.plan, downsample)]


def tower_indices(plan: ImagePlan, downsample: int) -> list[Arr]:
    """places, cells and layout of an image of these sizes."""
    row, column = np.divmod(np.arange(plan.rows * plan.cols), plan.cols)
    places = np.stack([row, column], axis=1)
    grid = np.full((plan.gh * downsample, plan.gw * downsample), -1)
    grid[: plan.rows, : plan.cols] = np.arange(plan.rows * plan.cols).reshape(plan.rows, plan.cols)
    cells = grid.reshape(plan.gh, downsample, plan.gw, downsample).swapaxes(1, 2)
    lines = np.full((plan.gh, plan.gw + 1), NEWLINE)
    lines[:, :-1] = np.arange(plan.gh * plan.gw).reshape(plan.gh, plan.gw)
    layout = np.concatenate([[START], lines.reshape(-1), [END]])
    shaped = (places, cells.reshape(plan.gh * plan.gw, downsample**2), layout)
    return [np.ascontiguousarray(a, np.int32)[None] for a in shaped]
