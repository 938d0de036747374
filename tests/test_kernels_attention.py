"""Sparse attention, index selection and the compressor: kernels against their meaning at every border."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from support import Arr, B, Case, T, ints, normal, poison

CAPACITY = 48


def calls(border: int, t: int) -> list[tuple[Arr, Arr]]:
    """(pos, n_valid) of three rows, with pos at every offset around `border` and its double."""
    rng = np.random.default_rng(border * 100 + t)
    starts = sorted({0, 1, *range(max(0, border - 2), border + 3), *range(2 * border - 1, 2 * border + 2)})
    out = []
    for start in starts:
        pos = ints(start, start // 2, max(0, border * 2 - 1 - start % border))
        out.append((pos, ints(t, int(rng.integers(0, t + 1)), t - 1)))
    return out


def stale(array: Arr, first: Arr, last: Arr) -> Arr:
    """A ring or a list of entries whose never written slots hold NaN: positions first..last-1 are real."""
    out = np.full_like(array, np.nan)
    for b in range(len(array)):
        for p in range(max(0, int(first[b])), int(last[b])):
            out[b, p % array.shape[1]] = array[b, p % array.shape[1]]
    return out


def visible(pos: Arr, n_valid: Arr, ratio: int) -> Arr:
    return (pos + n_valid) // ratio


# -------------------------------------------------------------------------------------- attention

SHAPES = [
    (3, 40, 8, 0, 0),
    (17, 24, 5, 4, 0),
    (16, 16, 8, 4, 3),
    (33, 7, 3, 2, 5),
    (1, 20, 1, 16, 0),
    (2, 8, 40, 4, 2),
]
"""(heads, width, window, ratio or 0 for a window only, selected entries or 0 for all)."""


@functools.cache
def attention(heads: int, d: int, window: int, ratio: int, k: int) -> Case:
    c = Case()
    _, pos, n_valid = c.step()
    operands = [c.f32("q", B, T, heads, d), c.f32("kv", B, T, d), c.f32("ring", B, window, d)]
    operands += [c.weight("sinks", heads), pos, n_valid]
    operands += [c.f32("entries", B, CAPACITY, d)] if ratio else []
    operands += [c.i32("selected", B, T, k)] if k else []
    c.op("attention", *operands, scale=d**-0.5, window=window, ratio=ratio)
    return c


def selection(rng: np.random.Generator, pos: Arr, t: int, ratio: int, k: int) -> Arr:
    """Any min(k, visible) entries per token, in any order, and -1 behind."""
    out = np.full((len(pos), t, k), -1, np.int32)
    for b, i in np.ndindex(len(pos), t):
        count = (pos[b] + i + 1) // ratio
        chosen = rng.permutation(count)[:k]
        out[b, i, : len(chosen)] = chosen
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1, 2, 5, 17, 40])
def test_attention(shape: tuple[int, int, int, int, int], t: int) -> None:
    heads, d, window, ratio, k = shape
    case = attention(*shape)
    for pos, n_valid in calls(window, t) + (calls(ratio, t) if ratio and t < 17 else []):
        rng = np.random.default_rng(t)
        inputs = {
            "tokens": np.zeros((3, t)), "pos": pos, "n_valid": n_valid,
            "q": poison(normal(rng, 3, t, heads, d) * 2, n_valid),
            "kv": poison(normal(rng, 3, t, d), n_valid),
            "ring": stale(normal(rng, 3, window, d), pos - window, pos),
        }  # fmt: skip
        if ratio:
            inputs["entries"] = stale(normal(rng, 3, CAPACITY, d), 0 * pos, visible(pos, n_valid, ratio))
        if k:
            inputs["selected"] = selection(rng, pos, t, ratio, k)
        found = case.check(inputs)["attention"]
        assert np.isfinite(found).all(), f"garbage leaks at pos {pos}, n_valid {n_valid}"


@pytest.mark.parametrize("shape", [(16, 16, 8, 4, 3), (11, 8, 6, 0, 0), (3, 40, 8, 0, 0)])
def test_a_token_alone_is_what_it_is_beside_others(shape: tuple[int, int, int, int, int]) -> None:
    """Bit for bit; a single token of few heads stays on the calling thread."""
    heads, d, window, ratio, k = shape
    case, rng, pos = attention(*shape), np.random.default_rng(3), ints(21, 2, 9)
    inputs = {
        "tokens": np.zeros((3, 1)), "pos": pos, "n_valid": ints(1, 1, 1), "q": normal(rng, 3, 1, heads, d),
        "kv": normal(rng, 3, 1, d), "ring": normal(rng, 3, window, d),
    }  # fmt: skip
    if ratio:
        inputs |= {"entries": normal(rng, 3, CAPACITY, d), "selected": selection(rng, pos, 1, ratio, k)}
    together = case.check(inputs)["attention"]
    for b in range(3):
        alone = case.check({name: x[b : b + 1] for name, x in inputs.items()})["attention"]
        np.testing.assert_array_equal(alone, together[b : b + 1])


def test_attention_with_extreme_logits() -> None:
    """The running maximum starts at the sink: logits of a thousand neither overflow nor vanish."""
    case = attention(3, 40, 8, 0, 0)
    rng = np.random.default_rng(0)
    q, kv, ring = normal(rng, 1, 20, 3, 40) * 300, normal(rng, 1, 20, 40) * 3, normal(rng, 1, 8, 40) * 3
    inputs = {
        "tokens": np.zeros((1, 20)),
        "pos": ints(9),
        "n_valid": ints(20),
        "q": q,
        "kv": kv,
        "ring": ring,
    }
    case.check(inputs, tolerance=2e-3)  # exp of a rounded logit near 1000 carries 1e-4 of it


# ---------------------------------------------------------------------------------- index selection


@functools.cache
def select(heads: int, d: int, ratio: int, k: int) -> Case:
    c = Case()
    _, pos, n_valid = c.step()
    operands = (c.f32("q", B, T, heads, d), c.f32("w", B, T, heads), c.f32("keys", B, CAPACITY, d))
    c.op("index_select", *operands, pos, n_valid, ratio=ratio, k=k)
    return c


def check_selection(case: Case, inputs: dict[str, Any]) -> Arr:
    """The same set of ids as the meaning's, every id once, and -1 behind the last."""
    with np.errstate(invalid="ignore"):
        want = case.meaning(inputs)["index_select"]
    found = case.run(inputs)["index_select"]
    np.testing.assert_array_equal(np.sort(found, axis=-1), np.sort(want, axis=-1))
    missing = found < 0
    assert (np.diff(missing.astype(int), axis=-1) >= 0).all(), "missing ids stand at the end"
    return found


