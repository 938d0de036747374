"""Kernels over single rows against their meaning: embedding, norms, maps, gathers, rotary, state."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support import B, Case, L, T, ints, normal, poison, valid_rows

SIZES = [(1, 1), (1, 7), (2, 5), (3, 13), (1, 40)]
WIDTHS = [1, 15, 16, 40, 61]
CTX_ENTRIES = 40


@functools.cache
def elementwise(d: int) -> Case:
    c = Case()
    x, y = c.f32("x", B, T, d), c.f32("y", B, T, d)
    c.op("rms_norm", x, c.weight("norm", d), eps=1e-6)
    c.op("unit_norm", x, eps=1e-3)
    c.op("scale", x, factor=-0.37)
    c.op("sqrt_softplus", x)
    c.op("add", x, y)
    c.op("clamped_swiglu", x, y, limit=1.5)
    c.op("repeat_streams", x, n=3)
    c.op("gather_rows", x, c.i32("rows", B, L))
    return c


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(("b", "t"), SIZES)
def test_elementwise(d: int, b: int, t: int) -> None:
    rng = np.random.default_rng(d + t)
    rows = rng.integers(0, t, (b, 1 + d % 3)).astype(np.int32)
    elementwise(d).check({"x": normal(rng, b, t, d), "y": normal(rng, b, t, d) * 3, "rows": rows})


def test_padding_does_not_leak_into_other_rows() -> None:
    rng, n_valid = np.random.default_rng(0), ints(2, 0, 5)
    x = poison(normal(rng, 3, 5, 40), n_valid)
    inputs = {
        "x": x,
        "y": poison(normal(rng, 3, 5, 40), n_valid),
        "rows": np.array([[0], [0], [4]], np.int32),
    }
    with np.errstate(invalid="ignore"):
        found = elementwise(40).run(inputs)
        expected = elementwise(40).meaning(inputs)
    mask = valid_rows(n_valid, 5)
    for name, want in expected.items():
        if name != "gather_rows":
            np.testing.assert_allclose(found[name][mask], want[mask], rtol=1e-4, atol=1e-5, err_msg=name)


def test_extremes_of_the_maps() -> None:
    """Neither exp overflows into a NaN nor does a large negative gate lose its sign."""
    x = np.array(
        [[[-1e30, -200.0, -90.0, -1e-30, 0.0, -0.0, 1e-30, 20.0, 90.0, 1e30, *([0.5] * 5)]]], np.float32
    )
    y = np.ones_like(x) * 2
    found = elementwise(15).run({"x": x, "y": y, "rows": np.zeros((1, 1), np.int32)})
    want = elementwise(15).meaning({"x": x, "y": y, "rows": np.zeros((1, 1), np.int32)})
    for name in ("sqrt_softplus", "clamped_swiglu", "scale"):
        np.testing.assert_allclose(found[name], want[name], rtol=2e-6, atol=1e-30, err_msg=name)


@functools.cache
def embedding(d: int, bf16: bool) -> Case:
    c = Case()
    c.op("embed", c.i32("tokens", B, T), c.weight("table", 61, d, bf16=bf16))
    return c


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("d", [1, 40, 96])
def test_embed(d: int, bf16: bool) -> None:
    rng = np.random.default_rng(d)
    for b, t in SIZES:
        tokens = rng.integers(0, 61, (b, t)).astype(np.int32)
        tokens[0, 0], tokens[-1, -1] = 60, 0
        embedding(d, bf16).check({"tokens": tokens}, tolerance=0)


@functools.cache
def heads(h: int, d: int, half: int) -> Case:
    c = Case()
    x, flat = c.f32("x", B, T, h, d), c.f32("flat", B, T, d)
    angles = c.f32("cos", B, T, half), c.f32("sin", B, T, half)
    c.op("unit_norm", x, eps=1e-6)
    for inverse in (False, True):
        c.op("rotary", x, *angles, inverse=inverse, out=f"heads{inverse}")
        c.op("rotary", flat, *angles, inverse=inverse, out=f"flat{inverse}")
    return c


@pytest.mark.parametrize(("h", "d", "half"), [(1, 2, 1), (3, 40, 8), (17, 24, 12), (5, 33, 7)])
def test_heads(h: int, d: int, half: int) -> None:
    rng = np.random.default_rng(h)
    for b, t in SIZES:
        angle = rng.uniform(-7, 7, (b, t, half)).astype(np.float32)
        inputs = {"x": normal(rng, b, t, h, d), "flat": normal(rng, b, t, d), "cos": np.cos(angle),
                  "sin": np.sin(angle)}  # fmt: skip
        heads(h, d, half).check(inputs, tolerance=1e-6)


def test_split_heads_is_a_view() -> None:
    c = Case()
    c.op("unit_norm", c.b.op("split_heads", c.f32("x", B, T, 40), heads=5), eps=1e-6)
    rng = np.random.default_rng(1)
    for b, t in SIZES:
        c.check({"x": normal(rng, b, t, 40)})


@functools.cache
def angles(half: int) -> Case:
    c = Case()
    frequencies = np.power(np.float32(10000), -np.arange(half, dtype=np.float32) / half)
    c.multi("rope_angles", c.i32("p", B, T), c.weight_of("f", frequencies), outs=("cos", "sin"))
    return c


@pytest.mark.parametrize("half", [1, 8, 32])
def test_rope_angles(half: int) -> None:
    """The product rounds to float32 in both, so positions up to a million agree."""
    positions = np.array([[0, 1, 2, 127, 128, 4095, 65535, 1048575]], np.int32)
    c = angles(half)
    want, found = c.meaning({"p": positions}, np.float32), c.run({"p": positions})
    for name in ("cos", "sin"):
        np.testing.assert_allclose(found[name], want[name], atol=3e-7, err_msg=name)


@functools.cache
def state(ratio: int, d: int, window: int) -> Case:
    c = Case()
    tokens, n = c.i32("tokens", B, T), c.i32("n_valid", B)
    rows, new = c.f32("rows", B, T, d), c.f32("new", B, L, d)
    pos, where = c.state("pos", B, dtype=tokens.type.dtype), c.i32("where", B)
    ring, entries = c.state("ring", B, window, d), c.state("entries", B, CTX_ENTRIES, d)
    c.op("positions", tokens, where)
    c.op("entry_positions", tokens, where, ratio=ratio)
    c.op("ring_write", ring, rows, where, n, out="ring")
    c.op("entries_append", entries, new, where, n, ratio=ratio, out="entries")
    c.op("advance", pos, n, out="pos")
    return c


@pytest.mark.parametrize(("ratio", "d", "window"), [(4, 40, 8), (16, 7, 5), (1, 16, 1)])
@pytest.mark.parametrize("t", [1, 3, 8, 17])
def test_state(ratio: int, d: int, window: int, t: int) -> None:
    """Every offset of pos around the borders of ring and group; padding and later rows hold NaN."""
    rng = np.random.default_rng(t)
    for start in range(max(window, min(ratio, 6)) + 2):
        pos = ints(start, start + 1, max(0, ratio - 1))
        n_valid = ints(t, rng.integers(0, t + 1), max(0, t - 1))
        count = -(-t // ratio)
        closed = (pos + n_valid) // ratio - pos // ratio
        inputs = {
            "tokens": np.zeros((3, t)), "where": pos, "pos": pos, "n_valid": n_valid,
            "rows": poison(normal(rng, 3, t, d), n_valid), "new": poison(normal(rng, 3, count, d), closed),
            "ring": normal(rng, 3, window, d), "entries": normal(rng, 3, CTX_ENTRIES, d),
        }  # fmt: skip
        found = state(ratio, d, window).check(inputs, tolerance=1e-7)
        assert np.isfinite(found["ring"]).all() and np.isfinite(found["entries"]).all()
