"""Matrix products on packed weights: every scheme and every op that reads one, against the evaluator.

Codes are random bytes, so every code of a format occurs; scales include the smallest and zero.
"""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import pytest
from support import Arr, B, Case, T, ints, normal, usual_of

from dsv4c.errors import CompileError
from dsv4c.ir import quantised as q
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.formats import SCHEMES, Scheme
from dsv4c.ir.graph import Value
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime.cpu import cpu_flags
from dsv4c.targets.cpu.target import ARCHS

PACKED = [s for s in SCHEMES.values() if not s.plain]
HOST = [a.name for a in ARCHS if a.machine == os.uname().machine and cpu_flags().issuperset(a.requires)]
"""Archs that this machine can run."""
SIZES = [(1, 1), (1, 2), (2, 3), (1, 7), (3, 17)]
"""One row, rows below and above a register tile, more rows than share one decoding."""
NAN = {DType.F8E4M3: (0x7F, 0xFF), DType.F8E4M3FNUZ: (0x80,)}
EXPERTS, TOPK = 3, 2


def codes(rng: np.random.Generator, scheme: Scheme, rows: int, cols: int) -> Arr:
    raw = rng.integers(0, 256, scheme.code_shape(rows, cols)).astype(np.uint8)
    for nan in NAN.get(scheme.code, ()):
        raw[raw == nan] = 1
    return raw.view(scheme.code.storage)


def scales(rng: np.random.Generator, dtype: DType | None, shape: tuple[int, ...]) -> Arr:
    """Between 2^-6 and 2^2 or so; one in ten is the smallest code there is."""
    match dtype:
        case DType.F8E8M0:
            found = rng.integers(121, 130, shape).astype(np.uint8)
        case DType.F8E4M3:
            found = rng.integers(0x20, 0x48, shape).astype(np.uint8)
        case DType.BF16:
            found = rng.integers(0x3D00, 0x3F80, shape).astype(np.uint16)
        case _:
            found = rng.uniform(0.01, 1, shape).astype(np.float32)
    found[rng.uniform(size=shape) < 0.1] = 0
    return found


def matrix(c: Case, name: str, scheme: Scheme, rows: int, cols: int) -> WeightExpr:
    """A random matrix as it would come from a checkpoint."""
    assert scheme.scale is not None
    parts = [
        c.store.add(f"{name}.codes", scheme.code, codes(c.rng, scheme, rows, cols)),
        c.store.add(f"{name}.s", scheme.scale, scales(c.rng, scheme.scale, scheme.scale_shape(rows, cols))),
    ]
    if scheme.tensor_scale:
        parts.append(c.store.add(f"{name}.t", DType.F32, np.array([0.37], np.float32)))
    return q.decode(*parts, scheme=scheme)


def weight(c: Case, name: str, expr: WeightExpr) -> Value:
    c.b.loc = name
    return c.b.weight(expr, name)


def pair(c: Case, name: str, scheme: Scheme, rows: int, cols: int) -> WeightExpr:
    """Two matrices joined along their rows, where the scheme can say that."""
    if scheme.block[0] > 1:
        return matrix(c, name, scheme, 2 * rows, cols)
    return w.concat(tuple(matrix(c, f"{name}{i}", scheme, rows, cols) for i in "ab"))


@functools.cache
def linears(name: str, target: str = "cpu", rounded: bool = False) -> Case:
    """Ragged shapes: columns end inside a word, a block, a step, and rows inside a panel, a tile.

    With `rounded` inputs are rounded to BF16, and products may be summed in pairs.
    """
    c, scheme = Case(target), SCHEMES[name]
    for n, k in ((70, 70), (200, 136), (16, 6)):
        x = c.f32(f"x{k}", B, T, k)
        if scheme.plain:
            w_ = c.weight(f"w{k}", n, k, bf16=True, scale=0.3)
        else:
            w_ = weight(c, f"w{k}", matrix(c, f"w{k}", scheme, n, k))
        if rounded:
            c.op("linear", c.b.op("round_values", x, rule="bf16"), w_, out=f"y{k}", inputs="bf16")
        else:
            c.op("linear", x, w_, out=f"y{k}")
    return c


