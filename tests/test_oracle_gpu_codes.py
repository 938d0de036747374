"""Products of 8-bit codes: the rows that are rounded, and what kernels multiply, in Triton's interpreter.

The codes are those of the evaluator bit for bit, so only the order of FP32 sums is between the two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_support import Interpreter, check_case, interpreter, write_draft
from support import Arr, B, Case, T, ints, normal, poison, valid_rows
from test_kernels_packed import matrix, pair, weight

from dsv4c.ir import weights as w
from dsv4c.ir.formats import SCHEMES
from dsv4c.targets.gpu.arch import gpu
from dsv4c.targets.gpu.plan import draft

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle

RULES = {"e4m3": 128, "int8": 0}
EXPERTS_BY = {"e4m3": "e4m3_rows", "int8": "int8_token"}
PAIRS = [
    ("e4m3", "fp8", "sm_90a"), ("e4m3", "fp8_f32", "sm_90a"), ("e4m3", "mxfp8", "sm_90a"),
    ("e4m3", "mxfp4", "sm_90a"), ("e4m3", "fp8", "gfx942"), ("e4m3", "fp8_fnuz", "gfx942"),
    ("e4m3", "mxfp4", "gfx942"), ("int8", "int8", "sm_90a"),
]  # fmt: skip
"""(rule of rows, scheme of weights, arch) that are products of codes."""
NUMBERS = [
    ("e4m3", "fp8", "sm_80"), ("e4m3", "mxfp4", "gfx90a"), ("e4m3", "nvfp4", "sm_90a"),
    ("e4m3", "bf16", "sm_90a"), ("e4m3", "fp8_fnuz", "sm_90a"), ("int8", "fp8", "sm_90a"),
]  # fmt: skip
"""The same, of numbers: the hardware or the scheme is another."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Interpreter]:
    with interpreter() as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "case.dsv4"


def nearby(c: Case, name: str, scheme: str) -> None:
    """The smallest scale there is beside others: of FP4, products of codes allow 2^11."""
    if scheme == "mxfp4":
        for tensor, array in c.store.tensors.items():
            if tensor.startswith(name) and tensor.endswith(".s"):
                array[array == 0] = 118


def kernels(case: Case, arch: str) -> set[str]:
    plan = draft(case.module, gpu(arch)).plan
    return {k.name for k in plan.kernels}


# ------------------------------------------------------------------------------------------- rows


@functools.cache
def rounded(d: int, rule: str, block: int) -> Case:
    c = Case()
    c.op("round_values", c.f32("x", B, T, d), rule=rule, block=block)
    c.op("round_values", c.f32("heads", B, T, 2, d), rule=rule, block=block, out="of heads")
    return c


