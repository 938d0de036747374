"""Kernels of the image encoder, and of how its rows enter the text, against their meaning."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from support import Arr, B, Case, T, ints, normal, poison, valid_rows

from dsv4c.ir.dims import sym

N, M, S, IMAGES = sym("N"), sym("M"), sym("S"), sym("I")
SIZES = [(1, 1), (1, 7), (2, 12), (3, 13), (1, 16), (2, 17), (1, 41)]
"""(images, patches): one, and around the lanes and the keys that meet at a time."""


# --------------------------------------------------------------------------------------- attention


@functools.cache
def attention(heads: int, d: int) -> Case:
    c = Case()
    c.op("full_attention", *(c.f32(n, B, N, heads, d) for n in "qkv"), scale=d**-0.5)
    return c


HEADS = [(1, 3), (2, 32), (3, 7), (16, 64), (17, 8), (32, 5), (33, 2)]


@pytest.mark.parametrize(("heads", "d"), HEADS)
def test_full_attention(heads: int, d: int) -> None:
    for b, n in SIZES:
        rng = np.random.default_rng(n)
        q, k, v = (normal(rng, b, n, heads, d) * factor for factor in (3, 1, 1))
        attention(heads, d).check({"q": q, "k": k, "v": v})


def test_full_attention_with_extreme_logits() -> None:
    """Logits of thousands, and all of them far below zero: nothing overflows, and no sum is zero."""
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 29, 3, 7) * 300, normal(rng, 2, 29, 3, 7) * 20, normal(rng, 2, 29, 3, 7)
    attention(3, 7).check({"q": q, "k": k, "v": v}, tolerance=5e-3)  # a rounded logit of 1e4 carries 1e-3
    far = {"q": np.full((1, 14, 3, 7), -1e3), "k": np.full((1, 14, 3, 7), 1e2), "v": normal(rng, 1, 14, 3, 7)}
    attention(3, 7).check(far, tolerance=1e-6)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: alone, or beside an image of garbage; and a patch wherever it stands among the lanes."""
    rng = np.random.default_rng(1)
    parts = {name: normal(rng, 2, 19, 3, 7) for name in "qkv"}
    want = attention(3, 7).run(parts)["full_attention"]
    alone = attention(3, 7).run({name: x[1:] for name, x in parts.items()})["full_attention"]
    np.testing.assert_array_equal(alone[0], want[1])
    spoilt = {name: np.concatenate([x[:1] * np.nan, x[1:]]) for name, x in parts.items()}
    np.testing.assert_array_equal(attention(3, 7).run(spoilt)["full_attention"][1], want[1])
    moved = parts | {"q": np.roll(parts["q"], 5, axis=1)}
    np.testing.assert_array_equal(np.roll(attention(3, 7).run(moved)["full_attention"], -5, axis=1), want)


# ------------------------------------------------------------------------------------------ angles


@pytest.mark.parametrize("quarter", [1, 3, 16])
def test_grid_angles(quarter: int) -> None:
    """Of the longest grid that an image may have, and a patch at (0, 0)."""
    c = Case()
    frequencies = np.power(np.float32(10000), -np.arange(quarter, dtype=np.float32) / quarter)
    c.multi("grid_angles", c.i32("p", B, N, 2), c.weight_of("f", frequencies), outs=("cos", "sin"))
    for b, n in SIZES:
        places = np.random.default_rng(n).integers(0, 3066, (b, n, 2)).astype(np.int32)
        places[0, 0] = 0
        want, found = c.meaning({"p": places}, np.float32), c.run({"p": places})
        for name in ("cos", "sin"):
            np.testing.assert_allclose(found[name], want[name], atol=3e-7, err_msg=name)


@functools.cache
def rotated(heads: int, d: int, half: int) -> Case:
    c = Case()
    x, flat = c.f32("x", B, N, heads, d), c.f32("flat", B, N, d)
    angles = c.f32("cos", B, N, half), c.f32("sin", B, N, half)
    for inverse in (False, True):
        c.op("rotary", x, *angles, inverse=inverse, halves=True, out=f"heads{inverse}")
        c.op("rotary", flat, *angles, inverse=inverse, halves=True, out=f"flat{inverse}")
    c.op("rotary", c.b.op("rotary", x, *angles, halves=True), *angles, halves=True, inverse=True, out="back")
    return c


@pytest.mark.parametrize(
    ("heads", "d", "half"), [(1, 2, 1), (3, 40, 8), (17, 24, 12), (5, 33, 7), (33, 5, 2)]
)
def test_rotary_by_halves(heads: int, d: int, half: int) -> None:
    rng = np.random.default_rng(heads)
    for b, n in SIZES:
        angle = rng.uniform(-7, 7, (b, n, half)).astype(np.float32)
        inputs = {"x": normal(rng, b, n, heads, d), "flat": normal(rng, b, n, d), "cos": np.cos(angle),
                  "sin": np.sin(angle)}  # fmt: skip
        found = rotated(heads, d, half).check(inputs, tolerance=1e-6)
        np.testing.assert_allclose(found["back"], inputs["x"], atol=2e-6)


# ------------------------------------------------------------------------------------ rows and cells


@functools.cache
def rows(d: int, k: int) -> Case:
    """What the aligner does, and what a program does around it."""
    c = Case()
    x = c.f32("x", B, N, d)
    c.op("gelu", x)
    c.op("gather_cells", x, c.i32("cells", B, M, k))
    c.op("image_span", x, c.i32("layout", B, S), *(c.weight(n, d) for n in ("start", "newline", "end")))
    return c


