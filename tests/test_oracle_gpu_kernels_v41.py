"""What DeepSeek-V4.1 brings to GPU kernels, in Triton's interpreter; as test_oracle_gpu_kernels.py for V4."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_support import Interpreter, check_case, interpreter, write_draft
from support import CTX, Arr, B, Case, T, ints, normal, poison, valid_rows
from test_kernels_attention import calls, stale, visible
from test_kernels_engram import convolution
from test_kernels_select import CAPACITY, SHAPES, queries
from test_kernels_vision import HEADS, N, attention, merged, router, rows

from dsv4c.ir.dims import sym

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle

TOKEN = 5
"""The image token of the cases of test_kernels_vision.py."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Interpreter]:
    with interpreter() as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "case.dsv4"


# ---------------------------------------------------------------------------------- index selection


@functools.cache
def chains(heads: int, d: int, ratio: int, k: int, size: int, count: int) -> Case:
    """Two layers, of which the second keeps to candidates of the first, or to blocks that are given."""
    c = Case()
    _, pos, n_valid = c.step()
    keys = c.f32("keys", B, CTX, d)
    first, second = ((c.f32(f"q{i}", B, T, heads, d), c.f32(f"w{i}", B, T, heads), keys, pos, n_valid)
                     for i in "12")  # fmt: skip
    block = {"ratio": ratio, "k": k, "size": size}
    blocks = c.multi("index_candidates", *first, outs=("ids", "blocks"), count=count, **block).results[1]
    c.op("index_select", *second, blocks, **block, out="restricted")
    given = c.i32("given", B, T, 3)
    c.op("index_select", *second, given, **block, out="of given")
    return c


def check_chains(case: Case, inputs: dict[str, Arr], worker: Interpreter, path: Path) -> dict[str, Arr]:
    """Ids are those of the meaning, in ascending order, with -1 at the end."""
    with np.errstate(invalid="ignore"):
        want = case.meaning(inputs)
    write_draft(case.module, case.store, path)
    ((found, _),) = worker.run(path, [({n: inputs[n] for n in case.module.inputs}, {})])
    for name in ("ids", "blocks", "restricted", "of given"):
        order = np.sort(np.where(want[name] < 0, 1 << 30, want[name]))
        got = np.where(found[name] < 0, 1 << 30, found[name])
        np.testing.assert_array_equal(got, order, err_msg=name)
    return dict(found)


def some_blocks(rng: np.random.Generator, b: int, t: int, size: int) -> Arr:
    """Up to three blocks a token, ascending with -1 behind them; some are not seen, or reach past the end."""
    drawn = np.argsort(rng.uniform(size=(b, t, -(-CAPACITY // size))))[..., :3]
    found = np.sort(np.where(rng.uniform(size=drawn.shape) < 0.2, 1 << 30, drawn))
    return np.where(found < 1 << 30, found, -1).astype(np.int32)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] in (1, 3, 17, 33)])
@pytest.mark.parametrize("t", [1, 4])
def test_candidates_and_what_is_selected_among_them(
    worker: Interpreter, path: Path, shape: tuple[int, ...], t: int
) -> None:
    """Around the border of a block and that of the candidates' reach; padding holds NaN."""
    heads, d, ratio, _, size, count = shape
    for border in {ratio * size, min(ratio * size * count, 30)}:
        for pos, n_valid in calls(border, t)[::2]:
            pos = np.minimum(pos, CAPACITY * ratio - t)
            rng = np.random.default_rng(t + border)
            inputs = {
                "tokens": np.zeros((3, t), np.int32), "pos": pos, "n_valid": n_valid,
                "keys": stale(normal(rng, 3, CAPACITY, d), 0 * pos, visible(pos, n_valid, ratio)),
                "given": some_blocks(rng, 3, t, size), **queries(rng, n_valid, t, heads, d),
            }  # fmt: skip
            found = check_chains(chains(*shape), inputs, worker, path)
            for name in ("ids", "blocks", "restricted"):
                assert (found[name][~valid_rows(n_valid, t)] == -1).all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] in (2, 3, 33)])
