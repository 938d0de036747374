"""From a picture to patches: opening and checking, resizing with Pillow, BF16 values in the model's order.

Pillow is imported when a picture is loaded, not before: text needs none. Source: V4.1 specification, 9.1.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from dsv4c.errors import Dsv4cError, ToolchainError, UsageError

from .rules import ImagePlan, ImageRules, plan

if TYPE_CHECKING:
    from PIL import Image

Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]"

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What files may be, in Pillow's names. Its other readers stay shut: one of them starts a program."""
MAX_PIXELS = 100_000_000
"""More are refused before they are decoded. Pillow takes up to 8 bytes per pixel while it converts."""
MAX_SIDE = 1 << 20
"""Resampling keeps coefficients for every pixel of a side."""
MAX_BYTES = 1 << 29
"""Of a file; some readers take a file whole before they know the size of the picture."""
FILL = (127, 127, 127)
RESAVE = "open it in an image program and save it as an 8-bit RGB PNG"


@dataclass(frozen=True)
class ImagePatches:
    """A picture as the vision tower takes it.

    Attributes:
        patches: float32 [n, 3 * patch_size ** 2], n = rows * cols, every value one that BF16 holds; patches
            in reading order, each flattened (channel, row, column).
        grid: (rows, cols) of patches.
        plan: the sizes behind them.
    """

    patches: npt.NDArray[np.float32]
    grid: tuple[int, int]
    plan: ImagePlan


def load_patches(source: Source, rules: ImageRules) -> ImagePatches:
    """Decode, resize and cut one picture (specification 9.1).

    The picture is made RGB as `convert("RGB")` of Pillow does, and by nothing more: transparency is dropped
    and the colours beneath show; values of 16-bit grey above 255 become white; colour profiles are not
    applied. EXIF orientation is not applied either: a picture stored lying stays so. Then it is fitted into
    the planned size (bicubic, rounded to 8 bits by Pillow), centred on grey 127; one wider than
    `max_wh_ratio` is resized without keeping its ratio. Values are (x / 255 - 0.5) / 0.5 in float32, rounded
    to BF16, nearest even.

    Memory: up to 8 bytes per pixel of the source, given back on return, and 1.5 times the result.

    Args:
        source: a file, the bytes of one, an image of Pillow (left open, and unchanged), or uint8 [h, w, 3].
        rules: of the model.

    Raises:
        ToolchainError: Pillow is not installed.
        UsageError: no such file, no image of a known format, damaged, with several frames, without pixels,
            with more than `MAX_PIXELS`, or so long and thin that nothing is left of it. The second picture
            of a photograph (MPO: a preview, or the other eye) is no frame; the first is taken.
    """
    pillow = _pillow()
    with _opened(source, pillow) as (image, where), _decoding(where):
        sizes = plan(image.width, image.height, rules)
        pixels = _resized(image, sizes, where)
    return ImagePatches(cut(pixels, rules.patch_size), (sizes.rows, sizes.cols), sizes)


def cut(pixels: npt.NDArray[np.uint8], patch: int) -> npt.NDArray[np.float32]:
    """uint8 [rows * p, cols * p, 3] -> float32 [rows * cols, 3 * p * p] of BF16 values."""
    rows, cols = pixels.shape[0] // patch, pixels.shape[1] // patch
    tiles = pixels.reshape(rows, patch, cols, patch, 3).transpose(0, 2, 4, 1, 3)
    return VALUES[tiles.reshape(rows * cols, 3 * patch * patch)]


def _values() -> npt.NDArray[np.float32]:
    """float32 [256]: what becomes of each 8-bit value, rounded to BF16 (nearest even)."""
    half = np.float32(0.5)
    exact = (np.arange(256, dtype=np.float32) / np.float32(255) - half) / half
    bits = exact.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


VALUES = _values()


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ToolchainError(
            f"reading images needs Pillow: {error}", hint="pip install 'dsv4c[images]'"
        ) from error
    return Image


# ------------------------------------------------------------------------------------- opening


