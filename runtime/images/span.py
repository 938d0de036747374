"""Where images stand in a prompt: placeholders become spans, and the rows of a span find their positions.

Source: V4.1 specification, section 9.4. Knows token ids and vectors; not where either comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4c.errors import UsageError

from .rules import ImagePlan

TEXT, START, IMAGE, NEWLINE, END = -1, 0, 1, 2, 3
"""Types of positions. Those of an image are 0 or more: `types >= 0` is the image mask."""

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


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


class SpanRows(NamedTuple):
    """The embeddings of all images of a prompt.

    Attributes:
        rows: float32 [sum of span lengths, d], in reading order.
        positions: int32 [sum of span lengths]: row i replaces the embedding at `positions[i]` of the prompt.
    """

    rows: Floats
    positions: Ints


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


def span_rows(
    expanded: Expanded, aligner_rows: Sequence[Floats], start: Floats, newline: Floats, end: Floats
) -> SpanRows:
    """The embeddings of all positions of images, and those positions. Copies; rounds nothing.

    Args:
        expanded: the prompt.
        aligner_rows: per image float32 [gh * gw, d], the aligner's output in reading order.
        start, newline, end: float32 [d], the model's vectors.

    Raises:
        UsageError: other shapes or dtypes, or another number of images.
    """
    if start.ndim != 1:
        raise UsageError(f"start: {start.dtype}{list(start.shape)}", where="span_rows", allowed="float32[d]")
    for name, vector in (("start", start), ("newline", newline), ("end", end)):
        _check(name, vector, start.shape)
    if len(aligner_rows) != len(expanded.spans):
        raise UsageError(
            f"the prompt has room for {_count(len(expanded.spans))}, given are rows of {len(aligner_rows)}",
            where="span_rows",
        )
    for i, (rows, (first, stop)) in enumerate(zip(aligner_rows, expanded.spans, strict=True)):
        images = int((expanded.types[first:stop] == IMAGE).sum())
        _check(f"rows of image {i}", rows, (images, *start.shape))
    positions = np.flatnonzero(expanded.types >= 0).astype(np.int32)
    types = expanded.types[positions]
    out = np.empty((len(positions), *start.shape), np.float32)
    for kind, vector in ((START, start), (NEWLINE, newline), (END, end)):
        out[types == kind] = vector
    if aligner_rows:
        out[types == IMAGE] = np.concatenate(aligner_rows)
    return SpanRows(out, positions)


def _check(name: str, array: Floats, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise UsageError(
            f"{name}: {array.dtype}{list(array.shape)}", where="span_rows", allowed=f"float32{list(shape)}"
        )
