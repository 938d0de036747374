"""Pictures: to patches bit for bit, what is refused and in which words, how much memory it takes."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.ImageCms import ImageCmsProfile, createProfile

from dsv4c.errors import ToolchainError, UsageError
from dsv4c.runtime.images import ImageRules, load, load_patches, plan

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = np.load(ROOT / "tests" / "data" / "images" / "v41.npz")
SMALL = ImageRules(14, 3, 64, 7056, None, 510)
RELEASED = ImageRules(14, 3, 1024, 295936, None, 129264)


def noise(width: int, height: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def values(pixels: Any) -> Any:
    """(x / 255 - 0.5) / 0.5 in BF16, by another library and in float64."""
    return ((pixels.astype(np.float64) / 255 - 0.5) / 0.5).astype(ml_dtypes.bfloat16).astype(np.float32)


def flattened(pixels: Any, patch: int) -> Any:
    """Patches row by row, each (channel, row, column): the slow way."""
    height, width, _ = pixels.shape
    corners = [(y, x) for y in range(0, height, patch) for x in range(0, width, patch)]
    return np.stack([
        [pixels[y + j, x + i, c] for c in range(3) for j in range(patch) for i in range(patch)]
        for y, x in corners
    ])  # fmt: skip


def png(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


# ------------------------------------------------------------------------------ patches


def test_the_golden_patches_bit_for_bit() -> None:
    found = load_patches(GOLDEN["image.pixels"], SMALL)
    assert found.patches.dtype == np.float32 and found.patches.shape == (48, 588)
    assert np.array_equal(found.patches.view(np.uint32) >> 16, GOLDEN["image.patches"])
    assert not (found.patches.view(np.uint32) & 0xFFFF).any()
    assert found.grid == tuple(GOLDEN["image.grid"]) and found.plan == plan(112, 84, SMALL)


def test_every_value_is_rounded_to_bf16() -> None:
    assert np.array_equal(load.VALUES, values(np.arange(256)))
    assert (load.VALUES[0], load.VALUES[255]) == (-1, 1)


def test_the_order_of_a_patch() -> None:
    pixels = noise(12, 8)
    rules = ImageRules(4, 1, 64, 0, None, 0)
    found = load_patches(pixels, rules)
    assert found.grid == (2, 3)
    assert np.array_equal(found.patches, values(flattened(pixels, 4)))


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    pixels = noise(112, 84)
    image = Image.fromarray(pixels)
    (tmp_path / "a.png").write_bytes(png(image))
    expected = load_patches(pixels, SMALL).patches
    path = tmp_path / "a.png"
    for source in (path, str(path), png(image), image, pixels[::1, ::-1][:, ::-1], Image.open(path)):
        assert np.array_equal(load_patches(source, SMALL).patches, expected)
    assert image.size == (112, 84) and image.getpixel((0, 0)) == tuple(pixels[0, 0])  # still open


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (640, 480), (13, 500), (1500, 1100)])
def test_fitted_and_centred_on_grey(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    sizes = plan(*size, SMALL)
    padded = ImageOps.pad(image, (sizes.bw, sizes.bh), Image.Resampling.BICUBIC, (127, 127, 127), (0.5, 0.5))
    found = load_patches(image, SMALL).patches
    assert np.array_equal(found, values(flattened(np.asarray(padded), 14)))


def test_padding_is_grey_on_both_sides() -> None:
    """A thin white column: 42 pixels across, of which the picture has seven in the middle."""
    found = load_patches(Image.new("RGB", (1, 3000), "white"), RELEASED)
    pixels = found.patches.reshape(1533, 3, 3, 14, 14)[100, :, 0, 0].reshape(42)
    grey = np.float32(values(np.array(127)))
    assert (pixels[:17] == grey).all() and (pixels[25:] == grey).all()
    assert (pixels[18:24] == 1).all() and found.grid == (1533, 3)


def test_squeezed_images_fill_the_whole() -> None:
    rules = ImageRules(14, 3, 64, 7056, 1.5, 510)
    image = Image.fromarray(noise(900, 100))
    sizes = plan(900, 100, rules)
    resized = np.asarray(image.resize((sizes.bw, sizes.bh), Image.Resampling.BICUBIC))
    found = load_patches(image, rules)
    assert found.plan.squeezed and np.array_equal(found.patches, values(flattened(resized, 14)))
    assert (load_patches(Image.new("RGB", (900, 100), "white"), rules).patches == 1).all()  # no grey


# ------------------------------------------------------------------------------ kinds of files


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([noise(84, 84), noise(84, 84, 1)[..., 0]]), "RGBA")


def palette() -> Image.Image:
    image = Image.fromarray(noise(84, 84)).quantize(16)
    image.info["transparency"] = bytes(range(16))
    return image


KINDS: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "rgba": ("PNG", rgba),
    "rgba webp": ("WEBP", rgba),
    "palette": ("PNG", palette),
    "one frame gif": ("GIF", lambda: Image.fromarray(noise(84, 84)).quantize(16)),
    "grey": ("PNG", lambda: Image.fromarray(noise(84, 84)).convert("L")),
    "grey and alpha": ("PNG", lambda: rgba().convert("LA")),
    "bits": ("PNG", lambda: Image.fromarray(noise(84, 84)).convert("1")),
    "jpeg": ("JPEG", lambda: Image.fromarray(noise(84, 84))),
    "cmyk jpeg": ("JPEG", lambda: Image.fromarray(noise(84, 84)).convert("CMYK")),
    "cmyk tiff": ("TIFF", lambda: Image.fromarray(noise(84, 84)).convert("CMYK")),
    "bmp": ("BMP", lambda: Image.fromarray(noise(84, 84))),
    "16 bit": ("PNG", lambda: Image.fromarray(noise(84, 84)[..., 0].astype(np.uint16) * 3)),
    "floats": ("TIFF", lambda: Image.fromarray(noise(84, 84)[..., 0].astype(np.float32) * 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_made_rgb_by_plain_conversion(kind: str, tmp_path: Path) -> None:
    form, make = KINDS[kind]
    path = tmp_path / f"image.{form.lower()}"
    make().save(path, form)
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        expected = values(flattened(np.asarray(image.convert("RGB")), 14))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said on the way
        found = load_patches(path, SMALL).patches
    assert np.array_equal(found, expected) and found.std() > 0.1


def test_transparency_shows_the_colours_beneath() -> None:
    image = Image.new("RGBA", (84, 84), (255, 0, 0, 0))
    assert np.unique(load_patches(png(image), SMALL).patches[:, :196]).tolist() == [1]


def test_sixteen_bit_grey_is_clipped() -> None:
    image = Image.fromarray(np.full((84, 84), 4096, np.uint16))
    assert (load_patches(png(image), SMALL).patches == 1).all()


def test_orientation_and_profile_are_not_applied() -> None:
    image = Image.fromarray(noise(112, 84))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = png(image, exif=exif, icc_profile=ImageCmsProfile(createProfile("LAB")).tobytes())
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    assert np.array_equal(load_patches(turned, SMALL).patches, load_patches(image, SMALL).patches)


def test_the_first_picture_of_a_photograph_with_a_preview() -> None:
    out = io.BytesIO()
    first, second = Image.new("RGB", (84, 84), "white"), Image.new("RGB", (84, 84), "black")
    first.save(out, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(out.getvalue())).n_frames == 2  # type: ignore[attr-defined]
    assert (load_patches(out.getvalue(), SMALL).patches == 1).all()


# ------------------------------------------------------------------------------ refused


def refused(source: Any, *says: str, rules: ImageRules = SMALL) -> str:
    with pytest.raises(UsageError) as error:
        load_patches(source, rules)
    text = str(error.value)
    for part in says:
        assert part in text, text
    return text


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames(form: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(84, 84, seed)) for seed in range(3)]
    path = tmp_path / "many"
    frames[0].save(path, form, save_all=True, append_images=frames[1:])
    text = refused(path, f"{path}: this {form} has 3 frames or pages; allowed: one")
    assert "hint: extract one frame, save it as a PNG and pass that" in text
    with Image.open(path) as image:
        refused(image, "the image: this", "3 frames")
        assert load_patches(image.copy(), SMALL).grid == (6, 6)


def test_what_is_not_a_file_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.png", f"{tmp_path / 'none.png'}: cannot be read: No such file or directory")
    refused(str(tmp_path), f"{tmp_path}: this is a directory; allowed: an image file")
    refused("a\0b", "cannot be read: embedded null byte")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "this is no regular file")
    (tmp_path / "a.png").write_bytes(png(rgba()))

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(load, "open", forbidden, raising=False)
    refused(tmp_path / "a.png", f"{tmp_path / 'a.png'}: cannot be read: Permission denied")


@pytest.mark.parametrize(
    "data", [b"", b"hello, world", b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG"]
)
def test_what_is_no_image(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(data)
    for source in (tmp_path / "x.png", data):
        text = refused(source, "this is no image of a known format, or its beginning is damaged; allowed: ")
        assert "BMP, GIF, JPEG" in text and "hint: open it in an image program" in text
    assert text.startswith(f"the image of {len(data)} bytes: this is no image")


@pytest.mark.parametrize("form", ["EPS", "PCX"])
def test_other_readers_of_pillow_stay_shut(form: str) -> None:
    """Pillow would hand EPS to Ghostscript."""
    out = io.BytesIO()
    Image.fromarray(noise(84, 84)).save(out, form)
    refused(out.getvalue(), "this is no image of a known format")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_cut_of_a_file_is_refused(form: str) -> None:
    out = io.BytesIO()
    Image.fromarray(noise(40, 40)).save(out, form)
    data = out.getvalue()
    hints = set()
    for end in [*range(0, 64, 7), *range(64, len(data) - 16, 97)]:
        text = refused(data[:end])
        assert "cannot be decoded: " in text or "no image of a known format" in text, text
        hints.add(text.partition("hint: ")[2])
    assert all(hints) and len(hints) == 2  # both kinds came up


def test_damaged_pixels_are_refused() -> None:
    data = bytearray(png(Image.fromarray(noise(84, 84))))
    data[2000] ^= 255
    refused(bytes(data), "cannot be decoded: ", "hint: the file may be cut short or damaged")


def test_wrong_arrays_and_types() -> None:
    refused(np.zeros((4, 5, 3), np.float32), "the pixels are float32[4, 5, 3]; allowed: uint8 [h, w, 3]")
    refused(np.zeros((4, 5), np.uint8), "the pixels are uint8[4, 5]")
    refused(np.zeros((4, 5, 4), np.uint8), "the pixels are uint8[4, 5, 4]")
    refused(12, "the image is a int; allowed: a path, bytes, an image of Pillow, or uint8 [h, w, 3]")
    refused(Image.new("La", (84, 84)), "the image: cannot be decoded: conversion from La")


def test_no_pixels() -> None:
    for source in (Image.new("RGB", (0, 5)), np.zeros((5, 0, 3), np.uint8)):
        refused(source, "the image is 0 x 5 pixels; allowed: at least 1 x 1")
    refused(header(0, 5), "the image of")


def header(width: int, height: int) -> bytes:
    """A PNG that promises these sides and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10001, 10000), (20000, 20000), (2**31 - 1, 2**31 - 1), (2**20 + 1, 1)])