@pytest.mark.parametrize(("d", "k"), [(1, 1), (7, 4), (16, 9), (61, 9)])
def test_rows(d: int, k: int) -> None:
    for b, n in SIZES:
        rng = np.random.default_rng(n + k)
        inputs = {
            "x": normal(rng, b, n, d) * 2, "cells": rng.integers(-1, n, (b, 1 + n // 2, k)).astype(np.int32),
            "layout": rng.integers(-3, n, (b, 2 * n + 3)).astype(np.int32),
        }  # fmt: skip
        inputs["cells"][0, 0, 0], inputs["layout"][0, :4] = -1, [-1, -2, -3, n - 1]
        found = rows(d, k).check(inputs, tolerance=1e-6)
        want = rows(d, k).meaning(inputs, np.float32)
        for name in ("gather_cells", "image_span"):
            np.testing.assert_array_equal(found[name], want[name], err_msg=name)


def test_a_row_that_no_cell_and_no_span_names_may_hold_anything() -> None:
    x = np.array([[[1.0], [np.nan], [3.0]]], np.float32)
    found = rows(1, 1).run({"x": x, "cells": [[[2], [-1], [0]]], "layout": [[0, 2]]})
    assert found["gather_cells"].tolist() == [[[3], [0], [1]]] and found["image_span"].tolist() == [
        [[1], [3]]
    ]


def test_gelu_far_from_zero() -> None:
    """x itself on the right, 0 on the left, and no NaN from zero times infinity at any finite number."""
    x = np.array([[[-1e30, -40, -6, -1e-30, 0.0, 1e-30, 1e-3, 6, 40, 1e30]]], np.float32).reshape(1, 10, 1)
    found = rows(1, 1).run({"x": x, "cells": [[[0]]], "layout": [[0]]})["gelu"].ravel()
    want = [v * (1 + math.erf(v * 0.5**0.5)) / 2 for v in x.ravel().astype(float)]
    np.testing.assert_allclose(found, want, rtol=3e-7, atol=1e-6)


def test_merged_heads_are_a_view() -> None:
    c = Case()
    x = c.b.op("unit_norm", c.b.op("split_heads", c.f32("x", B, N, 40), heads=5), eps=1e-6)
    c.op("scale", c.b.op("merge_heads", x), factor=-2.0)
    for b, n in SIZES:
        c.check({"x": normal(np.random.default_rng(n), b, n, 40)})


# -------------------------------------------------------------------------------- images in the text

TOKEN = 5


@functools.cache
def merged(d: int) -> Case:
    c = Case()
    x, tokens, images = c.f32("x", B, T, d), c.i32("tokens", B, T), c.f32("images", B, IMAGES, d)
    c.op("merge_images", x, tokens, images, c.i32("n_images", B), image_token=TOKEN)
    return c


@pytest.mark.parametrize("d", [1, 40])
@pytest.mark.parametrize("room", [1, 3, 20])
def test_merge_images(d: int, room: int) -> None:
    """Fewer and more image tokens than rows, n_images past the room for rows, padding that holds NaN."""
    for b, t in SIZES:
        rng = np.random.default_rng(t + room)
        n_valid = rng.integers(0, t + 1, b)
        count = rng.integers(0, room + 4, b)
        inputs = {
            "x": poison(normal(rng, b, t, d), n_valid), "tokens": rng.integers(TOKEN - 1, TOKEN + 1, (b, t)),
            "images": poison(normal(rng, b, room, d), np.minimum(count, room)), "n_images": count,
        }  # fmt: skip
        real = valid_rows(n_valid, t)
        found = merged(d).check(inputs, tolerance=0, only=real)["merge_images"]
        assert np.isfinite(found[real]).all()


@functools.cache
def router(e: int, k: int) -> Case:
    c = Case()
    scores, tokens = c.f32("s", B, T, e), c.i32("tokens", B, T)
    text, image = (c.weight_of(n, c.rng.integers(-2, 3, e).astype(np.float32)) for n in ("text", "image"))
    c.op("route_topk", scores, text, tokens, image, k=k, image_token=TOKEN, out="mixed")
    c.op("route_topk", scores, text, k=k, out="all text")
    c.op("route_topk", scores, image, k=k, out="all image")
    return c


@pytest.mark.parametrize(("e", "k"), [(1, 1), (4, 2), (5, 5), (64, 6), (33, 7)])
@pytest.mark.parametrize("ties", [False, True])
def test_router_of_images(e: int, k: int, ties: bool) -> None:
    for b, t in SIZES:
        rng = np.random.default_rng(e + t)
        tokens = rng.integers(TOKEN - 1, TOKEN + 2, (b, t))
        scores: Arr = rng.integers(0, 3, (b, t, e)).astype(np.float32) if ties else normal(rng, b, t, e)
        found = router(e, k).check({"s": scores, "tokens": tokens})
        want = np.where(tokens[..., None] == TOKEN, found["all image"], found["all text"])
        np.testing.assert_array_equal(found["mixed"], want)


def test_padding_of_the_router_leaks_nowhere() -> None:
    rng, n_valid = np.random.default_rng(0), ints(2, 0, 5)
    scores, tokens = normal(rng, 3, 5, 33), rng.integers(TOKEN, TOKEN + 2, (3, 5))
    want = router(33, 7).run({"s": scores, "tokens": tokens})["mixed"]
    found = router(33, 7).run({"s": poison(scores, n_valid), "tokens": tokens})["mixed"]
    np.testing.assert_array_equal(found[valid_rows(n_valid, 5)], want[valid_rows(n_valid, 5)])
    assert ((found >= 0) & (found < 33)).all(), "an id of padding is still an expert"
