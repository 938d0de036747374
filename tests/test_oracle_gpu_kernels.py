"""GPU kernels: what they compute, in Triton's interpreter, launched by the plans that the emitter makes of
ops.

Every case goes through lowering, plan, the check of every launch, and an interpreter that holds every access
to what the kernel's parameter declares. Needs Triton (pip install "dsv4c[gpu]"), no device and no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_support import Interpreter, check_case, interpreter
from support import CTX, Arr, B, Case, T, ints, normal, poison, valid_rows
from test_kernels_attention import SHAPES, attention, calls, selection, stale, visible
from test_kernels_engram import compression, gate, hashing, plain_table, scaled_table
from test_kernels_packed import linears, matrix, others, weight

from dsv4c.ir.formats import SCHEMES
from dsv4c.runtime.container import Artifact

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def worker() -> Iterator[Interpreter]:
    with interpreter() as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "case.dsv4"


# --------------------------------------------------------------------------------------- products

STORED = [s for s in SCHEMES if s != "fp16"]


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "bf16"])
@pytest.mark.parametrize("name", STORED)
def test_linear_of_every_storage(worker: Interpreter, path: Path, name: str, rounded: bool) -> None:
    """Columns end inside a word, a block and a step of the kernel; codes are random bytes."""
    if name == "f32" and rounded:
        pytest.skip("FP32 weights are never multiplied as BF16")
    case = linears(name, rounded=rounded)
    for b, t in ((1, 1), (3, 17)):
        rng = np.random.default_rng(t)
        check_case(case, {f"x{k}": normal(rng, b, t, k) for k in (70, 136, 6)}, worker, path)


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "bf16"])
@pytest.mark.parametrize("name", [s.name for s in SCHEMES.values() if not s.plain])
def test_tables_groups_and_experts_of_every_storage(
    worker: Interpreter, path: Path, name: str, rounded: bool
) -> None:
    case, rng, n_valid = others(name, rounded), np.random.default_rng(1), ints(5, 2)
    inputs = {
        "tokens": rng.integers(0, 61, (2, 5)).astype(np.int32), "heads": normal(rng, 2, 5, 5, 28),
        "x": poison(normal(rng, 2, 5, 72), n_valid), "ids": rng.integers(0, 3, (2, 5, 2)).astype(np.int32),
        "g": rng.uniform(size=(2, 5, 2)).astype(np.float32), "n_valid": n_valid,
    }  # fmt: skip
    # hidden values that are rounded to BF16 may fall to either side of a tie
    check_case(case, inputs, worker, path, 2e-3 if rounded else 5e-6)


def test_codes_of_gfx942_are_half_as_much(worker: Interpreter, path: Path) -> None:
    """The same bytes under FNUZ are half the numbers: exactly, in every product."""
    found = []
    for name in ("fp8", "fp8_fnuz"):
        case = Case()
        rng = np.random.default_rng(0)
        raw = rng.integers(0, 0x7F, (32, 128)).astype(np.uint8) | (rng.integers(0, 2, (32, 128)) << 7).astype(
            np.uint8
        )
        raw[raw == 0x80] = 0
        expr = matrix(case, "w", SCHEMES[name], 32, 128)
        case.store.tensors["w.codes"] = raw.view(SCHEMES[name].code.storage)
        case.store.tensors["w.s"] = np.full((1, 1), 127, np.uint8)
        case.op("linear", case.f32("x", B, T, 128), weight(case, "w", expr), out="y")
        x = {"x": normal(np.random.default_rng(2), 1, 3, 128)}
        found.append(check_case(case, x, worker, path, arch="gfx942")["y"])
    np.testing.assert_array_equal(found[0], 2 * found[1])
    assert np.abs(found[0]).max() > 1


@functools.cache
def experts(count: int, topk: int, bf16: bool) -> Case:
    c = Case()
    d, inner = 40, 24
    operands = [c.f32("x", B, T, d), c.i32("ids", B, T, topk), c.f32("g", B, T, topk), c.i32("n_valid", B)]
    w13 = c.weight("w13", count, 2 * inner, d, bf16=bf16, scale=0.3)
    w2 = c.weight("w2", count, d, inner, bf16=bf16, scale=0.3)
    c.op("expert_mlp", *operands, w13, w2, limit=1.5)
    return c


@pytest.mark.parametrize(
    "case", ["all", "empty experts", "one expert takes all", "nothing is routed", "decode"]
)
@pytest.mark.parametrize("bf16", [True, False])
def test_experts(worker: Interpreter, path: Path, case: str, bf16: bool) -> None:
    rng, t, topk = np.random.default_rng(5), 1 if case == "decode" else 21, 3
    n_valid = ints(0, 0) if case == "nothing is routed" else ints(t, max(1, t // 3))
    chosen = 3 if case == "empty experts" else 5
    ids = (
        np.stack([rng.permutation(chosen)[:topk] for _ in range(2 * t)]).astype(np.int32).reshape(2, t, topk)
    )
    if case == "one expert takes all":
        ids[...] = 3
    inputs = {"ids": ids, "n_valid": n_valid, "g": rng.uniform(size=ids.shape).astype(np.float32)}
    inputs["x"] = poison(normal(rng, 2, t, 40), n_valid)
    found = check_case(experts(5, topk, bf16), inputs, worker, path, 5e-6)["expert_mlp"]
    assert np.isfinite(found).all() and not found[~valid_rows(n_valid, t)].any()


# -------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1, 5])
def test_attention_at_every_offset(
    worker: Interpreter, path: Path, shape: tuple[int, int, int, int, int], t: int
) -> None:
    heads, d, window, ratio, k = shape
    case = attention(*shape)
    for pos, n_valid in calls(window, t)[:: 1 if window < 10 else 4] + (
        calls(ratio, t)[::3] if ratio else []
    ):
        rng = np.random.default_rng(t)
        inputs = {
            "tokens": np.zeros((3, t), np.int32), "pos": pos, "n_valid": n_valid,
            "q": poison(normal(rng, 3, t, heads, d) * 2, n_valid),
            "kv": poison(normal(rng, 3, t, d), n_valid),
            "ring": stale(normal(rng, 3, window, d), pos - window, pos),
        }  # fmt: skip
        if ratio:
            inputs["entries"] = stale(normal(rng, 3, 48, d), 0 * pos, visible(pos, n_valid, ratio))
        if k:
            inputs["selected"] = selection(rng, pos, t, ratio, k)
        found = check_case(case, inputs, worker, path)["attention"]
        assert np.isfinite(found).all(), f"garbage leaks at pos {pos}, n_valid {n_valid}"


def test_windows_longer_than_a_block_and_cut_anywhere(worker: Interpreter, path: Path) -> None:
    """One prompt, whole and in two calls: the same bits, because blocks stand at absolute positions."""
    case, rng, t, cut = attention(2, 24, 40, 0, 0), np.random.default_rng(3), 41, 23
    q, kv = normal(rng, 1, t, 2, 24), normal(rng, 1, t, 24)
    empty = np.full((1, 40, 24), np.nan, np.float32)
    base = {"tokens": np.zeros((1, t), np.int32), "pos": ints(0), "n_valid": ints(t), "ring": empty}
    whole = check_case(case, {**base, "q": q, "kv": kv}, worker, path)["attention"]
    ring = empty.copy()
    ring[0, :cut] = kv[0, :cut]
    later = {
        "tokens": np.zeros((1, t - cut), np.int32),
        "pos": ints(cut),
        "n_valid": ints(t - cut),
        "ring": ring,
    }
    found = check_case(case, {**later, "q": q[:, cut:], "kv": kv[:, cut:]}, worker, path)["attention"]
    np.testing.assert_array_equal(found, whole[:, cut:])


@functools.cache
def selecting(heads: int, d: int, ratio: int, k: int) -> Case:
    c = Case()
    _, pos, n_valid = c.step()
    operands = [c.f32("q", B, T, heads, d), c.f32("w", B, T, heads), c.f32("keys", B, CTX, d), pos, n_valid]
    c.op("index_select", *operands, ratio=ratio, k=k)
    return c


@pytest.mark.parametrize("shape", [(1, 7, 2, 3), (17, 32, 1, 8), (64, 16, 4, 40), (3, 20, 1, 700)])
@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_index_select(
    worker: Interpreter, path: Path, shape: tuple[int, int, int, int], t: int, ties: bool
) -> None:
    """Selections as sets; of equal scores the lower entries are taken, -1 stands behind."""
    heads, d, ratio, _ = shape
    case, rng, room = selecting(*shape), np.random.default_rng(heads), 1100 // ratio
    pos, n_valid = ints(0, 1090 - t, 9 * ratio), ints(t, t, t - 1)
    keys = (
        np.round(normal(rng, 3, room, d)) * (rng.uniform(size=(3, room, 1)) < 0.3)
        if ties
        else normal(rng, 3, room, d)
    )
    inputs = {
        "tokens": np.zeros((3, t), np.int32), "pos": pos, "n_valid": n_valid,
        "q": poison(np.round(normal(rng, 3, t, heads, d)), n_valid),
        "w": poison(np.round(normal(rng, 3, t, heads)), n_valid),
        "keys": stale(keys.astype(np.float32), 0 * pos, visible(pos, n_valid, ratio)),
    }  # fmt: skip
    with np.errstate(invalid="ignore"):
        want = case.meaning(inputs)["index_select"]
    case_found = _found(case, inputs, worker, path)["index_select"]
    real = valid_rows(n_valid, t)
    np.testing.assert_array_equal(np.sort(case_found[real]), np.sort(want[real]))
    assert ((case_found[..., 1:] < 0) | (case_found[..., :-1] >= 0)).all(), "-1 stands in front of an entry"


def _found(case: Case, inputs: dict[str, Arr], worker: Interpreter, path: Path) -> dict[str, Arr]:
    from gpu_support import write_draft

    write_draft(case.module, case.store, path)
    ((outputs, _),) = worker.run(path, [({n: inputs[n] for n in case.module.inputs}, {})])
    return dict(outputs)


@functools.cache
def closing(ratio: int, overlap: bool, width: int) -> Case:
    c, half, twice = Case(), 4, 2 if overlap else 1
    _, pos, n_valid = c.step()
    channels, rows = twice * width, twice * ratio
    entries = c.state("entries", B, CTX, width)
    groups = (T + (ratio - 1)) // ratio
    operands = [c.f32("kv", B, T, channels), c.f32("gate", B, T, channels)]
    operands += [c.f32("kv_ring", B, rows, channels), c.f32("gate_ring", B, rows, channels)]
    operands += [c.weight("norm", width), c.f32("cos", B, groups, half), c.f32("sin", B, groups, half)]
    c.module.outputs["entries"] = c.b.op(
        "entries_close", entries, *operands, pos, n_valid, ratio=ratio, overlap=overlap, eps=1e-6
    )
    return c


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (16, False), (1, False), (2, True)])
def test_entries_close(worker: Interpreter, path: Path, ratio: int, overlap: bool) -> None:
    width, t, twice, rng = 24, 11, 2 if overlap else 1, np.random.default_rng(ratio)
    pos = ints(*range(2 * ratio + 2))
    n_valid = ints(*((t, min(ratio - 1, t), 0, 5)[i % 4] for i in range(len(pos))))
    b, groups = len(pos), -(-t // ratio)
    inputs = {n: poison(normal(rng, b, t, twice * width), n_valid) for n in ("kv", "gate")}
    for name in ("kv_ring", "gate_ring"):
        inputs[name] = stale(normal(rng, b, twice * ratio, twice * width), 0 * pos, pos)
    angle = normal(rng, b, groups, 4)
    inputs |= {"cos": np.cos(angle), "sin": np.sin(angle), "pos": pos, "n_valid": n_valid}
    inputs |= {"tokens": np.zeros((b, t), np.int32), "entries": normal(rng, b, 40, width)}
    check_case(closing(ratio, overlap, width), inputs, worker, path)


# ------------------------------------------------------------------------------ rows, router, state


@functools.cache
def rows(d: int, heads: int, half: int) -> Case:
    """Ops on rows, some of them on parts of wider rows."""
    c = Case()
    tokens, pos, n_valid = c.step()
    x, cos, sin = c.f32("x", B, T, heads * d + 8), c.f32("cos", B, T, half), c.f32("sin", B, T, half)
    first, rest = c.b.multi("split_columns", x, widths=(heads * d, 8)).results
    split = c.b.op("split_heads", first, heads=heads)
    c.op("rms_norm", first, c.weight("n", heads * d), eps=1e-6)
    c.op("unit_norm", split, eps=1e-6)
    c.op("norm_rotary", split, cos, sin, eps=1e-6)
    c.op("norm_rotary", split, cos, sin, c.weight("m", d), eps=1e-6, out="weighted")
    c.op("rotary", split, cos, sin, inverse=True, out="back")
    c.op("rotary", split, cos, sin, halves=True, out="halves")
    c.op("add", rest, rest)
    c.op("scale", rest, factor=-0.3)
    c.op("clamp", rest, low=-0.5, high=0.75)
    c.op("sqrt_softplus", rest)
    c.op("swiglu", rest, rest)
    c.op("clamped_swiglu", rest, rest, limit=0.7)
    c.op("round_values", rest, rule="bf16")
    c.op("repeat_streams", first, n=3)
    c.op("gather_rows", rest, c.i32("rows", B, CTX))
    c.op("position_bias", rest, c.weight("bias", 3, 8), pos)
    c.op("positions", tokens, pos)
    c.op("entry_positions", tokens, pos, ratio=4)
    frequencies = c.weight("f", half, scale=0.01)
    c.multi("rope_angles", c.b.op("positions", tokens, pos), frequencies, outs=("c", "s"))
    ring = c.state("ring", B, 5, 8)
    c.module.outputs["ring"] = c.b.op("ring_write", ring, rest, pos, n_valid)
    return c


@pytest.mark.parametrize("shape", [(40, 3, 8), (16, 1, 8), (9, 2, 4)])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 13)])
def test_rows_and_state(worker: Interpreter, path: Path, shape: tuple[int, int, int], b: int, t: int) -> None:
    d, heads, half = shape
    rng, n_valid, pos = np.random.default_rng(d), ints(t, t // 2, 0)[:b], ints(3, 70000, 11)[:b]
    angle = normal(rng, b, t, half)
    inputs = {
        "tokens": np.zeros((b, t), np.int32), "pos": pos, "n_valid": n_valid,
        "x": normal(rng, b, t, heads * d + 8) * 3, "cos": np.cos(angle), "sin": np.sin(angle),
        "rows": rng.integers(0, t, (b, 2)).astype(np.int32), "ring": normal(rng, b, 5, 8),
    }  # fmt: skip
    check_case(rows(*shape), inputs, worker, path)


@functools.cache
def routing(experts_: int, k: int) -> Case:
    c = Case()
    scores = c.f32("scores", B, T, experts_)
    bias = c.rng.standard_normal(experts_).astype(np.float32) / 8
    bias[2] = -np.inf
    ids = c.op("route_topk", scores, c.weight_of("bias", bias), k=k)
    weights = c.op("route_weights", scores, ids, factor=1.5, eps=1e-20)
    c.multi("add_route", ids, weights, expert=experts_, outs=("more_ids", "more_weights"))
    table = np.stack([np.random.default_rng(i).permutation(experts_)[:k] for i in range(31)]).astype(np.int32)
    c.op("route_hash", c.i32("tokens", B, T), c.weight_of("table", table))
    return c


@pytest.mark.parametrize(("experts_", "k"), [(8, 2), (33, 6), (5, 4), (256, 6)])
def test_router(worker: Interpreter, path: Path, experts_: int, k: int) -> None:
    rng = np.random.default_rng(k)
    scores = np.round(rng.uniform(size=(2, 7, experts_)) * 8).astype(np.float32) / 8  # many ties
    tokens = rng.integers(0, 31, (2, 7)).astype(np.int32)
    check_case(routing(experts_, k), {"scores": scores, "tokens": tokens}, worker, path)


@functools.cache
def hyper(n: int, d: int) -> Case:
    c = Case()
    streams, y = c.f32("streams", B, T, n, d), c.f32("y", B, T, d)
    parts = [c.weight("fn", n * (2 + n), n * d), c.weight("base", n * (2 + n)), c.weight("scale", 3)]
    outs = ("pre", "post", "comb")
    pre, post, comb = c.multi("hc_mix", streams, *parts, eps=1e-6, norm_eps=1e-6, iters=20, outs=outs).results
    c.op("hc_collapse", streams, pre)
    c.op("hc_expand", streams, y, post, comb)
    head = [c.weight("hf", n, n * d), c.weight("hb", n), c.weight("hs", 1)]
    c.op("hc_head_mix", streams, *head, eps=1e-6, norm_eps=1e-6)
    return c


@pytest.mark.parametrize(("n", "d"), [(4, 40), (2, 300), (4, 128)])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 19)])
def test_hyper_connections(worker: Interpreter, path: Path, n: int, d: int, b: int, t: int) -> None:
    rng = np.random.default_rng(d)
    inputs = {"streams": normal(rng, b, t, n, d), "y": normal(rng, b, t, d)}
    check_case(hyper(n, d), inputs, worker, path, 1e-5)


# ----------------------------------------------------------------------------------------- engram


@pytest.mark.parametrize("dead", [False, True])
def test_classes_and_rows_of_ngrams_are_exact(worker: Interpreter, path: Path, dead: bool) -> None:
    rng, b, t = np.random.default_rng(2), 3, 13
    drawn = rng.integers(-5, 70, (b, t)).astype(np.int32)
    check_case(compression(dead), {"tokens": drawn}, worker, path)
    for heads, orders, slots in ((2, 3, 3), (1, 3, 5), (3, 2, 2)):
        for start in (0, 2, 50):
            ids = np.where(rng.random((b, t)) < 0.3, -1, rng.integers(0, 400, (b, t)))
            history = np.where(rng.random((b, slots)) < 0.3, -1, rng.integers(0, 400, (b, slots)))
            inputs = {
                "tokens": ids, "history": history, "pos": start + np.arange(b),
                "n_valid": np.array([t, 2, 0]),
            }  # fmt: skip
            given = {k: v.astype(np.int32) for k, v in inputs.items()}
            check_case(hashing(heads, orders, slots, dead), given, worker, path)


@pytest.mark.parametrize(("width", "groups"), [(32, 1), (96, 3), (15, 5), (17, 0)])
def test_rows_of_tables_are_exact(worker: Interpreter, path: Path, width: int, groups: int) -> None:
    rows_ = np.random.default_rng(4).integers(-1, 37, (2, 5, 3)).astype(np.int32)
    rows_[0, 0] = 0, -1, 36
    case = scaled_table(width, groups) if groups else plain_table(width, False)
    found = check_case(case, {"rows": rows_}, worker, path, 0)["engram_rows"]
    assert not found.reshape(2, 5, 3, -1)[rows_ < 0].any()


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("copysign", "residual"), [(True, True), (False, False)])
@pytest.mark.parametrize(("n", "d"), [(4, 16), (3, 61)])
def test_engram_gate(
    worker: Interpreter, path: Path, n: int, d: int, copysign: bool, residual: bool, marked: bool
) -> None:
    rng, b, t = np.random.default_rng(d), 2, 5
    inputs = {"x": normal(rng, b, t, n, d), "kv": normal(rng, b, t, (n + 1) * d)}
    inputs["kv"][0, 0, : n * d] = 0  # the key is zero
    inputs["x"][-1, -1] = 0
    if marked:
        inputs["ids"] = rng.integers(-1, 3, (b, t)).astype(np.int32)
    check_case(gate(n, d, copysign, residual, marked), inputs, worker, path)


def test_an_access_outside_of_what_is_declared_is_found(worker: Interpreter, path: Path) -> None:
    """The guard itself: a plan that declares too little fails in the interpreter, whatever the check says."""
    import json

    from gpu_support import write_draft

    from dsv4c.runtime.container import ArtifactWriter

    case = Case()
    case.op("scale", case.f32("x", B, T, 5), factor=2.0)
    write_draft(case.module, case.store, path)
    artifact = Artifact.open(path)
    plan = json.loads(artifact.section("plan"))
    for kernel in plan["kernels"]:
        for parameter in kernel["parameters"]:
            parameter["elements"] = parameter["elements"] and parameter["elements"].replace("M*N", "M*N-1")
    narrow = path.with_name("narrow.dsv4")
    with ArtifactWriter(narrow) as writer:
        writer.add_section("plan", json.dumps(plan).encode())
    inputs = {"x": normal(np.random.default_rng(0), 1, 2, 5)}
    with pytest.raises(AssertionError, match="unary: writes 1 elements that it does not declare"):
        worker.run(narrow, [(inputs, {})])
