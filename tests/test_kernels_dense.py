"""Matrix products, experts, router and hyper-connections: kernels against their meaning."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support import Arr, B, Case, T, ints, normal, poison, valid_rows

SIZES = [(1, 1), (1, 5), (1, 6), (2, 3), (1, 7), (3, 13), (1, 40)]
"""Rows below, at and above the 6 of a register tile."""
NS = [1, 15, 16, 17, 61, 64, 65, 130]
"""Output rows below, at and above the 16 lanes and the 64 of a panel."""


@functools.cache
def linear(k: int) -> Case:
    c = Case()
    x = c.f32("x", B, T, k)
    for n in NS:
        c.op("linear", x, c.weight(f"w{n}", n, k, bf16=n % 2 == 1), out=f"y{n}")
    c.op("linear", x, c.weight("narrow", 130, k, bf16=True), out="narrow")
    c.op("linear", x, c.weight("wide", 61, k), out="wide")
    return c


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize(("b", "t"), SIZES)
def test_linear(k: int, b: int, t: int) -> None:
    linear(k).check({"x": normal(np.random.default_rng(t), b, t, k)})


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: however tokens are cut into calls, and whatever padding holds."""
    x = normal(np.random.default_rng(0), 1, 13, 40)
    whole = linear(40).run({"x": x})
    dirty = x.copy()
    dirty[0, 5:] = np.nan
    padded = linear(40).run({"x": dirty})
    for name, y in whole.items():
        alone = [linear(40).run({"x": x[:, i : i + 1]})[name][0, 0] for i in range(5)]
        np.testing.assert_array_equal(np.stack(alone), y[0, :5], err_msg=name)
        np.testing.assert_array_equal(padded[name][0, :5], y[0, :5], err_msg=name)


