"""What experts and matrices are fed: the kernels against their meaning, over calls, padding and cuts."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support import Arr, B, Case, T, ints, normal, poison

EXPERTS = 5


@functools.cache
def statistics(d: int, inner: int, topk: int, bf16: bool, with_mlp: bool = False) -> Case:
    c = Case()
    x, ids, g = c.f32("x", B, T, d), c.i32("ids", B, T, topk), c.f32("g", B, T, topk)
    n_valid, counts = c.i32("n_valid", B), c.state("counts", EXPERTS, 3)
    w13, w2 = c.weight("w13", EXPERTS, 2 * inner, d, bf16=bf16), c.weight("w2", EXPERTS, d, inner, bf16=bf16)
    if with_mlp:
        c.op("expert_mlp", x, ids, g, n_valid, w13, w2, limit=1.5)
    c.op("expert_statistics", counts, x, ids, g, n_valid, w13, w2, out="counts", limit=1.5)
    return c


def inputs(b: int, t: int, d: int, topk: int, n_valid: Arr) -> dict[str, Arr]:
    rng = np.random.default_rng(t)
    ids = rng.permuted(np.tile(np.arange(EXPERTS), (b, t, 1)), axis=-1)[..., :topk]
    return {
        "x": poison(normal(rng, b, t, d), n_valid), "ids": ids.astype(np.int32), "n_valid": n_valid,
        "g": poison(rng.uniform(0, 1, (b, t, topk)).astype(np.float32), n_valid),
        "counts": rng.integers(0, 9, (EXPERTS, 3)).astype(np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(40, 24, 2, True), (7, 33, 1, False), (65, 56, 3, True), (16, 5, 5, True)])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (1, 6), (2, 3), (3, 13), (1, 40)])
def test_counts_gates_and_norms(shape: tuple[int, int, int, bool], b: int, t: int) -> None:
    d, _, topk, _ = shape
    n_valid = ints(*[t, 0, t // 2][:b])
    given = inputs(b, t, d, topk, n_valid)
    found = statistics(*shape).check(given)["counts"]
    added = found[:, 0] - given["counts"][:, 0]
    assert added.sum() == n_valid.sum() * topk, "padding is not counted"


def test_beside_the_experts_it_changes_nothing_of_theirs() -> None:
    given = inputs(2, 13, 40, 2, ints(13, 4))
    both = statistics(40, 24, 2, True, with_mlp=True)
    found = both.check(given)
    np.testing.assert_array_equal(found["counts"], statistics(40, 24, 2, True).run(given)["counts"])


def test_no_token_at_all() -> None:
    given = inputs(2, 3, 40, 2, ints(0, 0))
    np.testing.assert_array_equal(statistics(40, 24, 2, True).run(given)["counts"], given["counts"])


def test_a_cut_changes_no_count() -> None:
    """Tokens are counted exactly; the sums differ by the rounding of one addition a call."""
    given = inputs(1, 40, 40, 2, ints(40)) | {"counts": np.zeros((EXPERTS, 3), np.float32)}
    case, counts = statistics(40, 24, 2, True), given["counts"]
    for start, stop in ((0, 1), (1, 18), (18, 40)):
        part = {name: given[name][:, start:stop] for name in ("x", "ids", "g")}
        counts = case.run(part | {"n_valid": ints(stop - start), "counts": counts})["counts"]
    whole = case.run(given)["counts"]
    np.testing.assert_array_equal(counts[:, 0], whole[:, 0])
    np.testing.assert_allclose(counts, whole, rtol=1e-6)


# ------------------------------------------------------------------------------------- inputs


@functools.cache
def squares(k: int) -> Case:
    c = Case()
    x, n_valid, sums = c.f32("x", B, T, k), c.i32("n_valid", B), c.state("sums", k)
    c.op("input_statistics", sums, x, n_valid, out="sums")
    return c


@pytest.mark.parametrize("k", [1, 7, 16, 40, 64])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 3), (3, 13)])
def test_squares_of_inputs(k: int, b: int, t: int) -> None:
    rng, n_valid = np.random.default_rng(k), ints(*[t, 0, t // 2][:b])
    x = poison(normal(rng, b, t, k), n_valid)
    given = {"x": x, "n_valid": n_valid, "sums": rng.uniform(0, 9, k).astype(np.float32)}
    found = squares(k).check(given)["sums"]
    added = [np.square(x[row, :n].astype(float)).sum(axis=0) for row, n in enumerate(n_valid)]
    want = given["sums"] + sum(added)
    np.testing.assert_allclose(found, want, rtol=1e-6)