def test_ties_of_entries_and_of_blocks_go_to_the_lower_id(
    worker: Interpreter, path: Path, shape: tuple[int, ...]
) -> None:
    """Small integers: scores are exact, tie often, are often negative, and are 0.0 as well as -0.0."""
    heads, d, ratio, _, size, _ = shape
    for seed in range(2):
        rng = np.random.default_rng(seed)
        pos = np.minimum(ints(20, 41, 88), CAPACITY * ratio - 3)
        inputs = {"tokens": np.zeros((3, 3), np.int32), "pos": pos, "n_valid": ints(3, 3, 3),
                  "keys": rng.integers(-1, 2, (3, CAPACITY, d)).astype(np.float32),
                  "given": some_blocks(rng, 3, 3, size)}  # fmt: skip
        for i in "12":
            sparse = rng.uniform(size=(3, 3, heads, d)) < 0.2
            inputs[f"q{i}"] = (rng.integers(-1, 2, sparse.shape) * sparse).astype(np.float32)
            inputs[f"w{i}"] = rng.integers(-1, 2, (3, 3, heads)).astype(np.float32)
        check_chains(chains(*shape), inputs, worker, path)


def test_selections_longer_than_a_tile(worker: Interpreter, path: Path) -> None:
    """Thousands of entries: ties and chosen blocks on both sides of a step of the selection."""
    shape, room, t = (2, 8, 1, 600, 8, 300), 5000, 2
    rng = np.random.default_rng(3)
    pos = ints(4990, 2500, 700)
    inputs = {
        "tokens": np.zeros((3, t), np.int32), "pos": pos, "n_valid": ints(t, t, 1),
        "keys": rng.integers(-1, 2, (3, room, 8)).astype(np.float32),
        "given": np.tile(np.sort(rng.permutation(620)[:3]), (3, t, 1)).astype(np.int32),
    }  # fmt: skip
    for i in "12":
        inputs[f"q{i}"] = rng.integers(-1, 2, (3, t, 2, 8)).astype(np.float32)
        inputs[f"w{i}"] = rng.integers(-1, 3, (3, t, 2)).astype(np.float32)
    check_chains(chains(*shape), inputs, worker, path)


# ------------------------------------------------------------------------------ compressor, entries


@functools.cache
def pooling(ratio: int, overlap: bool, width: int) -> Case:
    c, twice = Case(), 2 if overlap else 1
    pos, n_valid = c.i32("pos", B), c.i32("n_valid", B)
    rows_ = [c.f32(n, B, T, twice * width) for n in ("kv", "gate")]
    rings = [c.f32(n, B, twice * ratio, twice * width) for n in ("kv_ring", "gate_ring")]
    c.op("compress", *rows_, *rings, pos, n_valid, ratio=ratio, overlap=overlap)
    return c


@pytest.mark.parametrize(("ratio", "overlap"), [(2, False), (1, False), (16, False), (4, True)])
def test_compress(worker: Interpreter, path: Path, ratio: int, overlap: bool) -> None:
    width, t, twice, rng = 24, 11, 2 if overlap else 1, np.random.default_rng(ratio)
    pos = ints(*range(2 * ratio + 2))
    n_valid = ints(*((t, min(ratio - 1, t), 0, 5)[i % 4] for i in range(len(pos))))
    b = len(pos)
    inputs = {n: poison(normal(rng, b, t, twice * width), n_valid) for n in ("kv", "gate")}
    for name in ("kv_ring", "gate_ring"):
        inputs[name] = stale(normal(rng, b, twice * ratio, twice * width), 0 * pos, pos)
    inputs |= {"pos": pos, "n_valid": n_valid}
    found = check_case(pooling(ratio, overlap, width), inputs, worker, path)
    assert np.isfinite(found["compress"]).all()


