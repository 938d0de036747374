"""Kernels of the reference's numerics against their meaning, bit for bit wherever the sums are exact."""

from __future__ import annotations

import numpy as np
import pytest
from support import Arr, B, Case, T, ints, normal, poison, valid_rows
from test_kernels_attention import CAPACITY, calls, selection, stale, visible

from dsv4c.ir.dtypes import bf16_to_f32

EVERY_BF16 = bf16_to_f32(np.arange(0x7F80, dtype=np.uint16))
"""Every finite number that is not negative."""


def awkward(rng: np.random.Generator, *shape: int) -> Arr:
    """Zeros, ties, subnormal codes, blocks far apart in size, and noise."""
    x = normal(rng, *shape) * np.exp2(rng.integers(-20, 20, (*shape[:-1], 1)))
    x = np.where(rng.random(shape) < 0.3, np.rint(x * 4) / 4, x)
    x = np.where(rng.random(shape) < 0.1, x * np.float32(2**-9), x)
    x[0, 0] = 0
    x[0, 1, ..., :3] = [1e-30, -1e-38, 448]
    return np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize(
    ("rule", "d", "block", "channels"),
    [
        ("bf16", 37, 0, 0), ("bf16", 40, 0, 17), ("e4m3", 256, 128, 0), ("e4m3", 192, 64, 128),
        ("e4m3", 50, 16, 0), ("e4m3", 20, 0, 0), ("e2m1", 128, 32, 0), ("e2m1", 40, 32, 36),
        ("int8", 96, 0, 0), ("int8", 96, 40, 50), ("e4m3", 96, 32, 0), ("e2m1_e4m3", 96, 16, 0),
        ("e2m1_e4m3", 40, 16, 36),
    ],
)  # fmt: skip
def test_round_values(heads: int | None, rule: str, d: int, block: int, channels: int) -> None:
    c, lead = Case(), (B, T) if heads is None else (B, T, heads)
    c.op("round_values", c.f32("x", *lead, d), rule=rule, block=block, channels=channels)
    rng = np.random.default_rng(3)
    for sizes in ((2, 5), (1, 2)):
        shape = (*sizes, d) if heads is None else (*sizes, heads, d)
        found = c.check({"x": awkward(rng, *shape)}, 0)["round_values"]
        assert np.isfinite(found).all()
    with_nan = awkward(rng, 2, 4, *shape[2:])
    with_nan[1, 2:] = np.nan
    found = c.run({"x": with_nan})["round_values"]
    np.testing.assert_array_equal(found[:1], c.meaning({"x": with_nan})["round_values"][:1])


def test_round_values_of_every_bf16() -> None:
    """As the amax of a block of its own, for scales, and as a value among a fixed amax, for codes."""
    for rule, top in (("e4m3", 448), ("e2m1", 6), ("e2m1_e4m3", 6), ("int8", 127)):
        c = Case()
        c.op("round_values", c.f32("x", B, T, 2), rule=rule, block=2)
        x = np.stack([EVERY_BF16, -EVERY_BF16 / 3], axis=-1)[None]
        fixed = np.stack([np.minimum(EVERY_BF16, top), np.full(len(EVERY_BF16), top)], axis=-1)[None]
        for rows in (x[:, EVERY_BF16 < 1e38], fixed):
            c.check({"x": rows.astype(np.float32)}, 0)


@pytest.mark.parametrize("heads", [None, 5])
@pytest.mark.parametrize("d", [1, 2, 32, 128])
def test_hadamard(heads: int | None, d: int) -> None:
    c, lead = Case(), (B, T) if heads is None else (B, T, heads)
    c.op("hadamard", c.f32("x", *lead, d))
    shape = (2, 3, d) if heads is None else (2, 3, heads, d)
    c.check({"x": normal(np.random.default_rng(0), *shape)}, 1e-6)


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("d", [16, 64, 192])
def test_unit_norm_in_bf16_steps(heads: int | None, d: int) -> None:
    """Quarters below 5 have exact sums, so every step rounds alike."""
    c, lead = Case(), (B, T) if heads is None else (B, T, heads)
    c.op("unit_norm", c.f32("x", *lead, d), eps=1e-6, rounding="reference")
    shape = (3, 7, d) if heads is None else (3, 7, heads, d)
    x = np.random.default_rng(1).integers(-20, 20, shape).astype(np.float32) / 4
    c.check({"x": x}, 0)
    exact = Case()
    exact.op("unit_norm", exact.f32("x", *lead, d), eps=1e-6)
    assert np.abs(exact.run({"x": x})["unit_norm"] - c.run({"x": x})["unit_norm"]).max() > 1e-3


def closer(found: Arr, want: Arr, other: Arr) -> None:
    """The kernel is much nearer to its own meaning than rounding is to none (single roundings may flip)."""
    off, apart = (np.sqrt(np.mean((x.astype(np.float64) - want) ** 2)) for x in (found, other))
    print(f"off by {off:.2e}, roundings are worth {apart:.2e}")
    assert off < 0.1 * apart + 1e-6


