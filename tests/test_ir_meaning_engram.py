"""The Engram ops against numbers worked out by hand."""

from __future__ import annotations

from math import exp, sqrt

import numpy as np
from support import Arr, B, Case, T

from dsv4c.ir.dtypes import DType


def value(case: Case, **inputs: object) -> Arr:
    """The only output of a case."""
    (found,) = case.meaning({k: np.asarray(v) for k, v in inputs.items()}).values()
    return found


def close(found: Arr, want: object) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_compress_tokens() -> None:
    tokens = [[0, 2, 1, -1, -7, 3, 99]]
    for dead, want in ((True, [5, -1, 0, -1, -1, -1, -1]), (False, [5, -1, 0, -1, -7, -1, -1])):
        c = Case()
        table = c.weight_of("map", np.array([5, 0, 4], np.int32))
        c.op("compress_tokens", c.i32("tokens", B, T), table, dead=dead, dead_token=2)
        assert value(c, tokens=tokens)[0].tolist() == want


def ngrams(dead: bool) -> Case:
    c = Case()
    ids, history = c.i32("ids", B, T), c.i32("history", B, 2)
    c.op("ngram_rows", ids, history, c.i32("pos", B), c.i32("n_valid", B), pad=1, multipliers=(3, 5, 9),
         primes=(7, 11), offsets=(0, 7), heads=1, dead=dead)  # fmt: skip
    return c


def test_ngram_rows() -> None:
    """Position 4 sits in slot 0 and position 5 in slot 1 of a history of two."""
    given = {"history": [[8, 6]], "pos": [6], "n_valid": [2], "ids": [[2, 4, 9]]}
    # u = 2, 6, 8: 6 ^ 30 = 24, 24 ^ 72 = 80; u = 4, 2, 6: 12 ^ 10 = 6, 6 ^ 54 = 48
    want = [[24 % 7, 80 % 11 + 7], [6, 48 % 11 + 7], [-1, -1]]
    assert value(ngrams(True), **given)[0].tolist() == want
    # the start: u = 2, pad, pad: 6 ^ 5 = 3, 3 ^ 9 = 10; u = 4, 2, pad: 6, 6 ^ 9 = 15
    found = value(ngrams(True), **{**given, "pos": [0]})
    assert found[0].tolist() == [[3, 10 + 7], [6, 15 % 11 + 7], [-1, -1]]


def test_ngram_rows_of_dead_tokens() -> None:
    """With `dead` a negative id takes all before it with it; without, it is hashed and mod is positive."""
    given = {"history": [[8, 6]], "pos": [6], "n_valid": [3], "ids": [[2, -1, 4]]}
    # u = (-1, 2, 6) -> (1, 1, 1): 3 ^ 5 = 6, 6 ^ 9 = 15; u = (4, -1, 2) -> (4, 1, 1): 12 ^ 5 = 9, 9 ^ 9 = 0
    assert value(ngrams(True), **given)[0, 1:].tolist() == [[6, 15 % 11 + 7], [2, 0 + 7]]
    # -3 ^ 10 = -9, -9 ^ 54 = -63; 12 ^ -5 = -9, -9 ^ 18 = -27
    assert value(ngrams(False), **given)[0, 1:].tolist() == [[-9 % 7, -63 % 11 + 7], [-9 % 7, -27 % 11 + 7]]


def test_ngram_history() -> None:
    c = Case()
    state, ids = c.state("history", 3, 3, dtype=DType.I32), c.i32("ids", 3, 4)
    c.op("ngram_history", state, ids, c.i32("pos", 3), c.i32("n_valid", 3), out="history")
    history = [[-1, 20, 30]] * 3
    found = value(c, history=history, ids=[[1, -1, 3, 4]] * 3, pos=[5, 0, 2], n_valid=[2, 0, 4])
    assert found.tolist() == [[-1, 20, 1], [-1, 20, 30], [-1, 3, 4]]


def test_engram_rows() -> None:
    c = Case()
    # 1 -1 2 2^-9 and 1.5 0 -0 448
    codes = np.array([[0x38, 0xB8, 0x40, 0x01], [0x3C, 0x00, 0x80, 0x7E]], np.uint8)
    scales = np.array([[127, 129], [0, 126]], np.uint8)  # 1 4, 2^-127 1/2
    table = c.b.weight(c.store.add("codes", DType.F8E4M3, codes), "codes")
    scale = c.b.weight(c.store.add("s", DType.F8E8M0, scales), "s")
    c.op("engram_rows", c.i32("rows", B, T, 3), table, scale)
    want = [1.5 * 2.0**-127, 0, 0, 224, 0, 0, 0, 0, 1, -1, 8, 2.0**-7]
    np.testing.assert_array_equal(value(c, rows=[[[1, -1, 0]]])[0, 0], want)
    c = Case()
    c.op("engram_rows", c.i32("rows", B, T, 1), c.weight_of("t", np.array([[1, 2], [3, 4]], np.float32)))
    assert value(c, rows=[[[1], [-1]]])[0].tolist() == [[3, 4], [0, 0]]