@pytest.mark.parametrize(
    "shape", [(2, 32, 4, 3), (17, 8, 4, 5), (16, 16, 2, 1), (33, 12, 1, 8), (64, 7, 4, 40)]
)
@pytest.mark.parametrize("t", [1, 3, 40])
def test_index_select(shape: tuple[int, int, int, int], t: int) -> None:
    heads, d, ratio, k = shape
    for pos, n_valid in calls(ratio * k if ratio * k < 80 else 16, t):
        pos = np.minimum(pos, CAPACITY * ratio - t)
        rng = np.random.default_rng(t)
        inputs = {
            "tokens": np.zeros((3, t)), "pos": pos, "n_valid": n_valid,
            "q": poison(normal(rng, 3, t, heads, d), n_valid), "w": poison(normal(rng, 3, t, heads), n_valid),
            "keys": stale(normal(rng, 3, CAPACITY, d), 0 * pos, visible(pos, n_valid, ratio)),
        }  # fmt: skip
        check_selection(select(*shape), inputs)


@pytest.mark.parametrize("shape", [(2, 32, 4, 3), (17, 8, 4, 5), (33, 12, 1, 8)])
def test_exact_ties_go_to_the_lower_id(shape: tuple[int, int, int, int]) -> None:
    """Small integers: scores are exact, tie often, are often negative, and are 0.0 as well as -0.0."""
    heads, d, ratio, _ = shape
    for seed in range(8):
        rng = np.random.default_rng(seed)
        pos = np.minimum(ints(30, 100, 150), CAPACITY * ratio - 5)
        sparse = rng.uniform(size=(3, 5, heads, d)) < 0.2
        inputs = {
            "tokens": np.zeros((3, 5)), "pos": pos, "n_valid": ints(5, 5, 5),
            "q": (rng.integers(-1, 2, sparse.shape) * sparse).astype(np.float32),
            "w": rng.integers(-1, 2, (3, 5, heads)).astype(np.float32),
            "keys": rng.integers(-1, 2, (3, CAPACITY, d)).astype(np.float32),
        }  # fmt: skip
        check_selection(select(*shape), inputs)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_zero_and_minus_zero_tie(sign: float) -> None:
    """Every score is 0; those of even entries come as products of 0.0 and -1."""
    heads, d, ratio, k = 2, 32, 4, 3
    keys = np.zeros((1, CAPACITY, d), np.float32)
    keys[:, ::2] = -1.0
    q = np.ones((1, 1, heads, d), np.float32)
    w = np.full((1, 1, heads), -sign, np.float32)
    inputs = {"tokens": np.zeros((1, 1)), "pos": ints(99), "n_valid": ints(1), "q": q, "w": w, "keys": keys}
    assert sorted(check_selection(select(heads, d, ratio, k), inputs)[0, 0].tolist()) == [0, 1, 2]