@pytest.mark.parametrize("t", [1, 5, 23])
@pytest.mark.parametrize(
    "shape", [(3, 40, 8, 0, 0), (5, 24, 70, 4, 0), (2, 32, 100, 1, 9), (4, 16, 60, 2, 0)]
)
def test_attention_in_blocks(shape: tuple[int, int, int, int, int], t: int) -> None:
    """Windows that are full and not, and entries in the block of the window and in ones of their own."""
    heads, d, window, ratio, k = shape
    cases = []
    for rounding in ("reference", "none"):
        c = Case()
        _, pos_, n_valid_ = c.step()
        operands = [c.f32("q", B, T, heads, d), c.f32("kv", B, T, d), c.f32("ring", B, window, d)]
        operands += [c.weight("sinks", heads), pos_, n_valid_]
        operands += [c.f32("entries", B, CAPACITY * 6, d)] if ratio else []
        operands += [c.i32("selected", B, T, k)] if k else []
        c.op("attention", *operands, scale=d**-0.5, window=window, ratio=ratio, rounding=rounding)
        cases.append(c)
    for pos, n_valid in [*calls(window, t)[:4], (ints(window + 3, 50, 0), ints(t, 0, t // 2))]:
        rng = np.random.default_rng(t)
        inputs = {
            "tokens": np.zeros((3, t)), "pos": pos, "n_valid": n_valid,
            "q": poison(normal(rng, 3, t, heads, d) * 2, n_valid),
            "kv": poison(normal(rng, 3, t, d), n_valid),
            "ring": stale(normal(rng, 3, window, d), pos - window, pos),
        }  # fmt: skip
        if ratio:
            entries = normal(rng, 3, CAPACITY * 6, d)
            inputs["entries"] = stale(entries, 0 * pos, visible(pos, n_valid, ratio))
        if k:
            inputs["selected"] = selection(rng, pos, t, ratio, k)
        found = cases[0].run(inputs)["attention"]
        assert np.isfinite(found).all()
        closer(found, cases[0].meaning(inputs)["attention"], cases[1].meaning(inputs)["attention"])


@pytest.mark.parametrize(("heads", "d", "ratio", "k"), [(3, 16, 4, 5), (17, 8, 1, 3), (1, 4, 2, 40)])
@pytest.mark.parametrize("t", [1, 9, 40])
@pytest.mark.parametrize("how", ["by score", "by id", "in blocks", "in blocks by id", "apart", "apart by id"])
def test_index_select_in_order(heads: int, d: int, ratio: int, k: int, t: int, how: str) -> None:
    """Small integers: dot products are exact, BF16 rounds the larger scores, and many entries tie.

    As one op, among blocks, and as scores and their best with blocks between.
    """
    c, ascending = Case(), how.endswith("id")
    _, pos_, n_valid_ = c.step()
    operands = [c.f32("q", B, T, heads, d), c.f32("weights", B, T, heads), c.f32("keys", B, CAPACITY, d)]
    operands += [pos_, n_valid_]
    if how.startswith("apart"):
        scores = c.op("index_scores", *operands, ratio=ratio, rounding="reference")
        del c.module.outputs["index_scores"]
        c.op("index_topk", scores, k=k, ascending=ascending)
    else:
        attrs = {"ratio": ratio, "k": k, "rounding": "reference", "ascending": ascending}
        if how.startswith("in"):
            operands.append(c.i32("blocks", B, T, 3))
            attrs["size"] = 2
        c.op("index_select", *operands, **attrs)
    rng = np.random.default_rng(t)
    for pos, n_valid in calls(ratio * 2, t)[:6]:
        pos = np.minimum(pos, CAPACITY * ratio - t).clip(0)
        n_valid = np.minimum(n_valid, CAPACITY * ratio - pos).astype(np.int32)
        c.check({
            "tokens": np.zeros((3, t)), "pos": pos, "n_valid": n_valid,
            "q": poison(rng.integers(-9, 10, (3, t, heads, d)).astype(np.float32), n_valid),
            "weights": poison(rng.integers(-9, 10, (3, t, heads)).astype(np.float32), n_valid),
            "keys": stale(rng.integers(-9, 10, (3, CAPACITY, d)).astype(np.float32), 0 * pos,
                          visible(pos, n_valid, ratio)),
            "blocks": np.sort(rng.permuted(np.tile(np.arange(-1, 5), (3, t, 1)), axis=2)[..., :3]),
        })  # fmt: skip


@pytest.mark.parametrize(("rounding", "block"), [("bf16", 128), ("e4m3", 128), ("e4m3", 32), ("e4m3", 0)])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("experts", "d", "inner", "topk"), [(4, 40, 24, 2), (7, 16, 200, 3), (1, 33, 16, 1)])
def test_expert_mlp_rounded(
    rounding: str, block: int, bf16: bool, experts: int, d: int, inner: int, topk: int
) -> None:
    cases = []
    for how in (rounding, "none"):
        c = Case()
        _, _, n_valid_ = c.step()
        operands = [c.f32("x", B, T, d), c.i32("ids", B, T, topk), c.f32("weights", B, T, topk), n_valid_]
        operands.append(c.weight("w13", experts, 2 * inner, d, bf16=bf16, scale=d**-0.5))
        operands.append(c.weight("w2", experts, d, inner, bf16=bf16, scale=inner**-0.5))
        c.op("expert_mlp", *operands, limit=2.0, rounding=how, block=block)
        cases.append(c)
    rng = np.random.default_rng(5)
    for t, n_valid in ((1, ints(1, 1)), (9, ints(9, 4)), (5, ints(0, 3))):
        inputs = {
            "tokens": np.zeros((2, t)), "pos": ints(0, 0), "n_valid": n_valid,
            "x": poison(normal(rng, 2, t, d) * 2, n_valid),
            "ids": rng.permuted(np.tile(np.arange(experts), (2, t, 1)), axis=2)[..., :topk],
            "weights": poison(rng.random((2, t, topk)).astype(np.float32), n_valid),
        }  # fmt: skip
        real = valid_rows(n_valid, t)
        found = cases[0].run(inputs)["expert_mlp"]
        assert not found[~real].any(), "padding gets 0"
        want, other = (case.meaning(inputs)["expert_mlp"] for case in cases)
        closer(found[real], want[real], other[real])