@functools.cache
def others(name: str, rounded: bool = False) -> Case:
    c, scheme, second = Case(), SCHEMES[name], PACKED[(PACKED.index(SCHEMES[name]) + 1) % len(PACKED)]

    def rows(x: Value) -> Value:
        return c.b.op("round_values", x, rule="bf16") if rounded else x

    inputs, experts = ("bf16", "bf16_rows") if rounded else ("any", "none")
    table = weight(c, "table", matrix(c, "table", scheme, 61, 70))
    c.op("embed", c.i32("tokens", B, T), table)
    groups = weight(c, "groups", matrix(c, "groups", scheme, 2 * 36, 70))
    c.op("grouped_linear", rows(c.f32("heads", B, T, 5, 28)), groups, groups=2, inputs=inputs)
    d, inner = 72, 40
    w13 = w.stack(tuple(pair(c, f"w13.{e}", scheme, inner, d) for e in range(EXPERTS)))
    w2 = w.stack(tuple(matrix(c, f"w2.{e}", second, d, inner) for e in range(EXPERTS)))
    x, ids, g = c.f32("x", B, T, d), c.i32("ids", B, T, TOPK), c.f32("g", B, T, TOPK)
    c.op(
        "expert_mlp", rows(x), ids, g, c.i32("n_valid", B), weight(c, "w13", w13), weight(c, "w2", w2),
        limit=9.0, rounding=experts,
    )  # fmt: skip
    return c


def inputs_of_linears(rng: np.random.Generator, b: int, t: int) -> dict[str, Arr]:
    return {f"x{k}": normal(rng, b, t, k) for k in (70, 136, 6)}


def inputs_of_others(rng: np.random.Generator, b: int, t: int) -> dict[str, Arr]:
    order = rng.permuted(np.tile(np.arange(EXPERTS), (b, t, 1)), axis=-1)
    return {
        "tokens": rng.integers(0, 61, (b, t)), "heads": normal(rng, b, t, 5, 28), "x": normal(rng, b, t, 72),
        "ids": order[..., :TOPK].astype(np.int32), "g": rng.uniform(0, 1, (b, t, TOPK)).astype(np.float32),
        "n_valid": np.full(b, t, np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("name", [s.name for s in PACKED])
def test_linear(name: str) -> None:
    for b, t in SIZES:
        linears(name).check(inputs_of_linears(np.random.default_rng(t), b, t), tolerance=2e-6)


@pytest.mark.parametrize("name", [s.name for s in PACKED])
def test_embed_grouped_linear_and_experts(name: str) -> None:
    """The experts' second half is in another scheme than the first."""
    for b, t in SIZES:
        others(name).check(inputs_of_others(np.random.default_rng(t), b, t), tolerance=4e-6)


@pytest.mark.parametrize("name", ["bf16", *(s.name for s in PACKED)])
def test_linear_of_bf16_rows(name: str) -> None:
    """By the instruction for pairs where the machine has it; tolerances are those of FP32 sums."""
    for b, t in (*SIZES, (1, 101)):
        inputs = inputs_of_linears(np.random.default_rng(t), b, t)
        linears(name, rounded=True).check(inputs, tolerance=2e-6)


@pytest.mark.parametrize("name", [s.name for s in PACKED])
def test_grouped_linear_and_experts_of_bf16_rows(name: str) -> None:
    """A hidden value that lies between two BF16 numbers may be rounded to either: one in a few hundred is."""
    for b, t in SIZES:
        inputs = inputs_of_others(np.random.default_rng(t), b, t)
        others(name, rounded=True).check(inputs, tolerance=1e-3)


@pytest.mark.parametrize("name", ["bf16", "mxfp4", "fp8", "fp8_f32", "int8", "int4", "nvfp4"])
def test_a_bf16_row_does_not_depend_on_its_neighbours(name: str) -> None:
    x = inputs_of_linears(np.random.default_rng(0), 1, 113)
    case = linears(name, rounded=True)
    whole = case.run(x)
    cuts = (0, 1, 3, 8, 13, 113)  # one row, two, five, and a last tile of one, two or more
    pieces = [case.run({k: v[:, a:b] for k, v in x.items()}) for a, b in itertools.pairwise(cuts)]
    for key, y in whole.items():
        joined = np.concatenate([p[key] for p in pieces], axis=1)
        np.testing.assert_array_equal(_without_vanishing(joined), _without_vanishing(y), err_msg=key)


def _without_vanishing(y: Arr) -> Arr:
    """Zeros for what is near the subnormal numbers, which tile registers take for zero in every addition."""
    return np.where(np.abs(y) < 2.0**-100, 0, y)


@pytest.mark.parametrize(
    ("name", "arch"),
    usual_of(
        itertools.product(("bf16", "mxfp4", "int4"), ("x86-64-v4-amx", "x86-64-v4-bf16")),
        lambda name, arch: name == "mxfp4",
    ),
)
def test_every_machine_compiles_for_others(name: str, arch: str) -> None:
    """Code for instructions that this machine may lack."""
    assert linears(name, f"cpu:{arch}", rounded=True).stored()


@pytest.mark.parametrize(
    ("name", "code"), [("mxfp4", 2), ("mxfp4", 252), ("mxfp8", 10), ("fp8", 246), ("fp8", 0), ("mxfp4", 0)]
)
def test_scales_at_the_ends_of_their_range(name: str, code: int) -> None:
    """Right to the last one that pairs have exponents for; with scales below, products vanish beside
    others."""
    case, scheme = Case(), SCHEMES[name]
    expr = matrix(case, "w", scheme, 16, 64)
    case.store.tensors["w.s"][...] = code
    x = case.b.op("round_values", case.f32("x", B, T, 64), rule="bf16")
    case.op("linear", x, weight(case, "w", expr), out="y", inputs="bf16")
    rows = normal(np.random.default_rng(code), 1, 5, 64) * np.float32(2.0 ** (60 if code < 127 else -60))
    if code:
        case.check({"x": rows}, tolerance=2e-6)
    else:
        assert np.abs(case.run({"x": rows})["y"]).max() < 2.0**-40


@pytest.mark.parametrize("name", [s.name for s in PACKED])
def test_codes_and_scales_stay_as_they_are_stored(name: str) -> None:
    scheme, stored = SCHEMES[name], others(name).stored()
    assert {stored[n] for n in ("table", "groups", "w13")} == {scheme.code}
    assert {stored[f"{n}.scale"] for n in ("table", "groups", "w13")} == {scheme.scale}
    assert {n.partition(".")[2] for n in stored} <= {"", "scale", "tensor_scale"}


@pytest.mark.parametrize("name", [s.name for s in PACKED])
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    """Bit for bit: however tokens are cut into calls, and whatever padding holds."""
    x = inputs_of_linears(np.random.default_rng(0), 1, 53)
    whole = linears(name).run(x)
    dirty = {k: v.copy() for k, v in x.items()}
    for v in dirty.values():
        v[:, 5:] = np.nan
    padded = linears(name).run(dirty)
    cuts = ((0, 1), (1, 8), (8, 21), (21, 53))  # groups of all heights, rows beside whole tiles
    pieces = [linears(name).run({k: v[:, a:b] for k, v in x.items()}) for a, b in cuts]
    for key, y in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[key] for p in pieces], axis=1), y, err_msg=key)
        np.testing.assert_array_equal(padded[key][:, :5], y[:, :5], err_msg=key)