def values(d: int) -> Arr:
    """Rows of every size of number, with ties, zeros, infinities' neighbours and what is nearly nothing."""
    rng = np.random.default_rng(d)
    x = normal(rng, 1, 12, d)
    x[0, 0] = 0
    x[0, 1] = np.round(x[0, 1] * 16) / 16
    x[0, 2] *= np.exp2(rng.integers(-20, 20, d)).astype(np.float32)
    x[0, 3] *= np.float32(1e-30)
    x[0, 4] *= np.float32(3e37)
    x[0, 5] = np.ldexp(1 + np.arange(d) % 32 / np.float32(32), np.arange(d) % 24 - 18)
    x[0, 5, 0] = 448
    x[0, 6] = -np.arange(d) - np.float32(0.5)
    x[0, 7, : d // 2] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("d", [1, 72, 128, 300])
@pytest.mark.parametrize(("rule", "block"), [("e4m3", 128), ("e4m3", 32), ("e4m3", 0), ("int8", 0)])
def test_rows_are_rounded_bit_for_bit(
    worker: Interpreter, path: Path, d: int, rule: str, block: int
) -> None:
    case, x = rounded(d, rule, block), values(d)
    inputs = {"x": x, "heads": np.stack([x, x[:, ::-1]], 2)}
    write_draft(case.module, case.store, path)
    ((found, _),) = worker.run(path, [(inputs, {})])
    for name, want in case.meaning(inputs, np.float32).items():
        np.testing.assert_array_equal(found[name], want, err_msg=name)


# --------------------------------------------------------------------------------------- products


@functools.cache
def linears(rule: str, name: str) -> Case:
    """Rows and columns end inside tiles, blocks and scales."""
    c, scheme = Case(), SCHEMES[name]
    for n, k in ((70, 70), (200, 136), (16, 6), (40, 300)):
        x = c.b.op("round_values", c.f32(f"x{k}", B, T, k), rule=rule, block=RULES[rule])
        if scheme.plain:
            found = c.weight(f"w{k}", n, k, bf16=True)
        else:
            found = weight(c, f"w{k}", matrix(c, f"w{k}", scheme, n, k))
        nearby(c, "w", name)
        c.op("linear", x, found, out=f"y{k}")
    return c


@pytest.mark.parametrize(("rule", "name", "arch"), PAIRS + NUMBERS)
def test_linear(worker: Interpreter, path: Path, rule: str, name: str, arch: str) -> None:
    case, codes = linears(rule, name), (rule, name, arch) in PAIRS
    assert ("linear_codes" in kernels(case, arch), "linear" in kernels(case, arch)) == (codes, not codes)
    for b, t in ((1, 1), (3, 17)):
        rng = np.random.default_rng(t)
        inputs = {f"x{k}": normal(rng, b, t, k) for k in (70, 136, 6, 300)}
        check_case(case, inputs, worker, path, 1e-6, arch=arch)


@functools.cache
def experts(rule: str, first: str, second: str, count: int, topk: int) -> Case:
    c, d, inner = Case(), 160, 136
    x, ids, g = c.f32("x", B, T, d), c.i32("ids", B, T, topk), c.f32("g", B, T, topk)
    w13 = w.stack(tuple(pair(c, f"w13.{e}", SCHEMES[first], inner, d) for e in range(count)))
    w2 = w.stack(tuple(matrix(c, f"w2.{e}", SCHEMES[second], d, inner) for e in range(count)))
    nearby(c, "w13", first)
    nearby(c, "w2", second)
    c.op(
        "expert_mlp", c.b.op("round_values", x, rule=rule, block=RULES[rule]), ids, g, c.i32("n_valid", B),
        weight(c, "w13", w13), weight(c, "w2", w2), limit=9.0, rounding=EXPERTS_BY[rule],
    )  # fmt: skip
    return c


EXPERTS = [
    ("e4m3", "mxfp4", "mxfp4", "sm_90a"), ("e4m3", "fp8", "fp8", "sm_90a"),
    ("e4m3", "mxfp8", "mxfp4", "gfx942"), ("e4m3", "mxfp4", "mxfp4", "sm_80"),
    ("e4m3", "mxfp4", "nvfp4", "sm_90a"), ("int8", "int8", "int8", "sm_90a"),
    ("int8", "int8", "mxfp4", "sm_90a"),
]  # fmt: skip
"""(rule, schemes of both weights, arch): products of codes, of numbers, and one of each."""
ROUTES = ["all", "empty experts", "one expert takes all", "nothing is routed", "decode"]


@pytest.mark.parametrize(("rule", "first", "second", "arch"), EXPERTS)
@pytest.mark.parametrize("case", ROUTES)
def test_experts(
    worker: Interpreter, path: Path, rule: str, first: str, second: str, arch: str, case: str
) -> None:
    """FP32 sums differ, so a hidden value near a tie of its rounding might become the other code; none does
    here.
    """
    rng, t, topk = np.random.default_rng(5), 1 if case == "decode" else 21, 2
    n_valid = ints(0, 0) if case == "nothing is routed" else ints(t, max(1, t // 3))
    chosen = 2 if case == "empty experts" else 4
    order = np.stack([rng.permutation(chosen)[:topk] for _ in range(2 * t)])
    ids = order.astype(np.int32).reshape(2, t, topk)
    if case == "one expert takes all":
        ids[...] = 3
    inputs = {"ids": ids, "n_valid": n_valid, "g": rng.uniform(size=ids.shape).astype(np.float32)}
    inputs["x"] = poison(normal(rng, 2, t, 160), n_valid)
    made = experts(rule, first, second, 4, topk)
    found = check_case(made, inputs, worker, path, 1e-6, arch=arch)["expert_mlp"]
    assert np.isfinite(found).all() and not found[~valid_rows(n_valid, t)].any()
