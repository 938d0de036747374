"""To what size an image is brought and how many tokens it takes: sizes only, no pixels, no Pillow.

Source: V4.1 specification, section 9.1. Its numbers are those of the released model: patches of 14, cells of
3 x 3 patches, 1024 tokens; here they follow from `ImageRules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsv4c.errors import ArtifactError, UsageError

LONGEST_SIDE = 2**31 - 1
"""Pixels; what an image file can say at most, and far below where float64 loses integers."""


@dataclass(frozen=True)
class ImageRules:
    """What a model says about its images.

    Attributes:
        patch_size: pixels each way of a patch.
        downsample: patches each way of a cell; a cell becomes one token.
        max_tokens: the longest span of one image, its start, line ends and end included.
        min_pixels: smaller images are enlarged to about this many.
        max_wh_ratio: a wider image is squeezed to this width over height; None squeezes nothing.
        placeholder: token id of every position of an image.

    Raises:
        UsageError: a value of the wrong type or range.
    """

    patch_size: int
    downsample: int
    max_tokens: int
    min_pixels: int
    max_wh_ratio: float | None
    placeholder: int

    def __post_init__(self) -> None:
        # Four tokens are the shortest span: start, one image token, one line end, end.
        least = {"patch_size": 1, "downsample": 1, "max_tokens": 4, "min_pixels": 0, "placeholder": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= LONGEST_SIDE:
                allowed = f"an integer from {low} to {LONGEST_SIDE}"
                raise UsageError(f"{name} = {value!r}", where="ImageRules", allowed=allowed)
        ratio = self.max_wh_ratio
        if ratio is None:
            return
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not (number and 0 < ratio < math.inf):
            raise UsageError(
                f"max_wh_ratio = {ratio!r}", where="ImageRules", allowed="None, or a finite number above 0"
            )

    @classmethod
    def from_meta(cls, mapping: Mapping[str, Any]) -> ImageRules:
        """The rules from what `to_meta` gave, possibly through JSON.

        Raises:
            ArtifactError: a name is missing or too many, or a value is not allowed.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(mapping, Mapping) or set(mapping) != names:
            found = sorted(map(str, mapping)) if isinstance(mapping, Mapping) else type(mapping).__name__
            raise ArtifactError(
                f"the image rules hold {found}", where="meta", allowed=", ".join(sorted(names)),
                hint="compile the model again with this version",
            )  # fmt: skip
        try:
            return cls(**mapping)
        except UsageError as error:
            raise ArtifactError(
                f"the image rules are wrong: {error.what}", where="meta", allowed=error.allowed
            ) from error

    def to_meta(self) -> dict[str, Any]:
        """The rules as JSON takes them; `from_meta` reads them back equal."""
        return asdict(self)

    @property
    def cell(self) -> int:
        """Pixels each way of what becomes one token."""
        return self.patch_size * self.downsample


@dataclass(frozen=True)
class ImagePlan:
    """The sizes of one image on its way into the model.

    Attributes:
        bh, bw: height and width in pixels after resizing; multiples of the patch size.
        rows, cols: patches down and across.
        gh, gw: tokens down and across.
        squeezed: wider than `max_wh_ratio`, so it is resized without keeping its ratio; others are fitted
            into bw x bh and padded.
    """

    bh: int
    bw: int
    rows: int
    cols: int
    gh: int
    gw: int
    squeezed: bool = False

    @property
    def span(self) -> int:
        """Tokens of the image in the prompt: start, gh rows of gw tokens and a line end, end."""
        return self.gh * (self.gw + 1) + 2


def plan(width: int, height: int, rules: ImageRules) -> ImagePlan:
    """The sizes for an image of `width` x `height` pixels (specification 9.1).

    The rule enlarges to `min_pixels`, rounds up to whole patches and, where the span would be longer than
    `max_tokens`, shrinks. What it guarantees: the span is at most `max_tokens`; sides are multiples of
    `patch_size`. An image that was not shrunk has (bw + 1)(bh + 1) > min_pixels, and not always
    bw * bh >= min_pixels, because the enlarged sides are truncated before they are rounded up.

    Arithmetic is float64 in the order written in the specification; quotients are truncated last.

    Raises:
        UsageError: a side that is not an integer from 1 to 2**31 - 1.
    """
    for side in (width, height):
        if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= LONGEST_SIDE:
            raise UsageError(
                f"an image of {width!r} x {height!r} pixels", where="plan",
                allowed=f"sides that are integers from 1 to {LONGEST_SIDE}",
            )  # fmt: skip
    patch = rules.patch_size
    w, h = float(width), float(height)
    squeezed = rules.max_wh_ratio is not None and w > h * rules.max_wh_ratio
    if squeezed and rules.max_wh_ratio is not None:
        w = h * rules.max_wh_ratio
    if w * h < rules.min_pixels:
        factor = math.sqrt(rules.min_pixels / (w * h))
        # One pixel is left of a width that a ratio near 0 would truncate to none.
        w, h = max(float(int(w * factor)), 1.0), max(float(int(h * factor)), 1.0)
    found = _on_grid(math.ceil(h / patch) * patch, math.ceil(w / patch) * patch, rules, squeezed)
    return found if found.span <= rules.max_tokens else _on_grid(*_shrunk(h, w, rules), rules, squeezed)


def _on_grid(bh: int, bw: int, rules: ImageRules, squeezed: bool) -> ImagePlan:
    rows, cols = bh // rules.patch_size, bw // rules.patch_size
    gh, gw = -(-rows // rules.downsample), -(-cols // rules.downsample)
    return ImagePlan(bh, bw, rows, cols, gh, gw, squeezed)


def _shrunk(h: float, w: float, rules: ImageRules) -> tuple[int, int]:
    """(bh, bw): the largest of the ratio h : w whose span fits, or one column or one row of tokens.

    With mw tokens across and mh = r mw down, r = h / w, the grid and its line ends take
    r mw (mw + 1) = room tokens; mw is the positive root.
    """
    room, cell, patch = rules.max_tokens - 2, rules.cell, rules.patch_size
    ratio = h / w
    mw = math.sqrt(room / ratio + 0.25) - 0.5
    mh = mw * ratio
    if mw < 1:
        return room // 2 * cell, cell
    if mh < 1:
        return cell, (room - 1) * cell
    scale = min(math.floor(mw) * cell / w, math.floor(mh) * cell / h)
    # Cells of one patch could lose their last one here; those of the released model keep at least one.
    return max(math.floor(h * scale / patch), 1) * patch, max(math.floor(w * scale / patch), 1) * patch