# ------------------------------------------------------------------------------------- compressor


@functools.cache
def compressor(ratio: int, width: int, overlap: bool) -> Case:
    c = Case()
    halves = 2 if overlap else 1
    channels = halves * width
    _, pos, n_valid = c.step()
    kv, gate = c.f32("kv", B, T, channels), c.f32("gate", B, T, channels)
    rings = [c.f32(n, B, halves * ratio, channels) for n in ("kv_ring", "gate_ring")]
    c.op("compress", kv, gate, *rings, pos, n_valid, ratio=ratio, overlap=overlap)
    c.op("position_bias", gate, c.weight("ape", ratio, channels), pos)
    return c


@pytest.mark.parametrize(
    "shape", [(4, 40, True), (4, 7, True), (16, 24, False), (1, 16, False), (3, 5, True)]
)
@pytest.mark.parametrize("t", [1, 2, 4, 9, 40])
def test_compressor(shape: tuple[int, int, bool], t: int) -> None:
    ratio, width, overlap = shape
    halves = 2 if overlap else 1
    channels = halves * width
    for pos, n_valid in calls(ratio, t):
        rng = np.random.default_rng(t)
        rings = {
            name: stale(normal(rng, 3, halves * ratio, channels), pos - halves * ratio, pos)
            for name in ("kv_ring", "gate_ring")
        }
        kv, gate = normal(rng, 3, t, channels), normal(rng, 3, t, channels) * 3
        inputs = {"tokens": np.zeros((3, t)), "pos": pos, "n_valid": n_valid, **rings,
                  "kv": poison(kv, n_valid), "gate": poison(gate, n_valid)}  # fmt: skip
        with np.errstate(invalid="ignore"):
            want, found = compressor(*shape).meaning(inputs), compressor(*shape).run(inputs)
        assert np.isfinite(found["compress"]).all(), f"garbage leaks at pos {pos}, n_valid {n_valid}"
        np.testing.assert_allclose(found["compress"], want["compress"], rtol=1e-4, atol=1e-5)
        mask = np.arange(t)[None] < n_valid[:, None]
        np.testing.assert_allclose(
            found["position_bias"][mask], want["position_bias"][mask], rtol=1e-5, atol=1e-5
        )
