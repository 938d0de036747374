"""Ascend kernels: what they compute, in Triton's interpreter; that they lower, by the compiler of the NPU.

Needs the environment of `targets/ascend/kernels` (make oracle); nothing here runs on a device.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import Arr, assert_close, ints, normal

from dsv4c.errors import CompileError
from dsv4c.ir.dtypes import bf16_to_f32, f32_to_bf16
from dsv4c.ir.meaning.evaluator import meaning_of
from dsv4c.ir.ops import OPS
from dsv4c.targets.ascend.kernels.routing import route
from dsv4c.targets.ascend.kernels.table import KERNELS, SOCS, kernel
from dsv4c.targets.ascend.kernels.toolchain import DEFAULT, Overflow, Request, Stage, Toolchain

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not DEFAULT.is_dir(), reason=f"no {DEFAULT}: make oracle"),
]

# Of the range of the result: sums in FP32 differ in order, and a result or a factor is rounded to its format.
TOLERANCE = {"fp32": 1e-6, "fp16": 2 * 2.0**-11, "bf16": 2 * 2.0**-9}
# Of architecture 2201. The compiler plans with all 192 KiB of UB; a device may keep 8 KiB and 256 bytes.
CAPACITY = {"ub": (184 << 10) - 256, "l1": 512 << 10, "l0c": 128 << 10}


@pytest.fixture(scope="session")
def tools() -> Toolchain:
    return Toolchain.find()


def meant(name: str, *operands: Arr, **attrs: Any) -> tuple[Arr, ...]:
    """The meaning of an op in float64, attributes not named at their defaults."""
    function, declared = meaning_of(name), {a.name: a.default for a in OPS[name].attrs}
    assert function is not None
    wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in operands]
    found = function(SimpleNamespace(attrs=declared | attrs), *wide)
    return found if isinstance(found, tuple) else (found,)


def stored(dtype: str, values: Arr) -> Arr:
    """As the interpreter takes it."""
    if dtype == "bf16":
        return f32_to_bf16(values.astype(np.float32))
    return values.astype({"fp32": np.float32, "fp16": np.float16}[dtype])


def plain(dtype: str, array: Arr) -> Arr:
    return bf16_to_f32(array) if dtype == "bf16" else array.astype(np.float32)


def call(name: str, grid: tuple[int, ...], constants: dict[str, int], **arguments: Any) -> dict[str, Any]:
    """One launch; an argument is the name of an array, or a number."""
    found = kernel(name)
    assert set(arguments) == set(found.arguments), name
    where = {"module": found.module, "function": name, "grid": grid}
    return where | {"constants": constants, "arguments": arguments}


def blocks_of(size: int, block: int) -> int:
    return -(-size // block)


# ---------------------------------------------------------------------------------------- experts

D, INNER, EXPERTS, LIMIT = 40, 24, 5, 1.5


def picks(case: str) -> tuple[Arr, Arr]:
    """(ids [B,T,k], n_valid [B])."""
    rng = np.random.default_rng(5)
    if case == "one expert takes all":
        return np.full((2, 21, 1), 3, np.int32), ints(21, 21)
    if case == "nothing is routed":
        return np.zeros((2, 3, 2), np.int32), ints(0, 0)
    experts = EXPERTS if case == "all" else 3  # the last two get nothing
    ids = np.stack([rng.permutation(experts)[:3] for _ in range(2 * 19)]).astype(np.int32)
    return ids.reshape(2, 19, 3), ints(19, 6)


def experts(tools: Toolchain, dtype: str, ids: Arr, n_valid: Arr, rounding: str = "none") -> tuple[Arr, Arr]:
    """(found, wanted) [B,T,d] of one routed call; padding holds NaN."""
    rng, (batch, count, k) = np.random.default_rng(3), ids.shape
    x, weights = normal(rng, batch, count, D), rng.random(ids.shape).astype(np.float32)
    w13, w2 = normal(rng, EXPERTS, 2 * INNER, D) / 4, normal(rng, EXPERTS, D, INNER) / 4
    x, w13, w2 = (plain(dtype, stored(dtype, a)) for a in (x, w13, w2))
    routing = route(ids, n_valid, EXPERTS, 16)
    rows, groups = len(routing.tokens), len(routing.blocks)
    arrays = {
        "x": stored(dtype, x.reshape(-1, D)[routing.tokens]), "w13": stored(dtype, w13),
        "w2": stored(dtype, w2), "weights": weights.reshape(-1)[routing.picks], "blocks": routing.blocks,
        "hidden": stored(dtype, np.full((rows, INNER), np.nan)), "slots": routing.slots,
        "y": stored(dtype, np.full((rows, D), np.nan)),
        "out": np.full((batch * count, D), np.nan, np.float32),
    }  # fmt: skip
    tile = {"D": D, "INNER": INNER, "BM": 16, "BN": 16, "BK": 16}
    calls = [
        call("expert_up", (groups, blocks_of(INNER, 16)), {**tile, "ROUND": int(rounding != "none")}, x="x",
             w13="w13", weights="weights", blocks="blocks", hidden="hidden", limit=LIMIT),
        call("expert_down", (groups, blocks_of(D, 16)), tile, hidden="hidden", w2="w2", blocks="blocks",
             y="y"),
        call("expert_sum", (batch * count, blocks_of(D, 32)), {"D": D, "K": k, "BN": 32}, y="y",
             slots="slots", out="out"),
    ]  # fmt: skip
    found = tools.interpret(calls if rows else calls[2:], arrays)["out"].reshape(x.shape)
    (want,) = meant("expert_mlp", x, ids, weights, n_valid, w13, w2, limit=LIMIT, rounding=rounding)
    return found, want


@pytest.mark.parametrize("case", ["all", "empty experts", "one expert takes all", "nothing is routed"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts(tools: Toolchain, dtype: str, case: str) -> None:
    found, want = experts(tools, dtype, *picks(case))
    assert_close(case, found, want, TOLERANCE[dtype])


def test_experts_round_where_the_reference_rounds(tools: Toolchain) -> None:
    found, want = experts(tools, "bf16", *picks("all"), rounding="bf16")
    assert_close("rounded", found, want, TOLERANCE["bf16"])
    same = np.abs(found - want) <= 2e-6 * np.abs(want).max()
    assert same.mean() > 0.9, "a rounding point stands elsewhere: most values should agree to the bit"
    unrounded, _ = experts(tools, "bf16", *picks("all"))
    assert (np.abs(unrounded - want) <= 2e-6 * np.abs(want).max()).mean() < 0.9


# -------------------------------------------------------------------------------------- attention


def attend(
    tools: Toolchain, dtype: str, a: dict[str, Arr], window: int, ratio: int, k: int, block: int = 16
) -> Arr:
    """`out` [B,T,H,D] of one launch over the arrays of `attention_case`."""
    (batch, count, heads, d), bd = a["q"].shape, 1 << (a["q"].shape[3] - 1).bit_length()
    floats = ("q", "kv", "ring", "entries")
    arrays = {n: stored(dtype, v) if n in floats else v for n, v in a.items()}
    arrays["out"] = stored(dtype, np.full(a["q"].shape, np.nan))
    sizes = {"H": heads, "D": d, "WINDOW": window, "RING": a["ring"].shape[1], "RATIO": ratio, "K": k}
    launch = call(
        "sparse_attention", (batch * count, blocks_of(heads, 16)), {**sizes, "BD": bd, "BH": 16, "BK": block},
        **{n: n for n in arrays}, T=count, C=a["entries"].shape[1], scale=d**-0.5,
    )  # fmt: skip
    return plain(dtype, tools.interpret([launch], arrays)["out"])


def attention_case(
    dtype: str, pos: Arr, n_valid: Arr, count: int, heads: int, d: int, window: int, ratio: int, k: int
) -> dict[str, Arr]:
    """Operands in which everything that must not be read is NaN."""
    rng, batch, capacity = np.random.default_rng(window), len(pos), 20
    a = {
        "q": normal(rng, batch, count, heads, d), "kv": normal(rng, batch, count, d),
        "ring": np.full((batch, window, d), np.nan, np.float32), "sinks": normal(rng, heads), "pos": pos,
        "n_valid": n_valid, "entries": np.full((batch, capacity, d), np.nan, np.float32),
        "selected": np.full((batch, count, max(k, 1)), -1, np.int32),
    }  # fmt: skip
    for b in range(batch):
        a["q"][b, n_valid[b] :] = a["kv"][b, n_valid[b] :] = np.nan
        for p in range(max(0, pos[b] - window), pos[b]):
            a["ring"][b, p % window] = normal(rng, d)
        seen = int(pos[b] + n_valid[b]) // ratio if ratio else 0
        a["entries"][b, :seen] = normal(rng, seen, d)
        for t in range(count if k else 0):
            some = rng.permutation(int(pos[b] + t + 1) // ratio)[:k]
            a["selected"][b, t, : len(some)] = some
    return {
        n: plain(dtype, stored(dtype, v)) if v.ndim > 2 and v.dtype.kind == "f" else v for n, v in a.items()
    }


ATTENTION = [
    # heads, width, window, ratio, selected: odd sizes, a ring that wraps inside a block and one that does not
    ("fp32", 3, 40, 5, 0, 0),
    ("fp32", 17, 32, 16, 2, 0),
    ("fp32", 16, 24, 3, 2, 3),
    ("fp32", 2, 16, 1, 4, 2),
    ("fp32", 2, 16, 32, 2, 20),
    ("fp16", 5, 32, 16, 2, 3),
    ("bf16", 5, 40, 16, 2, 0),
    ("bf16", 5, 32, 6, 2, 3),
]


@pytest.mark.parametrize(("dtype", "heads", "d", "window", "ratio", "k"), ATTENTION)
def test_attention(tools: Toolchain, dtype: str, heads: int, d: int, window: int, ratio: int, k: int) -> None:
    starts = sorted({*range(min(window, 6) + 2), *range(window - 1, window + 2), 2 * window - 1, 2 * window})
    starts = [p for p in starts if not ratio or p + 4 <= 20 * ratio]
    pos, count = ints(*starts), 4
    n_valid = ints(*((4, 3, 1, 4, 0)[i % 5] for i in range(len(starts))))
    a = attention_case(dtype, pos, n_valid, count, heads, d, window, ratio, k)
    operands = [a[n] for n in ("q", "kv", "ring", "sinks", "pos", "n_valid")]
    operands += [a["entries"]] if ratio else []
    operands += [a["selected"]] if k else []
    (want,) = meant("attention", *operands, window=window, ratio=ratio, scale=d**-0.5, rounding="none")
    assert_close("attention", attend(tools, dtype, a, window, ratio, k), want, TOLERANCE[dtype])


def test_a_prompt_may_be_cut_anywhere(tools: Toolchain) -> None:
    window, count, d, cut = 24, 37, 16, 29
    a = attention_case("fp32", ints(0), ints(count), count, 2, d, window, 2, 5)
    whole = attend(tools, "fp32", a, window, 2, 5)
    ring = np.full_like(a["ring"], np.nan)
    for p in range(cut - window, cut):
        ring[0, p % window] = a["kv"][0, p]
    parts = ("q", "kv", "selected")
    later = {n: v[:, cut:] if n in parts else v for n, v in a.items()}
    later |= {"pos": ints(cut), "n_valid": ints(count - cut), "ring": ring}
    np.testing.assert_array_equal(attend(tools, "fp32", later, window, 2, 5), whole[:, cut:])


# ------------------------------------------------------------------------------------- compressor


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (8, True), (16, False), (1, False)])
def test_compress(tools: Toolchain, dtype: str, ratio: int, overlap: bool) -> None:
    rng, width, count, twice = np.random.default_rng(ratio), 24, 11, 2 if overlap else 1
    pos = ints(*range(2 * ratio + 2))
    n_valid = ints(*((count, min(ratio - 1, count), 0, 5)[i % 4] for i in range(len(pos))))
    channels, rows, groups = twice * width, twice * ratio, blocks_of(count, ratio)
    arrays = {n: normal(rng, len(pos), count, channels) for n in ("kv", "gate")}
    arrays |= {n: normal(rng, len(pos), rows, channels) for n in ("kv_ring", "gate_ring")}
    for b, start in enumerate(pos):
        for name in ("kv", "gate"):
            arrays[name][b, n_valid[b] :] = np.nan
            arrays[f"{name}_ring"][b, [s for s in range(rows) if s >= start]] = np.nan
    raw = {n: stored(dtype, v) for n, v in arrays.items()}
    arrays = {n: plain(dtype, v) for n, v in raw.items()}
    raw |= {"pos": pos, "n_valid": n_valid, "out": stored(dtype, np.full((len(pos), groups, width), np.nan))}
    launch = call(
        "compress", (len(pos) * groups, blocks_of(width, 16)),
        {"RATIO": ratio, "WIDTH": width, "OVERLAP": int(overlap), "BC": 16}, **{n: n for n in raw}, T=count,
        G=groups,
    )  # fmt: skip
    found = plain(dtype, tools.interpret([launch], raw)["out"])
    (want,) = meant("compress", *arrays.values(), pos, n_valid, ratio=ratio, overlap=overlap)
    assert_close("compress", found, want, TOLERANCE[dtype])


# ------------------------------------------------------------------- hyper-connections and engram


def test_hyper_connection(tools: Toolchain) -> None:
    rng, rows, n, d = np.random.default_rng(1), 19, 4, 40
    a = {
        "x": normal(rng, rows, n, d), "fn": normal(rng, n * (2 + n), n * d), "base": normal(rng, n * (2 + n)),
        "scale": normal(rng, 3), "y": normal(rng, rows, d), "mixed": np.zeros((rows, 24), np.float32),
    }  # fmt: skip
    shapes = {
        "pre": (rows, n),
        "post": (rows, n),
        "comb": (rows, n, n),
        "less": (rows, d),
        "more": (rows, n, d),
    }
    arrays = a | {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    width = {"D": d, "N": n, "BN": 32}
    calls = [
        call("hc_project", (2,), {"WIDTH": n * d, "COLUMNS": 24, "BN": 32, "BM": 16, "BK": 32}, streams="x",
             fn="fn", out="mixed", ROWS=rows, norm_eps=1e-6),
        call("hc_sinkhorn", (3,), {"N": n, "ITERS": 20, "BM": 8}, mixed="mixed", base="base", scale="scale",
             pre="pre", post="post", comb="comb", ROWS=rows, eps=1e-5),
        call("hc_collapse", (rows, 2), width, streams="x", pre="pre", out="less"),
        call("hc_expand", (rows, 2), width, streams="x", y="y", post="post", comb="comb", out="more"),
    ]  # fmt: skip
    found = tools.interpret(calls, arrays)
    x = a["x"][None]
    mix = meant("hc_mix", x, a["fn"], a["base"], a["scale"], eps=1e-5, norm_eps=1e-6, iters=20)
    want = dict(zip(("pre", "post", "comb"), mix, strict=True))
    want |= {"less": meant("hc_collapse", x, mix[0])[0]}
    want |= {"more": meant("hc_expand", x, a["y"][None], mix[1], mix[2])[0]}
    for name, value in want.items():
        assert_close(name, found[name], value[0], TOLERANCE["fp32"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("copysign", "residual", "dead"), [(1, 1, 1), (0, 0, 0), (0, 1, 1)])
def test_engram_gate(tools: Toolchain, dtype: str, copysign: int, residual: int, dead: int) -> None:
    rng, rows, n, d = np.random.default_rng(2), 7, 3, 40
    shapes = {"x": (rows, n, d), "kv": (rows, (n + 1) * d), "q_weight": (n, d), "k_weight": (n, d)}
    raw = {name: stored(dtype, normal(rng, *shape)) for name, shape in shapes.items()}
    raw["x"][3] = 0  # no direction at all
    a = {name: plain(dtype, v) for name, v in raw.items()}
    ids = ints(4, -1, 0, 7, -1, 2, 9)
    raw |= {"ids": ids, "out": np.zeros_like(raw["x"])}
    sizes = {"N": n, "D": d, "COPYSIGN": copysign, "RESIDUAL": residual, "DEAD": dead, "BN": 16}
    launch = call("engram_gate", (rows, n), sizes, **{name: name for name in raw}, eps=1e-6, floor=1e-6)
    found = plain(dtype, tools.interpret([launch], raw)["out"])
    operands = [a["x"][None], a["kv"][None], a["q_weight"], a["k_weight"], *([ids[None]] if dead else [])]
    attrs = {"eps": 1e-6, "floor": 1e-6, "copysign": bool(copysign), "residual": bool(residual)}
    assert_close("gate", found, meant("engram_gate", *operands, **attrs)[0][0], TOLERANCE[dtype])


# --------------------------------------------------------------------------------------- compiler

VARIANTS: list[tuple[str, dict[str, int]]] = [(k.name, {}) for k in KERNELS] + [
    ("sparse_attention", {"RATIO": 0, "K": 0}),
    ("sparse_attention", {"RATIO": 128, "K": 0}),
    ("compress", {"RATIO": 128, "OVERLAP": 0}),
    ("engram_gate", {"COPYSIGN": 0, "RESIDUAL": 0, "DEAD": 0}),
]


@pytest.mark.parametrize(
    ("soc", "dtype"), [(SOCS[0], "bf16"), (SOCS[1], "bf16"), (SOCS[0], "fp32"), (SOCS[1], "fp16")]
)
@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_the_compiler_takes_it(
    tools: Toolchain, tmp_path: Path, name: str, sizes: dict[str, int], soc: str, dtype: str
) -> None:
    choice = tools.tiles_that_fit(name, soc, tmp_path, dtype=dtype, sizes=sizes)
    last = choice.tried[-1]
    print(soc, dtype, name, sizes, dict(choice.tiles), last.mode, dict(last.memory), *last.notes)
    assert last.stage >= Stage.HIVM and last.files["hivm"].is_file()
    assert last.memory and all(last.memory[m] <= CAPACITY[m] for m in last.memory)
    assert all(t.overflow is not None for t in choice.tried[:-1])


def test_a_tile_too_large_names_the_memory(tools: Toolchain, tmp_path: Path) -> None:
    tiles = {"BM": 512, "BN": 512, "BK": 64}
    found = tools.lower(Request(kernel("expert_down"), SOCS[0], tiles), tmp_path)
    assert found.stage is Stage.LINALG and found.overflow == Overflow("l0c", 512 * 512 * 4, CAPACITY["l0c"])
    with pytest.raises(CompileError, match="l0c holds 131072 bytes and 1048576 are needed"):
        found.require()


def test_a_kernel_that_does_not_compile_is_an_answer(tools: Toolchain, tmp_path: Path) -> None:
    request = Request(kernel("expert_sum"), SOCS[0], {"BN": 0})
    found = tools.lower(request, tmp_path)
    assert found.stage is Stage.NONE and "arange" in found.error
    with pytest.raises(CompileError, match="stopped after none"):
        found.require()