@functools.cache
def grouped(heads: int, d: int, groups: int, n: int, bf16: bool) -> Case:
    c = Case()
    w = c.weight("w", groups * n, heads * d // groups, bf16=bf16)
    c.op("grouped_linear", c.f32("x", B, T, heads, d), w, groups=groups)
    return c


@pytest.mark.parametrize(
    "shape", [(3, 40, 3, 24, True), (4, 6, 2, 5, False), (2, 16, 1, 65, True), (17, 8, 17, 1, False)]
)
def test_grouped_linear(shape: tuple[int, int, int, int, bool]) -> None:
    for b, t in SIZES:
        grouped(*shape).check({"x": normal(np.random.default_rng(t), b, t, *shape[:2])})


# ---------------------------------------------------------------------------------------- experts

EXPERTS = 5


@functools.cache
def experts(d: int, inner: int, topk: int, bf16: bool) -> Case:
    c = Case()
    x, ids, g = c.f32("x", B, T, d), c.i32("ids", B, T, topk), c.f32("g", B, T, topk)
    w13, w2 = c.weight("w13", EXPERTS, 2 * inner, d, bf16=bf16), c.weight("w2", EXPERTS, d, inner, bf16=bf16)
    c.op("expert_mlp", x, ids, g, c.i32("n_valid", B), w13, w2, limit=1.5)
    return c


def routing(kind: str, rng: np.random.Generator, b: int, t: int, topk: int) -> Arr:
    match kind:
        case "one expert takes every token":
            return np.full((b, t, topk), 3, np.int32)
        case "two experts, the others empty":
            return np.tile(np.array([4, 0] * topk, np.int32)[:topk], (b, t, 1))
        case _:
            return rng.permuted(np.tile(np.arange(EXPERTS), (b, t, 1)), axis=-1)[..., :topk].astype(np.int32)


@pytest.mark.parametrize("kind", ["any", "one expert takes every token", "two experts, the others empty"])
@pytest.mark.parametrize("shape", [(40, 24, 2, True), (7, 33, 1, False), (65, 56, 3, True)])
def test_experts(shape: tuple[int, int, int, bool], kind: str) -> None:
    d, _, topk, _ = shape
    for b, t in SIZES:
        rng = np.random.default_rng(t)
        n_valid = ints(*[t, 0, t // 2][:b])
        inputs = {
            "x": poison(normal(rng, b, t, d), n_valid),
            "ids": routing(kind, rng, b, t, topk), "n_valid": n_valid,
            "g": poison(rng.uniform(0, 1, (b, t, topk)).astype(np.float32), n_valid),
        }  # fmt: skip
        found = experts(*shape).check(inputs)["expert_mlp"]
        assert not found[~valid_rows(n_valid, t)].any(), "padding gets 0"


def test_no_token_at_all() -> None:
    found = experts(40, 24, 2, True).run({
        "x": np.full((2, 3, 40), np.nan), "ids": np.zeros((2, 3, 2)), "n_valid": ints(0, 0),
        "g": np.full((2, 3, 2), np.nan),
    })  # fmt: skip
    assert not found["expert_mlp"].any()


# ----------------------------------------------------------------------------------------- router


@functools.cache
def router(e: int, k: int) -> Case:
    c = Case()
    scores, ids, tokens = c.f32("s", B, T, e), c.i32("ids", B, T, k), c.i32("tokens", B, T)
    c.op("route_topk", scores, c.weight_of("bias", np.zeros(e, np.float32)), k=k, out="plain")
    c.op("route_topk", scores, c.weight("bias2", e), k=k, out="biased")
    c.op("route_weights", scores, ids, factor=1.5, eps=1e-20)
    table = c.rng.integers(0, e, (61, k)).astype(np.int32)
    c.op("route_hash", tokens, c.weight_of("table", table))
    return c


@pytest.mark.parametrize(("e", "k"), [(1, 1), (4, 2), (5, 5), (64, 6), (33, 7)])
def test_router(e: int, k: int) -> None:
    for b, t in SIZES:
        rng = np.random.default_rng(e + t)
        inputs = {
            "s": rng.uniform(0.1, 3, (b, t, e)).astype(np.float32), "tokens": rng.integers(0, 61, (b, t)),
            "ids": rng.permuted(np.tile(np.arange(e), (b, t, 1)), axis=-1)[..., :k],
        }  # fmt: skip
        router(e, k).check(inputs)


def test_exact_ties_go_to_the_lower_id() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (2, 20, 33)).astype(np.float32)
    scores[rng.uniform(size=scores.shape) < 0.1] = -0.0  # ties with 0.0
    inputs = {"s": scores, "tokens": np.zeros((2, 20)), "ids": np.zeros((2, 20, 7))}
    found, want = router(33, 7).run(inputs)["plain"], router(33, 7).meaning(inputs)["plain"]
    np.testing.assert_array_equal(found, want)
    assert found[0, 0].tolist() == sorted(range(33), key=lambda e: (-scores[0, 0, e], e))[:7]


# ------------------------------------------------------------------------------- hyper-connections


@functools.cache
def hyper(n: int, d: int, iters: int) -> Case:
    c = Case()
    rows = n * (2 + n)
    x, y = c.f32("x", B, T, n, d), c.f32("y", B, T, d)
    fn, base = c.weight("fn", rows, n * d, scale=(n * d) ** -0.5), c.weight("base", rows)
    eps = {"eps": 1e-6, "norm_eps": 1e-6}
    outs = ("pre", "post", "comb")
    mix = c.multi("hc_mix", x, fn, base, c.weight("scale", 3), outs=outs, iters=iters, **eps)
    pre, post, comb = mix.results
    c.op("hc_collapse", x, pre)
    c.op("hc_expand", x, y, post, comb)
    head = c.weight("head", n, n * d, scale=(n * d) ** -0.5)
    c.op("hc_head_mix", x, head, c.weight("head_base", n), c.weight("head_scale", 1), **eps)
    return c


@pytest.mark.parametrize("shape", [(4, 96, 20), (4, 7, 20), (2, 5, 3), (1, 16, 1), (3, 33, 2)])
def test_hyper_connections(shape: tuple[int, int, int]) -> None:
    n, d, _ = shape
    for b, t in SIZES:
        rng = np.random.default_rng(t)
        hyper(*shape).check({"x": normal(rng, b, t, n, d), "y": normal(rng, b, t, d)})


def test_padding_of_streams_does_not_leak() -> None:
    rng, n_valid = np.random.default_rng(5), ints(1, 3)
    x, y = normal(rng, 2, 4, 4, 7), normal(rng, 2, 4, 7)
    clean = hyper(4, 7, 20).run({"x": x, "y": y})
    dirty = hyper(4, 7, 20).run({"x": poison(x, n_valid), "y": poison(y, n_valid)})
    mask = valid_rows(n_valid, 4)
    for name, want in clean.items():
        np.testing.assert_array_equal(dirty[name][mask], want[mask], err_msg=name)