@functools.cache
def appending(ratio: int, d: int) -> Case:
    """Rows that are a part of wider ones."""
    c = Case()
    _, pos, n_valid = c.step()
    x = c.f32("x", B, (T + (ratio - 1)) // ratio, d + 3)
    part = c.b.multi("split_columns", x, widths=(3, d)).results[1]
    entries = c.state("entries", B, CTX, d)
    c.module.outputs["entries"] = c.b.op("entries_append", entries, part, pos, n_valid, ratio=ratio)
    return c


@pytest.mark.parametrize(("ratio", "d"), [(1, 7), (2, 40), (4, 33)])
def test_entries_append(worker: Interpreter, path: Path, ratio: int, d: int) -> None:
    rng, t = np.random.default_rng(ratio), 9
    pos = ints(*range(2 * ratio + 2))
    n_valid = ints(*((t, 0, 1, 5)[i % 4] for i in range(len(pos))))
    b = len(pos)
    inputs = {
        "tokens": np.zeros((b, t), np.int32), "pos": pos, "n_valid": n_valid,
        "x": normal(rng, b, -(-t // ratio), d + 3), "entries": np.full((b, 30, d), np.nan, np.float32),
    }  # fmt: skip
    check_case(appending(ratio, d), inputs, worker, path, 0)


# ------------------------------------------------------------------------------------------- engram


@pytest.mark.parametrize("shape", [(4, 16, 4, 3, 9), (1, 15, 4, 2, 6), (2, 17, 1, 5, 1), (3, 8, 3, 1, 7)])
def test_norm_and_convolution(worker: Interpreter, path: Path, shape: tuple[int, ...]) -> None:
    n, d, _, _, slots = shape
    rng, t, b = np.random.default_rng(d), 9, 3
    for start in (0, 4, 31):
        n_valid, pos = ints(t, 4, 0), (start + np.arange(b)).astype(np.int32)
        inputs = {
            "tokens": np.zeros((b, t), np.int32), "n_valid": n_valid, "pos": pos,
            "ring": stale(normal(rng, b, slots, n * d), pos - slots, pos),
            "x": poison(normal(rng, b, t, n, d), n_valid), "x2": poison(normal(rng, b, t, n, d), n_valid),
        }  # fmt: skip
        check_case(convolution(*shape), inputs, worker, path, only=valid_rows(n_valid, t))


# ------------------------------------------------------------------------------- images in the text


@pytest.mark.parametrize("d", [1, 40])
@pytest.mark.parametrize("room", [1, 3, 20])
def test_merge_images(worker: Interpreter, path: Path, d: int, room: int) -> None:
    """Fewer and more image tokens than rows, n_images past the room for rows, padding that holds NaN."""
    for b, t in ((1, 1), (3, 13), (2, 150)):
        rng = np.random.default_rng(t + room)
        n_valid, count = rng.integers(0, t + 1, b), rng.integers(0, room + 4, b)
        inputs = {
            "x": poison(normal(rng, b, t, d), n_valid), "tokens": rng.integers(TOKEN - 1, TOKEN + 1, (b, t)),
            "images": poison(normal(rng, b, room, d), np.minimum(count, room)), "n_images": count,
        }  # fmt: skip
        real = valid_rows(n_valid, t)
        found = check_case(merged(d), inputs, worker, path, 0, only=real)["merge_images"]
        assert np.isfinite(found[real]).all()


@pytest.mark.parametrize(("e", "k"), [(1, 1), (5, 5), (64, 6), (33, 7)])
@pytest.mark.parametrize("ties", [False, True])
def test_router_of_images(worker: Interpreter, path: Path, e: int, k: int, ties: bool) -> None:
    rng, b, t = np.random.default_rng(e), 2, 7
    tokens = rng.integers(TOKEN - 1, TOKEN + 2, (b, t))
    scores: Arr = rng.integers(0, 3, (b, t, e)).astype(np.float32) if ties else normal(rng, b, t, e)
    check_case(router(e, k), {"s": scores, "tokens": tokens}, worker, path)


# ------------------------------------------------------------------------------------ image encoder


@pytest.mark.parametrize(("heads", "d"), [h for h in HEADS if h[0] < 20])
def test_full_attention(worker: Interpreter, path: Path, heads: int, d: int) -> None:
    """Patches that end inside a tile of queries and inside one of keys; a factor that makes logits large."""
    for b, n in ((1, 1), (2, 33), (1, 70)) if heads * d < 500 else ((1, 70),):
        rng = np.random.default_rng(n)
        q, k, v = (normal(rng, b, n, heads, d) * factor for factor in (3, 1, 1))
        check_case(attention(heads, d), {"q": q, "k": k, "v": v}, worker, path)


def test_full_attention_reads_parts_of_wider_rows(worker: Interpreter, path: Path) -> None:
    c, heads, d = Case(), 3, 8
    parts = c.b.multi("split_columns", c.f32("x", B, N, 3 * heads * d), widths=(heads * d,) * 3).results
    q, k, v = (c.b.op("split_heads", part, heads=heads) for part in parts)
    y = c.b.op("full_attention", q, k, v, scale=d**-0.5)
    c.op("add_bias", c.b.op("merge_heads", y), c.weight("bias", heads * d))
    check_case(c, {"x": normal(np.random.default_rng(0), 2, 37, 3 * heads * d)}, worker, path)


@pytest.mark.parametrize("quarter", [1, 3, 16])
def test_grid_angles(worker: Interpreter, path: Path, quarter: int) -> None:
    """Of the longest grid that an image may have, and a patch at (0, 0)."""
    c = Case()
    frequencies = np.power(np.float32(10000), -np.arange(quarter, dtype=np.float32) / quarter)
    c.multi("grid_angles", c.i32("p", B, N, 2), c.weight_of("f", frequencies), outs=("cos", "sin"))
    places = np.random.default_rng(quarter).integers(0, 3066, (2, 13, 2)).astype(np.int32)
    places[0, 0] = 0
    check_case(c, {"p": places}, worker, path)


@pytest.mark.parametrize(("d", "k"), [(1, 1), (7, 4), (16, 9), (61, 9)])
def test_rows_of_the_aligner(worker: Interpreter, path: Path, d: int, k: int) -> None:
    """Rows that nothing names hold NaN."""
    for b, n in ((1, 1), (3, 13)):
        rng = np.random.default_rng(n + k)
        inputs = {
            "x": normal(rng, b, n, d) * 2, "cells": rng.integers(-1, n, (b, 1 + n // 2, k)).astype(np.int32),
            "layout": rng.integers(-3, n, (b, 2 * n + 3)).astype(np.int32),
        }  # fmt: skip
        inputs["cells"][0, 0, 0], inputs["layout"][0, :4] = -1, [-1, -2, -3, n - 1]
        if n > 1:
            inputs["x"][0, 3] = np.nan
            inputs["cells"][inputs["cells"] == 3], inputs["layout"][inputs["layout"] == 3] = 2, 2
        check_case(rows(d, k), inputs, worker, path)


def test_gelu_far_from_zero(worker: Interpreter, path: Path) -> None:
    """x itself on the right, 0 on the left, and no NaN at any finite number."""
    x = np.array([[[-1e30, -40, -6, -1e-30, 0.0, 1e-30, 1e-3, 6, 40]]], np.float32)
    c = Case()
    c.op("gelu", c.f32("x", B, sym("N"), 9))
    found = check_case(c, {"x": x}, worker, path)["gelu"]
    np.testing.assert_allclose(found[0, 0, 3:7], [-5e-31, 0, 5e-31, 5.004e-4], rtol=1e-3)
    assert not found[0, 0, :2].any()
