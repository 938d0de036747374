"""The `core` and `hyper` lowerings, each op alone against its meaning, at several sizes of B and T."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_onnx_harness import B, Case, DictStore, L, T, ints, numbers

from dsv4c.ir.dtypes import DType, f32_to_bf16
from dsv4c.ir.weights import concat, decode_fp4, source, stack

SIZES = [(1, 1), (3, 1), (2, 7), (1, 33)]


def test_embed_and_streams(tmp_path: Path) -> None:
    case = Case(tmp_path)
    x = case.b.op("embed", case.i32("tokens", B, T), case.f32("table", 11, 6))
    case.output(x, case.b.op("repeat_streams", x, n=4)).build()
    for b, t in SIZES:
        tokens = np.random.default_rng(b + t).integers(0, 11, (b, t)).astype(np.int32)
        case.compare({"tokens": tokens, "table": numbers(0, 11, 6)})


def test_linear_maps(tmp_path: Path) -> None:
    case = Case(tmp_path)
    x, w = case.f32("x", B, T, 24), case.f32("w", 10, 24)
    heads = case.b.op("split_heads", x, heads=6)
    grouped = case.b.op("grouped_linear", heads, case.f32("g", 15, 8), groups=3)
    per_head = case.b.op("linear", heads, case.f32("v", 5, 4))
    case.output(case.b.op("linear", x, w), per_head, heads, grouped).build()
    for b, t in SIZES:
        weights = {"w": numbers(1, 10, 24), "v": numbers(2, 5, 4), "g": numbers(3, 15, 8)}
        case.compare({"x": numbers(b, b, t, 24), **weights})


def test_norms(tmp_path: Path) -> None:
    case = Case(tmp_path)
    x, q = case.f32("x", B, T, 9), case.f32("q", B, T, 3, 6)
    case.output(
        case.b.op("rms_norm", x, case.f32("w", 9), eps=1e-6), case.b.op("unit_norm", q, eps=1e-2)
    ).build()  # fmt: skip
    for b, t in SIZES:
        scale = (10.0 ** np.random.default_rng(t).integers(-4, 4, (b, t, 1))).astype(np.float32)
        case.compare({"x": numbers(0, b, t, 9) * scale, "q": numbers(1, b, t, 3, 6), "w": numbers(2, 9)})


def test_a_norm_of_zero_is_zero(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.output(case.b.op("unit_norm", case.f32("x", B, T, 4), eps=1e-6)).build()
    case.compare({"x": np.zeros((2, 3, 4), np.float32)})


def test_element_wise(tmp_path: Path) -> None:
    case = Case(tmp_path)
    a, b_ = case.f32("a", B, T, 5), case.f32("b", B, T, 5)
    act = case.b.op("clamped_swiglu", a, b_, limit=1.5)
    case.output(case.b.op("add", a, b_), case.b.op("scale", a, factor=0.3), act).build()
    for b, t in SIZES:
        case.compare({"a": 3 * numbers(b, b, t, 5), "b": 3 * numbers(t, b, t, 5)})


def test_swiglu_far_out(tmp_path: Path) -> None:
    case = Case(tmp_path)
    operands = case.f32("a", B, T, 4), case.f32("b", B, T, 4)
    case.output(case.b.op("clamped_swiglu", *operands, limit=10.0)).build()
    case.compare({"a": np.float32([[[1e30, -1e30, 11, -60]]]), "b": np.float32([[[1e30, -1e30, -11, 60]]])})


def test_gather_rows(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.output(case.b.op("gather_rows", case.f32("x", B, T, 3), case.i32("rows", B, L))).build()
    case.compare({"x": numbers(0, 2, 5, 3), "rows": ints([4, 0, 0], [1, 3, 2])})
    case.compare({"x": numbers(0, 1, 1, 3), "rows": ints([0])})


# --------------------------------------------------------------------------------- hyper-connections


@pytest.mark.parametrize("n", [2, 4])
def test_hyper_connections(tmp_path: Path, n: int) -> None:
    case, d = Case(tmp_path), 6
    x, m = case.f32("x", B, T, n, d), n * (2 + n)
    parameters = [case.f32("fn", m, n * d), case.f32("base", m), case.f32("scale", 3)]
    mix = case.b.multi("hc_mix", x, *parameters, eps=1e-3, norm_eps=1e-2, iters=20)
    pre, post, comb = mix.results
    y = case.b.op("hc_collapse", x, pre)
    case.output(pre, post, comb, y, case.b.op("hc_expand", x, y, post, comb)).build()
    for b, t in SIZES:
        inputs = {"fn": numbers(1, m, n * d), "base": numbers(2, m), "scale": numbers(3, 3)}
        case.compare({"x": numbers(b, b, t, n, d), **inputs})


def test_head_mix(tmp_path: Path) -> None:
    case, n, d = Case(tmp_path), 4, 5
    x = case.f32("x", B, T, n, d)
    parameters = case.f32("fn", n, n * d), case.f32("base", n), case.f32("scale", 1)
    case.output(case.b.op("hc_head_mix", x, *parameters, eps=1e-3, norm_eps=1e-2)).build()
    for b, t in SIZES:
        inputs = {"fn": numbers(1, n, n * d), "base": numbers(2, n), "scale": numbers(3, 1)}
        case.compare({"x": numbers(b, b, t, n, d), **inputs})


# ------------------------------------------------------------------------------------------- weights


def test_weights_of_every_kind_are_stored_decoded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = DictStore({
        "bf16": f32_to_bf16(numbers(1, 6, 8)),
        "codes": rng.integers(0, 256, (6, 32)).astype(np.uint8),
        "scale": rng.integers(120, 130, (6, 2)).astype(np.uint8),
        "ids": rng.integers(0, 6, (9, 2)).astype(np.int32),
    })  # fmt: skip
    fp4 = decode_fp4(source("codes", DType.F4E2M1X2, (6, 32)), source("scale", DType.F8E8M0, (6, 2)))
    case = Case(tmp_path)
    tokens = case.i32("tokens", B, T)
    table = case.b.weight(source("bf16", DType.BF16, (6, 8)), "table")
    again = case.b.weight(concat((fp4, fp4)), "table")  # a second weight of the same place
    x = case.b.op("linear", case.f32("x", B, T, 64), again)
    ids = case.b.op("route_hash", tokens, case.b.weight(source("ids", DType.I32, (9, 2)), "ids"))
    case.b.weight(stack((fp4,)), "unused")
    case.output(case.b.op("embed", tokens, table), x, ids).build(store)
    tokens_ = ints([0, 5, 3])
    case.compare({"tokens": tokens_, "x": numbers(3, 1, 3, 64)})
    kinds = {name: (t.dtype, t.shape) for name, t in case.artifact.tensors.items()}
    assert kinds == {"table": ("f32", (6, 8)), "table#2": ("f32", (12, 64)), "ids": ("i32", (9, 2))}
