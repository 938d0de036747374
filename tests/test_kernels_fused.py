"""Kernels of the fused ops against the chains they stand for, and of the ops that are usually fused away."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support import CTX, Arr, B, Case, T, ints, normal, poison, valid_rows

from dsv4c.ir.ops.state import closed_groups
from dsv4c.targets.cpu.tvm.kernels.border import BorderShape

SIZES = [(1, 1), (1, 7), (2, 5), (3, 13)]

# ------------------------------------------------------------------------------------------ columns


@functools.cache
def columns(widths: tuple[int, ...], heads: int) -> Case:
    c = Case()
    outs = tuple(f"p{i}" for i in range(len(widths)))
    parts = c.multi("split_columns", c.f32("x", B, T, sum(widths)), outs=outs, widths=widths)
    c.op("unit_norm", c.b.op("split_heads", parts.results[0], heads=heads), eps=1e-6)
    c.op("scale", parts.results[-1], factor=2.0)
    return c


@pytest.mark.parametrize(
    ("widths", "heads"), [((40,), 5), ((7, 1, 33), 7), ((6, 16, 64, 2, 5, 5, 128, 1), 3)]
)
def test_split_columns(widths: tuple[int, ...], heads: int) -> None:
    for b, t in SIZES:
        x = normal(np.random.default_rng(t), b, t, sum(widths))
        found = columns(widths, heads).check({"x": x})
        np.testing.assert_array_equal(found["p0"], x[..., : widths[0]])


# ------------------------------------------------------------------------------- norm with rotation


@functools.cache
def rotated(h: int, d: int, half: int) -> Case:
    c = Case()
    x, flat = c.f32("x", B, T, h, d), c.f32("flat", B, T, d)
    cos, sin, w = c.f32("cos", B, T, half), c.f32("sin", B, T, half), c.weight("w", d)
    c.op("norm_rotary", x, cos, sin, eps=1e-6, out="heads")
    c.op("norm_rotary", flat, cos, sin, w, eps=1e-3, out="flat")
    c.op("rotary", c.b.op("unit_norm", x, eps=1e-6), cos, sin, out="heads apart")
    c.op("rotary", c.b.op("rms_norm", flat, w, eps=1e-3), cos, sin, out="flat apart")
    return c


@pytest.mark.parametrize(("h", "d", "half"), [(1, 2, 1), (3, 40, 8), (17, 24, 12), (5, 33, 7)])
def test_norm_rotary(h: int, d: int, half: int) -> None:
    rng = np.random.default_rng(h)
    for b, t in SIZES:
        angle = rng.uniform(-7, 7, (b, t, half)).astype(np.float32)
        inputs = {"x": normal(rng, b, t, h, d), "flat": normal(rng, b, t, d), "cos": np.cos(angle),
                  "sin": np.sin(angle)}  # fmt: skip
        found = rotated(h, d, half).check(inputs, tolerance=1e-6)
        for name in ("heads", "flat"):
            np.testing.assert_allclose(found[name], found[f"{name} apart"], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------- closing entries


@functools.cache
def closing(ratio: int, d: int, half: int, overlap: bool) -> Case:
    c, halves = Case(), 2 if overlap else 1
    kv, gate = c.f32("kv", B, T, halves * d), c.f32("gate", B, T, halves * d)
    rings = [c.f32(f"{r}_ring", B, halves * ratio, halves * d) for r in ("kv", "gate")]
    angles = [c.f32(a, B, closed_groups(T, ratio), half) for a in ("cos", "sin")]
    entries = c.state("entries", B, CTX // 4, d)
    step = c.i32("pos", B), c.i32("n_valid", B)
    c.op("entries_close", entries, kv, gate, *rings, c.weight("w", d), *angles, *step, ratio=ratio,
         overlap=overlap, eps=1e-6, out="entries")  # fmt: skip
    return c


@pytest.mark.parametrize("shape", [(4, 40, 8, True), (3, 7, 2, True), (16, 24, 12, False), (5, 16, 1, False)])
@pytest.mark.parametrize("t", [1, 3, 8, 17])
def test_entries_close(shape: tuple[int, int, int, bool], t: int) -> None:
    """Every offset of pos around the border of a group; padding and later rows hold NaN."""
    ratio, d, half, overlap = shape
    rng, halves = np.random.default_rng(t), 2 if overlap else 1
    for start in range(2 * ratio + 2):
        pos = ints(start, start + 1, ratio - 1)
        n_valid = ints(t, rng.integers(0, t + 1), t - 1)
        closed = (pos + n_valid) // ratio - pos // ratio
        rings, angle = (3, halves * ratio, halves * d), rng.uniform(-7, 7, (3, -(-t // ratio), half))
        inputs = {
            "kv": poison(normal(rng, 3, t, halves * d), n_valid), "pos": pos, "n_valid": n_valid,
            "gate": poison(normal(rng, 3, t, halves * d), n_valid),
            "kv_ring": normal(rng, *rings), "gate_ring": normal(rng, *rings),
            "cos": poison(np.cos(angle).astype(np.float32), closed),
            "sin": poison(np.sin(angle).astype(np.float32), closed), "entries": normal(rng, 3, 40, d),
        }  # fmt: skip
        with np.errstate(invalid="ignore"):  # of the rows that stay open
            found = closing(*shape).check(inputs, tolerance=1e-6)["entries"]
        assert np.isfinite(found).all()
        rows = np.arange(40)[None]
        kept = (rows < (pos // ratio)[:, None]) | (rows >= ((pos + n_valid) // ratio)[:, None])
        np.testing.assert_array_equal(found[kept], inputs["entries"][kept])


# ---------------------------------------------------------------------------------- hyper-connections


@functools.cache
def border(n: int, d: int, iters: int, bf16: bool, given: bool = False) -> Case:
    """With `given` the streams are collapsed by weights from outside, and those of the mix are results."""
    c, rows = Case(), n * (2 + n)
    x, y = c.f32("x", B, T, n, d), c.f32("y", B, T, d)
    post, comb = c.f32("post", B, T, n), c.f32("comb", B, T, n, n)
    parameters = (
        c.weight("fn", rows, n * d, scale=(n * d) ** -0.5, bf16=bf16), c.weight("base", rows),
        c.weight("scale", 3), c.weight("w", d), *([c.f32("pre", B, T, n)] if given else []),
    )  # fmt: skip
    attrs = {"eps": 1e-6, "norm_eps": 1e-6, "iters": iters, "out_eps": 1e-5}
    c.multi("hc_pre", x, *parameters, outs=("y", "post", "comb", "pre"), **attrs)
    outs = ("z", "y2", "post2", "comb2", "pre2")
    c.multi("hc_post_pre", x, y, post, comb, *parameters, outs=outs, **attrs)
    return c


def streams(rng: np.random.Generator, b: int, t: int, n: int, d: int) -> dict[str, Arr]:
    found = {"x": normal(rng, b, t, n, d), "y": normal(rng, b, t, d), "post": normal(rng, b, t, n)}
    comb = rng.uniform(0, 1, (b, t, n, n)).astype(np.float32)
    return found | {"comb": comb, "pre": normal(rng, b, t, n)}


SHAPES = [(4, 96, 20, False), (4, 7, 20, True), (2, 5, 3, False), (1, 16, 1, True), (3, 33, 2, False),
          (4, 720, 20, True)]  # fmt: skip


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_borders(shape: tuple[int, int, int, bool], given: bool) -> None:
    n, d, _, _ = shape
    for b, t in SIZES:
        inputs = streams(np.random.default_rng(t), b, t, n, d)
        found = border(*shape, given).check(inputs)
        assert ("pre" in found) == ("pre2" in found) == given


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_weights_from_outside_change_only_what_is_collapsed(shape: tuple[int, int, int, bool]) -> None:
    """Those of the mix itself, fed back, give what the border without any gives, bit for bit."""
    n, d, _, _ = shape
    inputs = streams(np.random.default_rng(5), 2, 5, n, d)
    other = border(*shape, True).run(inputs)
    for outer, name in (("pre", ""), ("pre2", "2")):
        want = border(*shape).run(inputs)
        found = border(*shape, True).run(inputs | {"pre": other[outer]})
        assert not np.array_equal(other[f"y{name}"], found[f"y{name}"])
        for part in ("y", "post", "comb"):
            np.testing.assert_array_equal(found[part + name], want[part + name], err_msg=part + name)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]])
def test_a_token_of_a_border_does_not_depend_on_its_neighbours(
    shape: tuple[int, int, int, bool], given: bool
) -> None:
    """Bit for bit, for a projection on one thread and for one that a single token spreads over threads."""
    n, d, iters, bf16 = shape
    assert BorderShape(n, d, bf16, 1e-6, 1e-6, iters, 1e-5).spread == (shape is SHAPES[-1])
    whole = streams(np.random.default_rng(1), 2, 3, n, d)
    together = border(*shape, given).run(whole)
    dirty = border(*shape, given).run({k: poison(v, ints(1, 3)) for k, v in whole.items()})
    for name, want in together.items():
        alone = border(*shape, given).run({k: v[1:, 2:] for k, v in whole.items()})[name]
        np.testing.assert_array_equal(alone[0, 0], want[1, 2], err_msg=name)
        mask = valid_rows(ints(1, 3), 3)
        np.testing.assert_array_equal(dirty[name][mask], want[mask], err_msg=name)


# ---------------------------------------------------------------------------------------- small ones


@functools.cache
def unfused(d: int) -> Case:
    c = Case()
    x, y = c.f32("x", B, T, d), c.f32("y", B, T, d)
    c.op("clamp", x, low=-float("inf"), high=0.5, out="upper")
    c.op("clamp", x, low=-0.5, high=0.25, out="both")
    c.op("swiglu", x, y)
    c.multi("add_route", c.i32("ids", B, T, 3), c.f32("g", B, T, 3), outs=("more", "weights"), expert=9)
    return c


@pytest.mark.parametrize("d", [1, 40])
def test_unfused(d: int) -> None:
    for b, t in SIZES:
        rng = np.random.default_rng(t)
        unfused(d).check({
            "x": normal(rng, b, t, d), "y": normal(rng, b, t, d), "g": normal(rng, b, t, 3),
            "ids": rng.integers(0, 9, (b, t, 3)),
        })  # fmt: skip


@functools.cache
def index(heads: int, d: int, ratio: int, k: int) -> Case:
    c = Case()
    operands = c.f32("q", B, T, heads, d), c.f32("w", B, T, heads), c.f32("keys", B, CTX // 4, d)
    scores = c.op("index_scores", *operands, c.i32("pos", B), c.i32("n", B), ratio=ratio)
    c.op("index_topk", scores, k=k)
    return c


@pytest.mark.parametrize("shape", [(3, 16, 4, 5), (1, 7, 2, 1), (8, 32, 16, 12)])
def test_index(shape: tuple[int, int, int, int]) -> None:
    heads, d, _, _ = shape
    for b, t in SIZES:
        rng = np.random.default_rng(t)
        inputs = {
            "q": normal(rng, b, t, heads, d), "w": normal(rng, b, t, heads), "keys": normal(rng, b, 12, d),
            "pos": rng.integers(0, 12, b), "n": ints(*[t, 0, t // 2][:b]),
        }  # fmt: skip
        found, want = index(*shape).run(inputs), index(*shape).meaning(inputs)
        hidden = np.isneginf(want["index_scores"])
        np.testing.assert_array_equal(np.isneginf(found["index_scores"]), hidden)
        np.testing.assert_allclose(found["index_scores"][~hidden], want["index_scores"][~hidden], atol=1e-4)
        np.testing.assert_array_equal(found["index_topk"], want["index_topk"])


def test_index_ties_go_to_the_lower_entry() -> None:
    c = Case()
    c.op("index_topk", c.f32("s", B, T, 9), k=4)
    scores = np.array([[[1, 3, -np.inf, 3, 1, 3, -5, 0, 1], [-np.inf] * 8 + [-7]]], np.float32)
    assert c.run({"s": scores})["index_topk"].tolist() == [[[1, 3, 5, 0], [8, -1, -1, -1]]]