def test_experts_do_not_depend_on_their_neighbours() -> None:
    case, x = others("nvfp4"), inputs_of_others(np.random.default_rng(3), 1, 40)
    whole = case.run(x)["expert_mlp"]

    def row(i: int) -> dict[str, Arr]:
        return {k: v[:, i : i + 1] for k, v in x.items() if k != "n_valid"} | {"n_valid": ints(1)}

    alone = [case.run(row(i)) for i in range(6)]
    np.testing.assert_array_equal(np.concatenate([a["expert_mlp"] for a in alone], axis=1), whole[:, :6])


LESSER = usual_of(
    itertools.product(("int8", "int4", "fp8", "fp8_fnuz", "mxfp4", "nvfp4"), HOST[1:]),
    lambda name, arch: name in ("fp8", "mxfp4") or arch == "x86-64-v3",
)


@pytest.mark.parametrize(("name", "arch"), LESSER)
def test_lesser_archs(name: str, arch: str) -> None:
    for b, t in SIZES:
        case = linears(name, f"cpu:{arch}")
        case.check(inputs_of_linears(np.random.default_rng(t), b, t), tolerance=2e-6)


@pytest.mark.parametrize(
    ("name", "part", "code"),
    [("fp8", "codes", 0xFF), ("fp8_fnuz", "codes", 0x80), ("mxfp4", "s", 0xFF), ("nvfp4", "s", 0x7F),
     ("int8", "s", np.nan), ("int4", "s", 0x7FC0)],
)  # fmt: skip
def test_nan_is_refused(name: str, part: str, code: float) -> None:
    """Kernels do not look for NaN, so nothing may be stored packed that holds one."""
    case = Case()
    expr = matrix(case, "w", SCHEMES[name], 16, 32)
    case.op("linear", case.f32("x", B, T, 32), weight(case, "w", expr))
    case.store.tensors[f"w.{part}"].flat[1 if part == "codes" else 0] = code
    with pytest.raises(CompileError, match=r"^w.*NaN cannot be stored packed"):
        case.run({"x": np.zeros((1, 1, 32))})