def test_bombs_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    tracemalloc.start()
    refused(
        header(*size), "allowed: at most 100,000,000 pixels, and 1,048,576 along a side", "hint: make the"
    )
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_legal_size_is_decoded_without_a_warning_of_a_bomb() -> None:
    """Pillow warns from 89 megapixels on; here the file only turns out to be cut short."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(header(10000, 10000), "cannot be decoded")


def test_long_files_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "long.webp").open("wb") as file:
        file.truncate(load.MAX_BYTES + 1)
    refused(tmp_path / "long.webp", "the file has 536,870,913 bytes; allowed: at most 536,870,912")


def test_images_of_which_nothing_would_be_left() -> None:
    refused(
        Image.new("RGB", (100_000, 1)), "the image is 100000 x 1 pixels, and less than one is left at "
        "42882 x 42", "hint: cut it into pieces", rules=RELEASED,
    )  # fmt: skip
    assert load_patches(Image.new("RGB", (80_000, 1), "white"), RELEASED).patches.max() == 1


# ------------------------------------------------------------------------------ without Pillow, and memory


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT / '.pkg')!r})\n{script}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_pictures_need_pillow() -> None:
    out = run("""
import dsv4c.runtime, dsv4c.runtime.images as images
assert "PIL" not in sys.modules
sys.modules["PIL"] = None  # importing it fails
rules = images.ImageRules(14, 3, 64, 7056, None, 510)
images.expand([510], 510, [images.plan(112, 84, rules)])
try:
    images.load_patches("a.png", rules)
