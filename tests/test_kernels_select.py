"""Index selection of V4.1: candidate blocks, and selection within them; kernels against their meaning."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support import CTX, Arr, B, Case, T, ints, normal, poison, valid_rows
from test_kernels_attention import calls, stale, visible

CAPACITY = 45
"""Entries there is room for; no multiple of a block."""

SHAPES = [
    (1, 7, 2, 3, 1, 2),
    (2, 32, 1, 8, 4, 5),
    (3, 9, 2, 5, 3, 4),
    (17, 8, 1, 1, 8, 1),
    (32, 16, 2, 8, 4, 3),
    (33, 12, 1, 40, 8, 4),
    (2, 5, 1, 2, 1, 44),
]
"""(heads, width, ratio, selected entries, entries of a block, blocks)."""


@functools.cache
def chains(heads: int, d: int, ratio: int, k: int, size: int, count: int) -> Case:
    """Two layers, of which the second keeps to candidates of the first: in fused ops and in single ones."""
    c = Case()
    _, pos, n_valid = c.step()
    keys = c.f32("keys", B, CTX, d)
    first, second = ((c.f32(f"q{i}", B, T, heads, d), c.f32(f"w{i}", B, T, heads), keys, pos, n_valid)
                     for i in "12")  # fmt: skip
    outs, block = ("ids", "blocks"), {"ratio": ratio, "size": size, "count": count}
    blocks = c.multi("index_candidates", *first, outs=outs, k=k, **block).results[1]
    c.op("index_select", *second, blocks, ratio=ratio, k=k, size=size, out="restricted")
    scores = c.op("index_scores", *first, ratio=ratio, out="scores")
    c.op("index_topk", scores, k=k, out="ids apart")
    blocks = c.op("candidate_blocks", scores, pos, n_valid, **block, out="blocks apart")
    scores = c.op("index_scores", *second, ratio=ratio, out="scores2")
    scores = c.op("index_restrict", scores, blocks, size=size, out="scores within")
    c.op("index_topk", scores, k=k, out="restricted apart")
    return c


def check_chains(case: Case, inputs: dict[str, Arr]) -> dict[str, Arr]:
    """Every output is that of the meaning; selections as sets, which fused kernels give in ascending ids."""
    with np.errstate(invalid="ignore"):
        want = case.meaning(inputs)
    found = case.run(inputs)
    for name in ("blocks", "blocks apart", "ids apart", "restricted apart"):
        np.testing.assert_array_equal(found[name], want[name], err_msg=name)
    for name in ("ids", "restricted"):
        np.testing.assert_array_equal(np.sort(found[name]), np.sort(want[name]), err_msg=name)
        np.testing.assert_array_equal(np.sort(found[name]), np.sort(found[f"{name} apart"]), err_msg=name)
    for name in ("scores", "scores2", "scores within"):
        hidden = np.isneginf(want[name])
        np.testing.assert_array_equal(np.isneginf(found[name]), hidden, err_msg=name)
        np.testing.assert_allclose(found[name][~hidden], want[name][~hidden], atol=1e-4, err_msg=name)
    for name in ("ids", "restricted", "blocks"):
        behind = np.where(found[name] < 0, np.int32(1 << 30), found[name])
        gap = np.diff(behind, axis=-1)
        assert ((gap > 0) | (behind[..., 1:] == 1 << 30)).all(), (
            f"{name} do not ascend, or -1 is not at the end"
        )
    return found


def queries(rng: np.random.Generator, n_valid: Arr, t: int, heads: int, d: int) -> dict[str, Arr]:
    shapes = {"q1": (heads, d), "q2": (heads, d), "w1": (heads,), "w2": (heads,)}
    return {name: poison(normal(rng, len(n_valid), t, *shape), n_valid) for name, shape in shapes.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1, 3, 24])
def test_candidates_and_what_is_selected_among_them(shape: tuple[int, ...], t: int) -> None:
    """Every pos around the border of a block and around that of the candidates' reach; padding holds NaN."""
    heads, d, ratio, _, size, count = shape
    for border in {ratio * size, min(ratio * size * count, 30)}:
        for pos, n_valid in calls(border, t):
            pos = np.minimum(pos, CAPACITY * ratio - t)
            rng = np.random.default_rng(t + border)
            inputs = {
                "tokens": np.zeros((3, t)), "pos": pos, "n_valid": n_valid,
                "keys": stale(normal(rng, 3, CAPACITY, d), 0 * pos, visible(pos, n_valid, ratio)),
                **queries(rng, n_valid, t, heads, d),
            }  # fmt: skip
            found = check_chains(chains(*shape), inputs)
            assert (found["ids"][~valid_rows(n_valid, t)] == -1).all()
            assert (found["blocks"][~valid_rows(n_valid, t)] == -1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_of_entries_and_of_blocks_go_to_the_lower_id(shape: tuple[int, ...]) -> None:
    """Small integers: scores are exact, tie often, are often negative, and are 0.0 as well as -0.0."""
    heads, d, ratio, *_ = shape
    for seed in range(6):
        rng = np.random.default_rng(seed)
        pos = np.minimum(ints(20, 41, 88), CAPACITY * ratio - 5)
        inputs = {"tokens": np.zeros((3, 5)), "pos": pos, "n_valid": ints(5, 5, 5),
                  "keys": rng.integers(-1, 2, (3, CAPACITY, d)).astype(np.float32)}  # fmt: skip
        for i in "12":
            sparse = rng.uniform(size=(3, 5, heads, d)) < 0.2
            inputs[f"q{i}"] = (rng.integers(-1, 2, sparse.shape) * sparse).astype(np.float32)
            inputs[f"w{i}"] = rng.integers(-1, 2, (3, 5, heads)).astype(np.float32)
        check_chains(chains(*shape), inputs)


def test_where_every_score_is_zero_the_first_are_taken_and_the_newest_block() -> None:
    """41 entries in blocks of four: the eleventh has the newest."""
    heads, d, ratio, k, size, count = SHAPES[1]
    rng = np.random.default_rng(0)
    zeros = {name: value * 0 for name, value in queries(rng, ints(1), 1, heads, d).items()}
    inputs = {"tokens": np.zeros((1, 1)), "pos": ints(40), "n_valid": ints(1), **zeros,
              "keys": normal(rng, 1, CAPACITY, d)}  # fmt: skip
    found = check_chains(chains(heads, d, ratio, k, size, count), inputs)
    assert found["blocks"].tolist() == [[[0, 1, 2, 3, 10]]] and found["ids"].tolist() == [[list(range(k))]]
    assert found["restricted"].tolist() == [[list(range(k))]]


def test_capacity_does_not_matter() -> None:
    """Bit for bit: room for more entries, and other numbers in it."""
    shape, rng = SHAPES[4], np.random.default_rng(3)
    n_valid = ints(2, 3, 0)
    inputs = {"tokens": np.zeros((3, 3)), "pos": ints(50, 33, 7), "n_valid": n_valid,
              **queries(rng, n_valid, 3, *shape[:2]), "keys": normal(rng, 3, CAPACITY, shape[1])}  # fmt: skip
    roomy = inputs | {
        "keys": np.concatenate([inputs["keys"], np.full((3, 9, shape[1]), 1e30, np.float32)], 1)
    }
    want, found = chains(*shape).run(inputs), chains(*shape).run(roomy)
    for name, value in want.items():
        got = found[name][..., :CAPACITY] if "scores" in name else found[name]
        np.testing.assert_array_equal(got, value, err_msg=name)


# --------------------------------------------------------------------- blocks from anywhere, any scores


@functools.cache
def within(heads: int, d: int, k: int, size: int, count: int) -> Case:
    c = Case()
    _, pos, n_valid = c.step()
    operands = c.f32("q", B, T, heads, d), c.f32("w", B, T, heads), c.f32("keys", B, CTX, d), pos, n_valid
    blocks = c.i32("blocks", B, T, count)
    c.op("index_select", *operands, blocks, ratio=1, k=k, size=size, out="fused")
    scores = c.b.op("index_scores", *operands, ratio=1)
    c.op("index_topk", c.b.op("index_restrict", scores, blocks, size=size), k=k, out="apart")
    return c


@pytest.mark.parametrize(
    ("k", "size", "count"), [(1, 1, 1), (4, 3, 5), (9, 4, 2), (5, 8, 6), (50, 8, 6), (3, 50, 1)]
)
def test_blocks_may_be_visible_in_part_or_not_at_all(k: int, size: int, count: int) -> None:
    case, room = within(3, 8, k, size, count), -(-CAPACITY // size)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        pos, n_valid = rng.integers(0, CAPACITY - 4, 3), ints(4, 2, 3)
        blocks = np.full((3, 4, count), -1, np.int32)
        for b, t in np.ndindex(3, 4):
            listed = np.sort(rng.permutation(room)[: rng.integers(0, count + 1)])
            blocks[b, t, : len(listed)] = listed
        inputs = {"tokens": np.zeros((3, 4)), "pos": pos, "n_valid": n_valid, "blocks": blocks,
                  "q": poison(normal(rng, 3, 4, 3, 8), n_valid), "w": poison(normal(rng, 3, 4, 3), n_valid),
                  "keys": stale(normal(rng, 3, CAPACITY, 8), 0 * pos, pos + n_valid)}  # fmt: skip
        want, found = case.meaning(inputs), case.run(inputs)
        for name in ("fused", "apart"):
            np.testing.assert_array_equal(np.sort(found[name]), np.sort(want[name]), err_msg=name)


@functools.cache
def best_blocks(ratio: int, size: int, count: int) -> Case:
    c = Case()
    scores, pos, n = c.f32("s", B, T, CTX), c.i32("pos", B), c.i32("n", B)
    blocks = c.op("candidate_blocks", scores, pos, n, ratio=ratio, size=size, count=count)
    c.op("index_restrict", scores, blocks, size=size)
    return c


@pytest.mark.parametrize(("ratio", "size", "count"), [(1, 1, 3), (2, 3, 2), (1, 4, 12), (1, 8, 1), (1, 5, 4)])
def test_scores_without_a_number_make_no_candidate(ratio: int, size: int, count: int) -> None:
    """Most scores are -inf, many tie, and behind the visible ones stands anything."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        pos, n = rng.integers(0, CAPACITY - 4, 3), ints(4, 0, 3)
        scores = rng.integers(-3, 3, (3, 4, CAPACITY)).astype(np.float32)
        scores[rng.uniform(size=scores.shape) < 0.8] = -np.inf
        for b, t in np.ndindex(3, 4):
            scores[b, t, (pos[b] + t + 1) // ratio :] = [np.nan, 1e30, -np.inf][seed % 3]
        inputs = {"s": scores, "pos": pos, "n": n}
        want, found = (
            best_blocks(ratio, size, count).meaning(inputs),
            best_blocks(ratio, size, count).run(inputs),
        )
        for name in ("candidate_blocks", "index_restrict"):
            np.testing.assert_array_equal(found[name], want[name], err_msg=name)
