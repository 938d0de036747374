"""Products of INT8 rows by stored integers and FP4 numbers: against the evaluator, and against themselves.

Codes of both factors are those of the evaluator, and sums of whole numbers are exact; what remains is the
order in which blocks are added.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from support import Arr, B, Case, T, ints, normal, usual_of
from test_kernels_packed import EXPERTS, HOST, TOPK, matrix, pair, weight

from dsv4c.ir import weights as w
from dsv4c.ir.formats import SCHEMES
from dsv4c.ir.graph import Value

CODED = ["int8", "int4", "int4_g128", "mxfp4", "nvfp4"]
COLUMNS = (70, 136, 6, 320)
"""Columns end inside a stored word, a block, a strip; or fill all of them."""
SIZES = [(1, 1), (1, 2), (2, 3), (1, 7), (1, 16), (3, 17), (1, 300)]
"""One row, rows below and above a tile, several tiles, more rows than share one decoding."""


def rounded(c: Case, x: Value) -> Value:
    return c.b.op("round_values", x, rule="int8", block=32)


@functools.cache
def linears(name: str, target: str = "cpu") -> Case:
    c, scheme = Case(target), SCHEMES[name]
    for n, k in zip((70, 200, 16, 64), COLUMNS, strict=True):
        w_ = weight(c, f"w{k}", matrix(c, f"w{k}", scheme, n, k))
        c.op("linear", rounded(c, c.f32(f"x{k}", B, T, k)), w_, out=f"y{k}", inputs="int8")
    return c


@functools.cache
def others(name: str, target: str = "cpu", inner: int = 40, heads: tuple[int, int] = (6, 32)) -> Case:
    """Two groups; experts whose second half is in another scheme and whose channels end inside a block."""
    c, scheme, second = Case(target), SCHEMES[name], SCHEMES[CODED[(CODED.index(name) + 1) % len(CODED)]]
    groups = weight(c, "groups", matrix(c, "groups", scheme, 2 * 36, heads[0] * heads[1] // 2))
    x = rounded(c, c.f32("heads", B, T, *heads))
    c.op("grouped_linear", x, groups, groups=2, inputs="int8")
    d = 72
    w13 = w.stack(tuple(pair(c, f"w13.{e}", scheme, inner, d) for e in range(EXPERTS)))
    w2 = w.stack(tuple(matrix(c, f"w2.{e}", second, d, inner) for e in range(EXPERTS)))
    x, ids, g = c.f32("x", B, T, d), c.i32("ids", B, T, TOPK), c.f32("g", B, T, TOPK)
    c.op(
        "expert_mlp", rounded(c, x), ids, g, c.i32("n_valid", B), weight(c, "w13", w13), weight(c, "w2", w2),
        limit=9.0, rounding="int8_rows",
    )  # fmt: skip
    return c


def inputs_of_linears(rng: np.random.Generator, b: int, t: int) -> dict[str, Arr]:
    """A block of zeros in a row, and rows of very different sizes."""
    x = {f"x{k}": normal(rng, b, t, k) * np.exp(normal(rng, b, t, 1)) for k in COLUMNS}
    x["x136"][0, 0, 32:64] = 0
    return {k: v.astype(np.float32) for k, v in x.items()}


def inputs_of_others(
    rng: np.random.Generator, b: int, t: int, heads: tuple[int, int] = (6, 32)
) -> dict[str, Arr]:
    order = rng.permuted(np.tile(np.arange(EXPERTS), (b, t, 1)), axis=-1)
    return {
        "heads": normal(rng, b, t, *heads), "x": normal(rng, b, t, 72),
        "ids": order[..., :TOPK].astype(np.int32), "g": rng.uniform(0, 1, (b, t, TOPK)).astype(np.float32),
        "n_valid": np.full(b, t, np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("name", CODED)
def test_linear(name: str) -> None:
    for b, t in SIZES:
        linears(name).check(inputs_of_linears(np.random.default_rng(t), b, t), tolerance=1e-6)


@pytest.mark.parametrize("name", CODED)
def test_grouped_linear_and_experts(name: str) -> None:
    """A hidden value that lies between two codes may become either."""
    for b, t in SIZES[:-1]:
        others(name).check(inputs_of_others(np.random.default_rng(t), b, t), tolerance=2e-3)


@pytest.mark.parametrize("heads", [(5, 32), (4, 24)])
def test_groups_that_cut_a_block(heads: tuple[int, int]) -> None:
    """Blocks of a head that reach over a group's end, or are shorter than a group's: rows stay float32."""
    case = others("int8", heads=heads)
    case.check(inputs_of_others(np.random.default_rng(1), 2, 3, heads), tolerance=2e-3)


@pytest.mark.parametrize("name", CODED)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    """Bit for bit: however tokens are cut into calls, and whatever padding holds."""
    x = inputs_of_linears(np.random.default_rng(0), 1, 113)
    case = linears(name)
    whole = case.run(x)
    cuts = (0, 1, 3, 8, 13, 113)  # one row, two, five, and a last tile of one, two or more
    pieces = [case.run({k: v[:, a:b] for k, v in x.items()}) for a, b in itertools.pairwise(cuts)]
    dirty = {k: v.copy() for k, v in x.items()}
    for v in dirty.values():
        v[:, 20:] = np.nan
    padded = case.run(dirty)
    for key, y in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[key] for p in pieces], axis=1), y, err_msg=key)
        np.testing.assert_array_equal(padded[key][:, :20], y[:, :20], err_msg=key)


@pytest.mark.parametrize("name", ["mxfp4", "int8"])
def test_experts_do_not_depend_on_their_neighbours(name: str) -> None:
    """Alone, among forty, and where one expert takes all and another none."""
    case, x = others(name), inputs_of_others(np.random.default_rng(3), 1, 40)
    x["ids"][0, 10:] = [0, 1]
    whole = case.run(x)["expert_mlp"]

    def row(i: int) -> dict[str, Arr]:
        return {k: v[:, i : i + 1] for k, v in x.items() if k != "n_valid"} | {"n_valid": ints(1)}

    for i in (0, 3, 9, 39):
        np.testing.assert_array_equal(case.run(row(i))["expert_mlp"], whole[:, i : i + 1])


LESSER = usual_of(
    itertools.product(("int8", "mxfp4"), HOST[1:]),
    lambda name, arch: name == "mxfp4" or arch.endswith("-bf16"),
)


@pytest.mark.parametrize(("name", "arch"), LESSER)
def test_lesser_archs(name: str, arch: str) -> None:
    """Those with dot products of bytes give the bits of tile registers; others multiply numbers."""
    x = inputs_of_linears(np.random.default_rng(5), 2, 9)
    case = linears(name, f"cpu:{arch}")
    case.check(x, tolerance=2e-6)
    if HOST[0].endswith("-amx") and arch.endswith("-bf16"):
        for key, y in linears(name).run(x).items():
            np.testing.assert_array_equal(case.run(x)[key], y, err_msg=key)
    given = inputs_of_others(np.random.default_rng(5), 2, 9)
    others(name, f"cpu:{arch}").check(given, tolerance=2e-3)


def test_rows_that_nothing_rounded() -> None:
    """A product that only says so of its rows reads them as they are."""
    case, rng = Case(), np.random.default_rng(0)
    w_ = weight(case, "w", matrix(case, "w", SCHEMES["mxfp4"], 70, 64))
    case.op("linear", case.f32("x", B, T, 64), w_, out="y", inputs="int8")
    case.check({"x": normal(rng, 1, 5, 64)}, tolerance=2e-6)


def test_codes_are_those_of_the_evaluator() -> None:
    """A unit matrix hands codes times scales back, halves to even ones, bit for bit."""
    case, rng = Case(), np.random.default_rng(0)
    expr = matrix(case, "w", SCHEMES["int8"], 64, 64)
    case.store.tensors["w.codes"][...] = np.eye(64)
    case.store.tensors["w.s"][...] = 1
    case.op("linear", rounded(case, case.f32("x", B, T, 64)), weight(case, "w", expr), out="y", inputs="int8")
    x = normal(rng, 1, 40, 64) * np.float32(100)
    x[0, :20] = np.round(x[0, :20] * 2) / 2
    x[0, :20, ::32] = 127  # a scale of one, so that there are halves
    np.testing.assert_array_equal(case.run({"x": x})["y"], case.meaning({"x": x}, np.float32)["y"])
