"""The Engram kernels against their meaning: integers equal, floats close, padding inert."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support import B, Case, T, ints, normal, poison, valid_rows

from dsv4c.ir.dtypes import DType

SIZES = [(1, 1), (1, 7), (2, 5), (3, 13)]
PRIMES = (1009, 1013, 1019, 1021, 1031, 1033)
OFFSETS = (0, 1009, 2022, 3041, 4062, 5093)
MULTIPLIERS = (18984069153536581, 1198982504596559, 8908289623672409, 18328883108567563)


@functools.cache
def compression(dead: bool) -> Case:
    c = Case()
    table = c.weight_of("map", np.random.default_rng(1).integers(0, 20, 61).astype(np.int32))
    c.op("compress_tokens", c.i32("tokens", B, T), table, dead=dead, dead_token=7 if dead else -1)
    return c


@pytest.mark.parametrize("dead", [False, True])
def test_compress_tokens(dead: bool) -> None:
    rng = np.random.default_rng(2)
    for b, t in SIZES:
        tokens = rng.integers(-5, 70, (b, t)).astype(np.int32)
        tokens[0, :3], tokens[-1, -1] = 7, 60
        found = compression(dead).check({"tokens": tokens})["compress_tokens"]
        assert ((found == -1)[tokens == 7] == dead).all()


@functools.cache
def hashing(heads: int, orders: int, slots: int, dead: bool) -> Case:
    c = Case()
    ids, history = c.i32("tokens", B, T), c.state("history", B, slots, dtype=DType.I32)
    pos, n_valid = c.i32("pos", B), c.i32("n_valid", B)
    count = heads * orders
    c.op("ngram_rows", ids, history, pos, n_valid, pad=2, multipliers=MULTIPLIERS[: orders + 1],
         primes=PRIMES[:count], offsets=OFFSETS[:count], heads=heads, dead=dead)  # fmt: skip
    c.op("ngram_history", history, ids, pos, n_valid, out="history")
    return c


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("heads", "orders", "slots"), [(2, 3, 3), (1, 3, 5), (3, 2, 2), (6, 1, 1)])
def test_ngram_rows_and_history(heads: int, orders: int, slots: int, dead: bool) -> None:
    """Rows at the start, in the middle, with nothing valid, and with DEAD in the history and the call."""
    rng = np.random.default_rng(slots)
    for b, t in SIZES:
        for start in (0, 1, 2, 50):
            ids = np.where(rng.random((b, t)) < 0.3, -1, rng.integers(0, 400, (b, t)))
            history = np.where(rng.random((b, slots)) < 0.3, -1, rng.integers(0, 400, (b, slots)))
            inputs = {
                "tokens": ids, "history": history, "pos": np.full(b, start) + np.arange(b),
                "n_valid": rng.integers(0, t + 1, b),
            }  # fmt: skip
            hashing(heads, orders, slots, dead).check({k: v.astype(np.int32) for k, v in inputs.items()})


@functools.cache
def scaled_table(width: int, groups: int) -> Case:
    c, rng = Case(), np.random.default_rng(3)
    codes, scales = rng.integers(0, 256, (37, width)), rng.integers(0, 200, (37, groups))
    codes[codes % 128 == 127] = 1  # NaN
    codes[0], scales[0, 0], scales[1] = 0xFE, 0, 127  # the largest negative code, the smallest scale
    table = c.b.weight(c.store.add("codes", DType.F8E4M3, codes.astype(np.uint8)), "codes")
    scale = c.b.weight(c.store.add("scales", DType.F8E8M0, scales.astype(np.uint8)), "scales")
    c.op("engram_rows", c.i32("rows", B, T, 3), table, scale)
    return c


@functools.cache
def plain_table(width: int, bf16: bool) -> Case:
    c = Case()
    c.op("engram_rows", c.i32("rows", B, T, 3), c.weight("table", 37, width, bf16=bf16))
    return c


@pytest.mark.parametrize("case", [(scaled_table, 32, 1), (scaled_table, 96, 3), (scaled_table, 15, 5),
                                  (plain_table, 32, True), (plain_table, 17, False)])  # fmt: skip
def test_engram_rows_are_exact(case: tuple[object, ...]) -> None:
    factory, *key = case
    rng = np.random.default_rng(4)
    for b, t in SIZES:
        rows = rng.integers(-1, 37, (b, t, 3)).astype(np.int32)
        rows[0, 0] = 0, -1, 36
        found = factory(*key).check({"rows": rows}, tolerance=0)["engram_rows"]  # type: ignore[operator]
        assert not found.reshape(b, t, 3, -1)[rows < 0].any()


@functools.cache
def gate(n: int, d: int, copysign: bool, residual: bool, marked: bool) -> Case:
    c = Case()
    x, kv = c.f32("x", B, T, n, d), c.f32("kv", B, T, (n + 1) * d)
    weights = c.weight("q", n, d), c.weight("k", n, d, bf16=False)
    ids = (c.i32("ids", B, T),) if marked else ()
    c.op("engram_gate", x, kv, *weights, *ids, eps=1e-20, copysign=copysign, residual=residual)
    return c


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("copysign", "residual"), [(True, True), (False, False)])
@pytest.mark.parametrize(("n", "d"), [(4, 16), (1, 15), (3, 61), (2, 96)])
def test_engram_gate(n: int, d: int, copysign: bool, residual: bool, marked: bool) -> None:
    rng = np.random.default_rng(d)
    for b, t in SIZES:
        ids = rng.integers(-1, 3, (b, t)).astype(np.int32)
        inputs = {"x": normal(rng, b, t, n, d), "kv": normal(rng, b, t, (n + 1) * d)}
        inputs["kv"][0, 0, : n * d] = 0  # the key is zero
        inputs["x"][-1, -1] = 0
        if marked:
            inputs["ids"] = ids
        found = gate(n, d, copysign, residual, marked).check(inputs)["engram_gate"]
        if marked:
            want = inputs["x"] if residual else np.zeros_like(found)
            np.testing.assert_array_equal(found[ids < 0], want[ids < 0])


@pytest.mark.parametrize(("copysign", "share"), [(True, 1 / (1 + np.exp(-0.001))), (False, 0.5)])
def test_the_gate_where_delta_is_zero(copysign: bool, share: float) -> None:
    """A zero key, a zero stream, and a dot product that cancels: copysign opens a little more than half."""
    x, kv = np.ones((1, 3, 1, 16), np.float32), np.ones((1, 3, 32), np.float32)
    kv[0, 0, :16], x[0, 1] = 0, 0
    kv[0, 2, :8] = -1
    c = Case()
    ones = [c.weight_of(name, np.ones((1, 16), np.float32)) for name in "qk"]
    c.op("engram_gate", c.f32("x", B, T, 1, 16), c.f32("kv", B, T, 32), *ones, eps=1e-20, copysign=copysign,
         residual=False)  # fmt: skip
    found = c.check({"x": x, "kv": kv})["engram_gate"]
    np.testing.assert_allclose(found, share, rtol=3e-7)


def test_a_small_delta_has_the_sign_of_the_product() -> None:
    """|delta| below the floor counts as 1e-6 on its own side of zero, in all variants."""
    for copysign in (True, False):
        c = Case()
        ones = [c.weight_of(name, np.ones((1, 16), np.float32)) for name in "qk"]
        c.op("engram_gate", c.f32("x", B, T, 1, 16), c.f32("kv", B, T, 32), *ones, eps=1.0, residual=False,
             copysign=copysign)  # fmt: skip
        kv = np.ones((1, 2, 32), np.float32)
        kv[0, 0, :16], kv[0, 1, :16] = 1e-9, -1e-9
        found = c.check({"x": np.ones((1, 2, 1, 16), np.float32), "kv": kv})["engram_gate"]
        np.testing.assert_allclose(found[0, :, 0, 0], 1 / (1 + np.exp([-1e-3, 1e-3])), rtol=3e-7)


@functools.cache
def convolution(n: int, d: int, taps: int, dilation: int, slots: int) -> Case:
    c = Case()
    _, pos, n_valid = c.step()
    ring = c.state("ring", B, slots, n * d)
    z = c.op("stream_norm", c.f32("x", B, T, n, d), c.weight("norm", n, d), eps=1e-5)
    w = c.weight("w", n * d, taps)
    y = c.op("short_conv", z, ring, w, pos, n_valid, dilation=dilation)
    c.op("add", c.b.op("split_heads", y, heads=n), c.f32("x2", B, T, n, d))
    c.op("ring_write", ring, z, pos, n_valid, out="ring")
    return c


@pytest.mark.parametrize("shape", [(4, 16, 4, 3, 9), (1, 15, 4, 2, 6), (2, 17, 1, 5, 1), (3, 8, 3, 1, 7)])
def test_norm_and_convolution(shape: tuple[int, ...]) -> None:
    n, d, _, _, slots = shape
    rng = np.random.default_rng(d)
    for b, t in SIZES:
        for start in (0, 4, 31):
            n_valid = rng.integers(0, t + 1, b).astype(np.int32)
            inputs = {
                "tokens": np.zeros((b, t), np.int32), "n_valid": n_valid,
                "pos": (start + np.arange(b)).astype(np.int32), "ring": normal(rng, b, slots, n * d),
                "x": normal(rng, b, t, n, d), "x2": normal(rng, b, t, n, d),
            }  # fmt: skip
            convolution(*shape).check(inputs, only=valid_rows(n_valid, t))


def test_padding_is_inert() -> None:
    rng, n_valid = np.random.default_rng(9), ints(2, 0, 5)
    c = convolution(4, 16, 4, 3, 9)
    inputs = {
        "tokens": np.zeros((3, 5), np.int32), "n_valid": n_valid, "pos": ints(0, 3, 8),
        "ring": normal(rng, 3, 9, 64), "x": normal(rng, 3, 5, 4, 16), "x2": normal(rng, 3, 5, 4, 16),
    }  # fmt: skip
    clean = c.run(inputs)
    dirty = c.run({**inputs, "x": poison(inputs["x"], n_valid), "x2": poison(inputs["x2"], n_valid)})
    mask = valid_rows(n_valid, 5)
    for name in ("short_conv", "add", "stream_norm"):
        np.testing.assert_array_equal(dirty[name][mask], clean[name][mask], err_msg=name)
    np.testing.assert_array_equal(dirty["ring"], clean["ring"])


def test_a_bias_is_added_to_every_row() -> None:
    c, rng = Case(), np.random.default_rng(5)
    c.op("add_bias", c.f32("x", B, T, 23), c.weight("bias", 23))
    for b, t in SIZES:
        c.check({"x": normal(rng, b, t, 23)})
