"""Where images stand in a prompt: every placeholder becomes a span of positions.

Source: V4.1 specification, section 9.4. Knows token ids; not what stands at their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import UsageError

from .rules import ImagePlan

TEXT, START, IMAGE, NEWLINE, END = -1, 0, 1, 2, 3
"""Types of positions. Those of an image are 0 or more: `types >= 0` is the image mask."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Expanded:
    """A prompt with room for its images.

    Attributes:
        tokens: int32 [T]; every position of an image has the placeholder's id.
        types: int32 [T] of TEXT, START, IMAGE, NEWLINE and END.
        spans: (start, stop) of each image, in reading order; stop is one past its END.
    """

    tokens: Ints
    types: Ints
    spans: list[tuple[int, int]]


def expand(tokens: Sequence[int], placeholder: int, plans: Sequence[ImagePlan]) -> Expanded:
    """Put a span in the place of every placeholder: START, per row IMAGE x gw and NEWLINE, END.

    Raises:
        UsageError: tokens that are no flat sequence of int32, or not one placeholder per plan.
    """
    ids = np.asarray(tokens) if len(tokens) else np.empty(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and not _fits_int32(ids)):
        raise UsageError(f"tokens are {ids.dtype}{list(ids.shape)}", where="expand", allowed="int32 [T]")
    places = np.flatnonzero(ids == placeholder)
    if len(places) != len(plans):
        raise UsageError(
            f"the prompt has room for {_count(len(places))}, given are {len(plans)}", where="expand",
            allowed=f"one token {placeholder} per image",
        )  # fmt: skip
    parts: list[Ints] = []
    spans: list[tuple[int, int]] = []
    done, length = 0, 0
    for place, image in zip(places.tolist(), plans, strict=True):
        length += place - done
        spans.append((length, length + image.span))
        parts += [np.full(place - done, TEXT, np.int32), _types(image)]
        done, length = place + 1, length + image.span
    types = np.concatenate([*parts, np.full(len(ids) - done, TEXT, np.int32)])
    repeats = np.ones(len(ids), np.intp)
    repeats[places] = [image.span for image in plans]
    return Expanded(np.repeat(ids, repeats).astype(np.int32), types, spans)


def _fits_int32(ids: npt.NDArray[Any]) -> bool:
    limits = np.iinfo(np.int32)
    return bool(limits.min <= int(ids.min()) and int(ids.max()) <= limits.max)


def _count(images: int) -> str:
    return f"{images} image" if images == 1 else f"{images} images"


def _types(image: ImagePlan) -> Ints:
    rows = np.full((image.gh, image.gw + 1), IMAGE, np.int32)
    rows[:, -1] = NEWLINE
    return np.concatenate([[START], rows.reshape(-1), [END]], dtype=np.int32)