@contextmanager
def _opened(source: Source, pillow: ModuleType) -> Iterator[tuple[Image.Image, str]]:
    """The checked, possibly not yet decoded picture, and what to call it in errors."""
    if isinstance(source, pillow.Image):
        where = "the image"
        with _decoding(where):
            _check(source, where)
        yield source, where
    elif isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise UsageError(
                f"the pixels are {source.dtype}{list(source.shape)}", where="the image",
                allowed="uint8 [h, w, 3]",
            )  # fmt: skip
        _check_size(source.shape[1], source.shape[0], "the image")
        yield pillow.fromarray(np.ascontiguousarray(source)), "the image"
    elif isinstance(source, bytes):
        where = f"the image of {len(source)} bytes"
        _check_bytes(len(source), where)
        with _parsed(io.BytesIO(source), pillow, where) as image:
            yield image, where
    elif isinstance(source, str | os.PathLike):
        with _file(Path(source)) as file, _parsed(file, pillow, str(source)) as image:
            yield image, str(source)
    else:
        raise UsageError(
            f"the image is a {type(source).__name__}",
            allowed="a path, bytes, an image of Pillow, or uint8 [h, w, 3]",
        )


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    """A regular file; looked at before it is opened, because opening a pipe waits for its writer."""
    try:
        facts = path.stat()
        if stat.S_ISDIR(facts.st_mode):
            raise UsageError("this is a directory", where=str(path), allowed="an image file")
        if not stat.S_ISREG(facts.st_mode):
            raise UsageError("this is no regular file", where=str(path), allowed="an image file")
        _check_bytes(facts.st_size, str(path))
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be read: {why}", where=str(path)) from error
    with file:
        yield file


@contextmanager
def _parsed(file: BinaryIO, pillow: ModuleType, where: str) -> Iterator[Image.Image]:
    pillow.init()
    known = [name for name in FORMATS if name in pillow.OPEN]
    with _decoding(where):
        try:
            image = pillow.open(file, formats=known)
        except pillow.UnidentifiedImageError:
            raise UsageError(
                "this is no image of a known format, or its beginning is damaged", where=where,
                allowed=", ".join(known), hint=RESAVE,
            ) from None  # fmt: skip
        except pillow.DecompressionBombError as error:
            raise _too_large(str(error), where) from error
        _check(image, where)
    with image:
        yield image


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Whatever a decoder raises over damaged bytes becomes an error with the name of the file.

    Its warnings are dropped: about metadata that is not used, about transparency, which goes anyway, and
    about sizes that `MAX_PIXELS` permits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Dsv4cError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything
        raise UsageError(
            f"cannot be decoded: {str(error) or type(error).__name__}", where=where,
            hint=f"the file may be cut short or damaged; if it opens elsewhere, {RESAVE}",
        ) from error  # fmt: skip


# ------------------------------------------------------------------------------------- checking


def _check(image: Image.Image, where: str) -> None:
    _check_size(image.width, image.height, where)
    frames = int(getattr(image, "n_frames", 1))
    if frames > 1 and image.format != "MPO":
        raise UsageError(
            f"this {image.format} has {frames} frames or pages", where=where, allowed="one",
            hint="extract one frame, save it as a PNG and pass that",
        )  # fmt: skip


def _check_size(width: int, height: int, where: str) -> None:
    if width < 1 or height < 1:
        raise UsageError(f"the image is {width} x {height} pixels", where=where, allowed="at least 1 x 1")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(f"the image is {width} x {height} pixels", where)


def _too_large(what: str, where: str) -> UsageError:
    return UsageError(
        what.rstrip("."), where=where,
        allowed=f"at most {MAX_PIXELS:,} pixels, and {MAX_SIDE:,} along a side",
        hint="make the image smaller first; the model sees a few megapixels of it at most",
    )  # fmt: skip


def _check_bytes(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise UsageError(
            f"the file has {size:,} bytes", where=where, allowed=f"at most {MAX_BYTES:,}", hint=RESAVE
        )


# ------------------------------------------------------------------------------------- pixels


def _resized(image: Image.Image, sizes: ImagePlan, where: str) -> npt.NDArray[Any]:
    """uint8 [bh, bw, 3]."""
    from PIL import Image, ImageOps

    size, (width, height) = (sizes.bw, sizes.bh), image.size
    # Pillow fits a picture of no height into the grey without a word.
    fitted = min(round(height / width * sizes.bw), round(width / height * sizes.bh))
    if not sizes.squeezed and fitted == 0:
        raise UsageError(
            f"the image is {width} x {height} pixels, and less than one is left at "
            f"{sizes.bw} x {sizes.bh}, the most that the model takes",
            where=where, hint="cut it into pieces that are less long and thin",
        )  # fmt: skip
    colours = image if image.mode == "RGB" else image.convert("RGB")
    if sizes.squeezed:
        return np.asarray(colours.resize(size, Image.Resampling.BICUBIC))
    return np.asarray(ImageOps.pad(colours, size, Image.Resampling.BICUBIC, FILL, (0.5, 0.5)))
