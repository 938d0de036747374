"""The embeddings of image positions on their way into steps: which call takes which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsv4c.errors import SessionError

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageRows:
    """What one call brings: `rows` f32 [B,I,d] with I >= 1, of which sequence b uses `counts[b]`, i32 [B]."""

    rows: Floats
    counts: Ints


def no_images(batch: int, width: int) -> ImageRows:
    """A call of text alone."""
    return ImageRows(np.zeros((batch, 1, width), np.float32), np.zeros(batch, np.int32))


class ImageFeed:
    """The rows of whole prompts, handed out call by call in the order of their image tokens.

    Args:
        images: per sequence float32 [n,d], one row per image token of its prompt.
        tokens: int32 [B,T], the prompts; n_valid: [B], their lengths.
        image_token: the id of image positions.

    Raises:
        SessionError: another number of rows than image tokens, or rows of another width.
    """

    def __init__(
        self, images: Sequence[npt.ArrayLike], tokens: Ints, n_valid: Ints, image_token: int, width: int
    ) -> None:
        self._token, self._width = image_token, width
        self._rows = [np.asarray(rows, np.float32) for rows in images]
        self._used = np.zeros(len(tokens), np.int64)
        wanted = self._count(tokens, n_valid).tolist()
        found = [list(rows.shape) for rows in self._rows]
        if found != [[n, width] for n in wanted]:
            raise SessionError(
                f"image rows are {found}", where="images",
                allowed=f"{[[n, width] for n in wanted]}: one row for every image token of a prompt",
            )  # fmt: skip

    def take(self, tokens: Ints, n_valid: Ints) -> ImageRows:
        """The rows of the next call, tokens int32 [B,T]."""
        counts = self._count(tokens, n_valid)
        out = np.zeros((len(tokens), max(int(counts.max()), 1), self._width), np.float32)
        for b, (rows, used, count) in enumerate(zip(self._rows, self._used, counts, strict=True)):
            out[b, :count] = rows[used : used + count]
        self._used += counts
        return ImageRows(out, counts)

    def all_rows(self, sequence: int) -> Floats:
        """float32 [n,d] of one sequence, used or not."""
        return self._rows[sequence]

    def _count(self, tokens: Ints, n_valid: Ints) -> Ints:
        real = np.arange(tokens.shape[1]) < np.asarray(n_valid)[:, None]
        counts: Ints = ((tokens == self._token) & real).sum(axis=1, dtype=np.int32)
        return counts