except images.load.ToolchainError as error:
    print(error)
""")
    assert out.startswith("reading images needs Pillow: ") and "hint: pip install 'dsv4c[images]'" in out
    assert issubclass(ToolchainError, Exception)


def test_memory_of_the_result() -> None:
    """Beyond the picture itself: the patches, and half as much on the way."""
    pixels = noise(1512, 1134)
    load_patches(pixels, RELEASED)
    tracemalloc.start()
    found = load_patches(pixels, RELEASED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.patches.nbytes < peak < 1.6 * found.patches.nbytes


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_memory_of_a_large_picture(mode: str, tmp_path: Path) -> None:
    """48 megapixels: Pillow's 4 bytes per RGB pixel, 1 for grey before; nothing else of that size."""
    Image.new(mode, (8000, 6000)).save(tmp_path / "large.png", compress_level=1)
    out = run(f"""
from pathlib import Path
from PIL import Image, ImageOps
from dsv4c.runtime.images import *

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

rules = ImageRules(14, 3, 1024, 295936, None, 1)
load_patches(Image.new("RGB", (1500, 1100)), rules)
before = peak()
load_patches({str(tmp_path / "large.png")!r}, rules)
print(peak() - before)
""")
    per_pixel = int(out) / 48e6
    assert 3.5 < per_pixel < (4.7 if mode == "RGB" else 5.7)
