"""What DeepSeek-V4.1 adds to ONNX: its ops, what the host computes for it, and the golden model whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_model_harness import BETWEEN_CHUNKINGS, TOLERANCE, Models, cuts, within
from test_onnx_attention import kept, valid_tokens
from test_onnx_harness import Arr, B, Case, DictStore, T, ints, numbers
from test_v41_golden import IMAGE, feed, golden, image_rows

from dsv4c import Session
from dsv4c.errors import TargetError
from dsv4c.ir import weights as w
from dsv4c.ir.dims import sym
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Builder, Module
from dsv4c.ir.meaning import engram as meaning
from dsv4c.ir.types import f32, i32
from dsv4c.runtime import verify as runtime_verify
from dsv4c.runtime.engram import host
from dsv4c.runtime.images import ImageRules, load_patches
from dsv4c.runtime.images.tower import tower_inputs
from dsv4c.targets.onnx.host import host_part

NAMES = ("v41", "v41_text")
RATIO, H, D = 4, 3, 6
STEPS = [(0, 1), (3, 1), (2, 3), (5, 9), (16, 8), (63, 2), (31, 40)]
"""(pos, tokens)"""


# ---------------------------------------------------------------------------------------- ops


def select_case(tmp_path: Path, k: int, size: int, count: int) -> Case:
    """The candidates of one layer, and what another selects among them."""
    case = Case(tmp_path)
    pos, n_valid = case.i32("pos", B), case.i32("n_valid", B)
    keys = case.entries("keys", case.f32("new", B, (sym("T") + 3) // RATIO, D), pos, n_valid, RATIO)
    first, second = ((case.f32(f"q{i}", B, T, H, D), case.f32(f"w{i}", B, T, H)) for i in "12")
    block = {"ratio": RATIO, "k": k, "size": size}
    made = case.b.multi("index_candidates", *first, keys, pos, n_valid, count=count, **block).results
    inside = case.b.op("index_select", *second, keys, pos, n_valid, made[1], **block)
    ordered = case.b.op("index_select", *second, keys, pos, n_valid, ratio=RATIO, k=k, ascending=True)
    return case.output(*made, inside, ordered).build()


def wide(found: Arr, width: int) -> Arr:
    """Ids in ascending order with -1 behind them, in as many columns as the op declares."""
    out = np.full((*found.shape[:2], width), 1 << 20)
    out[:, :, : found.shape[2]] = np.where(found < 0, 1 << 20, found)
    return np.sort(out)


@pytest.mark.parametrize(("k", "size", "count"), [(3, 2, 2), (8, 3, 4), (16, 5, 1), (2, 4, 40)])
def test_candidates_and_selection_within_them(tmp_path: Path, k: int, size: int, count: int) -> None:
    """Rows of different pos, entries of old and of this call in one block, zero scores that tie."""
    case = select_case(tmp_path, k, size, count)
    for start, t in STEPS:
        for pos, n_valid in ((ints(start), ints(t)), (ints(start, max(0, start - 3)), ints(t - 1, t))):
            b, (whole, used) = len(pos), kept("keys", len(pos), pos, D)
            inputs = {f"q{i}": numbers(i, b, t, H, D) for i in (1, 2)}
            inputs |= {f"w{i}": np.abs(numbers(5 + i, b, t, H)) for i in (1, 2)}
            inputs["q1"][:, ::3], inputs["q2"][:, ::4] = -np.abs(inputs["q1"][:, ::3]), 0.0
            inputs |= {"new": numbers(3, b, -(-t // RATIO), D), "pos": pos, "n_valid": n_valid}
            expected, real = case.meaning(inputs, {"keys": whole}), valid_tokens(t, n_valid)
            found = case.onnx({**inputs, "keys": used})
            for name, width in (("out0", k), ("out1", count), ("out2", k), ("out3", k)):
                assert np.array_equal(wide(found[name], width)[real], wide(expected[name], width)[real]), name
            for chosen in (found["out1"][real], found["out3"][real]):
                assert (np.diff(np.where(chosen < 0, 1 << 20, chosen)) >= 0).all()


def test_image_rows_stand_in_for_image_tokens(tmp_path: Path) -> None:
    case = Case(tmp_path)
    x, tokens = case.f32("x", B, T, D), case.i32("tokens", B, T)
    images, count = case.f32("images", B, sym("I"), D), case.i32("n_images", B)
    case.output(case.b.op("merge_images", x, tokens, images, count, image_token=7)).build()
    tokens_ = ints([7, 1, 7, 7, 2], [1, 7, 3, 7, 7], [7, 7, 7, 7, 7])
    for given, counts in ((3, ints(3, 2, 0)), (1, ints(1, 1, 1)), (6, ints(6, 3, 4)), (2, ints(5, 0, 2))):
        inputs = {"x": numbers(1, 3, 5, D), "tokens": tokens_, "images": numbers(2, 3, given, D)}
        case.compare(inputs | {"n_images": counts})


def test_routing_of_images_has_a_bias_of_its_own(tmp_path: Path) -> None:
    case = Case(tmp_path)
    scores, bias = case.f32("scores", B, T, 9), case.f32("bias", 9)
    tokens, of_images = case.i32("tokens", B, T), case.f32("of_images", 9)
    case.output(case.b.op("route_topk", scores, bias, tokens, of_images, k=4, image_token=7)).build()
    inputs = {"scores": numbers(1, 2, 5, 9), "bias": numbers(2, 9), "of_images": 3 * numbers(3, 9)}
    inputs |= {"tokens": ints([7, 1, 7, 7, 2], [1, 2, 3, 4, 7])}
    case.compare(inputs)
    assert not np.array_equal(
        case.onnx(inputs)["out0"], case.onnx(inputs | {"of_images": inputs["bias"]})["out0"]
    )


@pytest.mark.parametrize("copysign", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_the_gate_of_engram(tmp_path: Path, copysign: bool, residual: bool) -> None:
    case = Case(tmp_path)
    x, kv, ids = case.f32("x", B, T, 2, D), case.f32("kv", B, T, 3 * D), case.i32("ids", B, T)
    norms = [case.f32(name, 2, D) for name in ("q", "k")]
    case.output(case.b.op("engram_gate", x, kv, *norms, ids, eps=1e-20, copysign=copysign, residual=residual))
    case.output(
        case.b.op("engram_gate", x, kv, *norms, eps=1e-6, copysign=copysign, residual=residual)
    ).build()
    inputs = {"x": numbers(1, 2, 4, 2, D), "kv": numbers(2, 2, 4, 3 * D), "q": numbers(3, 2, D)}
    inputs |= {"k": numbers(4, 2, D), "ids": ints([1, -1, 0, 3], [-1, 2, 2, -5])}
    inputs["x"][0, 2], inputs["kv"][1, 1] = 0.0, 1e-3 * inputs["kv"][1, 1]  # no sign, and below the floor
    case.compare(inputs)


def test_what_an_image_encoder_is_made_of(tmp_path: Path) -> None:
    case = Case(tmp_path)
    n, m, s = sym("N"), sym("M"), sym("S")
    places, cells, layout = case.i32("places", B, n, 2), case.i32("cells", B, m, 4), case.i32("layout", B, s)
    qkv = [case.f32(name, B, n, 2, 8) for name in "qkv"]
    angles = case.b.multi("grid_angles", places, case.f32("frequencies", 2)).results
    turned = [case.b.op("rotary", x, *angles, halves=True) for x in qkv[:2]]
    mixed = case.b.op("merge_heads", case.b.op("full_attention", *turned, qkv[2], scale=0.5))
    biased = case.b.op("add_bias", mixed, case.f32("bias", 16))
    joined = case.b.op("gather_cells", case.b.op("swiglu", biased, mixed), cells)
    marks = [case.f32(name, 64) for name in ("start", "newline", "end")]
    span = case.b.op("image_span", case.b.op("gelu", joined), layout, *marks)
    case.output(*angles, *turned, mixed, joined, span).build()
    inputs = {name: numbers(i, 2, 6, 2, 8) for i, name in enumerate("qkv")}
    inputs |= {name: numbers(7, 64) + i for i, name in enumerate(("start", "newline", "end"))}
    inputs |= {"places": np.random.default_rng(1).integers(0, 9, (2, 6, 2)).astype(np.int32)}
    inputs |= {"frequencies": np.float32([1.0, 0.3]), "bias": numbers(8, 16)}
    inputs |= {"cells": ints([[0, 1, 2, -1], [3, 4, -1, -1]], [[5, 5, 0, 1], [-1, -1, -1, -1]])}
    inputs |= {"layout": ints([-1, 0, 1, -2, -3], [-1, 1, 0, -2, -3])}
    case.compare(inputs)


# --------------------------------------------------------------------------------------- host


ATTRS = {
    "pad": 3, "heads": 2, "multipliers": [123456789012345, 99194853094755497, 7],
    "primes": [101, 103, 10007, 10009], "offsets": [0, 101, 204, 10211], "dead": True,
}  # fmt: skip
"""A first multiplier whose products with ids have 60 bits."""


@pytest.mark.parametrize("dead", [True, False])
def test_ids_and_history_are_those_of_the_meaning_bit_for_bit(dead: bool) -> None:
    """Over calls of many lengths, with dead tokens in both, and rows that begin at different times."""
    rng, attrs = np.random.default_rng(4), ATTRS | {"dead": dead}
    module = Module("case")
    b = Builder(module)
    ids, history = b.input("ids", i32(B, T)), b.input("history", i32(B, 3))
    pos, n_valid = b.input("pos", i32(B)), b.input("n_valid", i32(B))
    fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in attrs.items()}
    op = b.multi("ngram_rows", ids, history, pos, n_valid, **fixed)
    state, at = np.zeros((3, 3), np.int32), np.array([0, 0, 5], np.int32)
    for count in (1, 2, 7, 1, 4):
        fed = rng.integers(-30 if dead else 0, 90, (3, count)).astype(np.int32)
        valid = np.array([count, count // 2, max(0, count - 1)], np.int32)
        found = host.ngram_rows(attrs, fed, state, at, valid)
        assert np.array_equal(found, meaning.ngram_rows(op, fed, state, at, valid))
        after = host.ngram_history({}, state, fed, at, valid)
        assert np.array_equal(after, meaning.ngram_history(op, state, fed, at, valid))
        state, at = after, at + valid


@pytest.mark.parametrize("name", NAMES)
def test_row_ids_of_the_golden_prompts(models: Models, name: str) -> None:
    """As the manifest says, against an independent evaluator; in two calls, cut inside an n-gram."""
    artifact, want = models.session("v41", "onnx").artifact, golden(name)
    steps = {s["result"]: s for s in artifact.meta["onnx"]["host"]["steps"]}
    table = host.Stored(artifact.array("engram.token_map"), "i32")
    tokens = want["input_ids"][None].astype(np.int32)
    ids = host.compress_tokens(steps["engram.tokens.ids"]["attrs"], tokens, table)
    assert ((ids < 0) == (tokens == IMAGE)).all()
    for layer in (1, 3):
        attrs = steps[f"layers.{layer}.engram.row_ids"]["attrs"]
        first = host.ngram_rows(attrs, ids[:, :9], np.zeros((1, 3), np.int32), np.zeros(1, int), ints(9))
        history = host.ngram_history({}, np.zeros((1, 3), np.int32), ids[:, :9], np.zeros(1, int), ints(9))
        rest = host.ngram_rows(attrs, ids[:, 9:], history, ints(9), ints(ids.shape[1] - 9))
        np.testing.assert_array_equal(np.concatenate([first, rest], 1)[0], want[f"engram.rows.{layer}"])


@pytest.mark.parametrize(("dtype", "scaled"), [
    (DType.F8E4M3, True), (DType.BF16, False), (DType.F16, False), (DType.F32, False),
])  # fmt: skip
def test_rows_of_a_table_are_decoded_as_they_are_stored(tmp_path: Path, dtype: DType, scaled: bool) -> None:
    """Every byte of E4M3 but the two NaN, and scales from the least on; the artifact holds the very bits."""
    rng = np.random.default_rng(2)
    if dtype.storage.itemsize == 1:
        codes = rng.permutation(np.repeat(np.arange(256), 2)).astype(np.uint8)[:512].reshape(32, 16)
        codes[(codes & 127) == 127] = 0
    else:
        codes = rng.standard_normal((32, 16)).astype(np.float16).view(np.uint16)
        codes = codes.view(np.float16) if dtype is DType.F16 else codes
        codes = rng.standard_normal((32, 16)).astype(np.float32) if dtype is DType.F32 else codes
    scales = rng.integers(90, 140, (32, 2)).astype(np.uint8)
    scales[0] = 0, 1
    case, store = Case(tmp_path), DictStore({"table": codes, "scales": scales})
    operands = [case.i32("ids", B, T, 3), case.b.weight(w.source("table", dtype, (32, 16)), "table")]
    if scaled:
        operands.append(case.b.weight(w.source("scales", DType.F8E8M0, (32, 2)), "scales"))
    case.output(case.b.op("scale", case.b.op("engram_rows", *operands), factor=1.0)).build(store)
    ids = rng.integers(-1, 32, (2, 5, 3)).astype(np.int32)
    steps = host.HostOps(case.artifact)
    fed, _ = steps.run(ids[..., 0], ids[0, :, 0], {"ids": ids})
    assert list(fed) == ["case.rows"]
    want = case.meaning({"ids": ids})["out0"].astype(np.float32)
    assert np.array_equal(fed["case.rows"], want) and np.array_equal(case.onnx(fed)["out0"], want)


def test_the_host_computes_ahead_of_the_program_or_not_at_all() -> None:
    module = Module("case")
    b = Builder(module)
    b.loc = "layers.3.engram"
    routed = b.op("route_topk", b.input("scores", f32(B, T, 5)), b.input("bias", f32(5)), k=2)
    made = b.op("engram_rows", routed, b.weight(w.source("t", DType.F32, (8, 4)), "t"))
    module.outputs["y"] = b.op("scale", made, factor=2.0)
    with pytest.raises(TargetError, match=r"layers\.3\.engram: engram_rows reads what the program computes"):
        host_part(module)


# -------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_however_it_is_fed(models: Models, name: str) -> None:
    """Whole, token by token and cut at random, also inside the image."""
    want, ids = golden(name)["logits"], golden(name)["input_ids"]
    for sizes in ([len(ids)], [1] * len(ids), cuts(len(ids), 1)):
        found = feed(models.session("v41", "onnx"), ids, sizes, image_rows(name))
        within(found, want, BETWEEN_CHUNKINGS)
        assert (found.argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_greedy_tokens(models: Models, name: str) -> None:
    want, session, rows = golden(name), models.session("v41", "onnx"), image_rows(name)
    images = [rows] if len(rows) else None
    logits = session.prefill([want["input_ids"].tolist()], chunk=7, images=images)
    for token, expected in zip(want["generated_ids"], want["generated_logits"], strict=True):
        within(logits[0], expected, BETWEEN_CHUNKINGS)
        assert logits[0].argmax() == token
        logits = session.step([[token]])[:, -1]


def test_a_batch_of_an_image_and_a_text(models: Models) -> None:
    a, b = golden("v41"), golden("v41_text")
    session = models.session("v41", "onnx", batch=2)
    prompts = [a["input_ids"].tolist(), b["input_ids"].tolist()]
    logits = session.prefill(prompts, chunk=11, images=[image_rows("v41"), image_rows("v41_text")])
    for found, want in zip(logits, (a, b), strict=True):
        within(found, want["logits"][-1], BETWEEN_CHUNKINGS)


def test_the_history_of_tokens_is_state_like_any_other(models: Models, tmp_path: Path) -> None:
    """Saved in the middle of an n-gram, loaded elsewhere, and forked: the rest is as it would have been."""
    ids = golden("v41_text")["input_ids"]
    session, other = models.session("v41", "onnx"), models.session("v41", "onnx")
    session.step(ids[None, :20])
    assert session.state["engram.history"].any()
    session.save(tmp_path / "saved.npz")
    want = session.fork().step(ids[None, 20:])
    other.load(tmp_path / "saved.npz")
    assert np.array_equal(other.step(ids[None, 20:]), want)
    session.state["engram.history"][...] = 0
    assert not np.array_equal(session.step(ids[None, 20:]), want)


def test_the_tower_and_its_span(models: Models) -> None:
    """From the pixels; and rows that the session makes itself give the logits of the whole prompt."""
    want, session = golden("v41"), models.session("v41", "onnx")
    pixels, rules = want["image.pixels"].astype(np.uint8), ImageRules.from_meta(session.model["vision"])
    inputs = tower_inputs(load_patches(pixels, rules), rules.downsample)
    found = session.backend.call_part("vision", inputs)
    within(found["tower"][0], want["vision.tower"], TOLERANCE)
    within(found["rows"][0], want["vision.span"], TOLERANCE)
    ids = want["input_ids"]
    first, last = np.flatnonzero(ids == IMAGE)[[0, -1]]
    expanded, images = session.with_images([*ids[: first + 1].tolist(), *ids[last + 1 :].tolist()], [pixels])
    within(session.prefill([expanded], images=images)[0], want["logits"][-1], TOLERANCE)


def test_the_artifact_verifies_itself(models: Models) -> None:
    session = models.session("v41", "onnx")
    checks = runtime_verify.verify(session.artifact, threads=1)
    assert {"vision rows", "state engram.history", "logits"} <= {c.name for c in checks}
    assert all(c.error < 1e-5 for c in checks), [c for c in checks if c.error >= 1e-5]
    table = session.artifact.tensors["layers.1.engram.embed"]
    assert (table.dtype, table.shape) == ("f8e4m3", (6126, 32))  # as stored, not as a weight of the program
    assert table.name not in session.artifact.meta["onnx"]["tensors"]


def test_a_session_forked_in_an_image_goes_on(models: Models) -> None:
    """Half of an image's rows before the fork, half behind it."""
    want, rows = golden("v41"), image_rows("v41")
    ids = want["input_ids"]
    middle = int(np.flatnonzero(ids == IMAGE)[len(rows) // 2])
    session: Session = models.session("v41", "onnx")
    session.step(ids[None, :middle], images=[rows[: len(rows) // 2]])
    found = session.fork().step(ids[None, middle:], images=[rows[len(rows) // 2 :]])
    within(found[0], want["logits"][middle:], BETWEEN_CHUNKINGS)