def gate(**attrs: object) -> Case:
    c = Case()
    q, k = (c.weight_of(n, np.array([[1, 2]], np.float32)) for n in ("q", "k"))
    x, kv, ids = c.f32("x", B, T, 1, 2), c.f32("kv", B, T, 4), c.i32("ids", B, T)
    c.op("engram_gate", x, kv, q, k, ids, eps=0.0, **attrs)
    return c


def test_engram_gate() -> None:
    given = {"x": [[[[3.0, 4.0]], [[3.0, 4.0]], [[1.0, 1.0]]]], "ids": [[0, -1, 5]],
             "kv": [[[1.0, -2.0, 10.0, 20.0]] * 2 + [[4.0, -1.0, 10.0, 20.0]]]}  # fmt: skip
    # X q k key = 3 - 32 over sqrt 2, rms 5 / sqrt 2 and sqrt(5 / 2); then a product that is exactly 0
    delta = -29 / sqrt(2) / (5 / sqrt(2)) / sqrt(2.5)
    share = sigmoid(-sqrt(-delta))
    for copysign, half in ((True, sigmoid(0.001)), (False, 0.5)):
        found = value(gate(copysign=copysign, residual=False), **given)[0, :, 0]
        close(found, [[10 * share, 20 * share], [0, 0], [10 * half, 20 * half]])
    found = value(gate(copysign=True, residual=True), **given)[0, :, 0]
    close(found[:2], [[3 + 10 * share, 4 + 20 * share], [3, 4]])


def test_the_norms_of_the_demonstration_are_those_of_the_gate() -> None:
    """Two RMSNorms with weights of their own and a dot product are the gate's delta."""
    rng = np.random.default_rng(0)
    x, kv, q, k = (rng.standard_normal(s) for s in ((1, 5, 2, 8), (1, 5, 24), (2, 8), (2, 8)))
    q, k = q.astype(np.float32), k.astype(np.float32)
    c = Case()
    weights = c.weight_of("q", q), c.weight_of("k", k)
    c.op("engram_gate", c.f32("x", B, T, 2, 8), c.f32("kv", B, T, 24), *weights, eps=1e-3, copysign=False,
         residual=False)  # fmt: skip
    key, v = kv[0, :, :16].reshape(5, 2, 8), kv[0, :, None, 16:]

    def norm(a: Arr, w: Arr) -> Arr:
        return a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-3) * w

    delta = (norm(key, k) * norm(x[0], q)).sum(-1) / sqrt(8)
    root = np.sign(delta) * np.sqrt(np.abs(delta))
    close(value(c, x=x, kv=kv)[0], v / (1 + np.exp(-root))[..., None])


def test_norm_and_convolution() -> None:
    c = Case()
    weights = c.weight_of("w", np.array([[1, 2], [3, 4]], np.float32))
    c.op("stream_norm", c.f32("x", B, T, 2, 2), weights, eps=0.0)
    found = value(c, x=[[[[1.0, 1.0], [3.0, 4.0]]]])
    close(found, [[[1, 2, 9 / sqrt(12.5), 16 / sqrt(12.5)]]])
    c = Case()
    taps = c.weight_of("w", np.array([[100, 10, 1]], np.float32))
    rows, ring = c.f32("rows", B, T, 1), c.f32("ring", B, 4, 1)
    c.op("short_conv", rows, ring, taps, c.i32("pos", B), c.i32("n_valid", B), dilation=2)
    given = {"rows": [[[0.1], [0.2], [0.3]]], "ring": [[[4.0], [5.0], [2.0], [3.0]]], "n_valid": [3]}
    # positions 6, 7, 8 follow 2..5 in slots 2, 3, 0, 1
    want = [0.1 + 40 + 200, 0.2 + 50 + 300, 0.3 + 1 + 400]
    close(value(c, **given, pos=[6])[0, :, 0], want)
    # before the start stands zero: positions 1, 2, 3 reach back to position 0 only, in slot 0
    want = [0.1, 0.2 + 40, 0.3 + 1]
    close(value(c, **given, pos=[1])[0, :, 0], [y / (1 + exp(-y)) for y in want])


def test_add_bias() -> None:
    c = Case()
    c.op("add_bias", c.f32("x", B, T, 2), c.weight_of("bias", np.array([1, -2], np.float32)))
    close(value(c, x=[[[1, 1], [0, 5]]]), [[[2, -1], [1, 3]]])
