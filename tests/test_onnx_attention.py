"""Index selection and attention: windows, old and new entries, sinks, ties, and blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_onnx_harness import Arr, B, Case, T, close, ints, numbers

from dsv4c.ir.dims import sym
from dsv4c.targets.onnx import blocks

RATIO, WINDOW, H, D = 4, 5, 3, 6
STEPS = [(0, 1), (3, 1), (4, 1), (0, 11), (2, 3), (5, 9), (7, 17), (16, 8), (63, 2)]
"""(pos, tokens)"""


def batches(tokens: int, pos: int) -> Iterator[tuple[Arr, Arr]]:
    yield ints(pos), ints(tokens)
    yield ints(pos, max(0, pos - 3), pos + 6), ints(tokens - 1, tokens, 0)


def valid_tokens(tokens: int, n_valid: Arr) -> Arr:
    """BOOL [B,T]."""
    return np.arange(tokens) < n_valid[:, None]


def kept(name: str, b: int, pos: Arr, width: int) -> tuple[Arr, Arr]:
    """Entries for the evaluator [B,40,D], and what the runtime feeds, with rubbish where none are used."""
    whole = numbers(len(name), b, 40, width)
    used = whole[:, : max(1, int(pos.max()) // RATIO)].copy()
    for row, first in enumerate(pos // RATIO):
        used[row, first:] = 1e6
    return whole, used


def index_case(tmp_path: Path, k: int) -> Case:
    case = Case(tmp_path)
    pos, n_valid = case.i32("pos", B), case.i32("n_valid", B)
    keys = case.entries("keys", case.f32("new", B, (sym("T") + 3) // RATIO, D), pos, n_valid, RATIO)
    q, weights = case.f32("q", B, T, H, D), case.f32("weights", B, T, H)
    return case.output(case.b.op("index_select", q, weights, keys, pos, n_valid, ratio=RATIO, k=k)).build()


def check_index(case: Case, k: int, inputs: dict[str, Arr], whole: Arr, used: Arr) -> None:
    t, real = inputs["q"].shape[1], valid_tokens(inputs["q"].shape[1], inputs["n_valid"])
    expected = case.meaning(inputs, {"keys": whole})["out0"]
    found = case.onnx({**inputs, "keys": used})["out0"]
    wide = np.full((len(real), t, k), -1, np.int32)
    wide[:, :, : found.shape[2]] = found
    assert np.array_equal(wide[real], expected[real])


@pytest.mark.parametrize("k", [1, 3, 16])
def test_index_select(tmp_path: Path, k: int) -> None:
    case = index_case(tmp_path, k)
    for start, t in STEPS:
        for pos, n_valid in batches(t, start):
            b = len(pos)
            whole, used = kept("keys", b, pos, D)
            inputs = {"q": numbers(1, b, t, H, D), "weights": numbers(2, b, t, H), "pos": pos}
            inputs |= {"n_valid": n_valid, "new": numbers(3, b, -(-t // RATIO), D)}
            check_index(case, k, inputs, whole, used)


def test_index_ties_go_to_the_lower_id_across_old_and_new(tmp_path: Path) -> None:
    case = index_case(tmp_path, 5)
    pos, n_valid, t = ints(22, 9), ints(13, 13), 13
    whole, used = kept("keys", 2, pos, D)
    whole[:], used[0, :5], used[1, :2] = 1, 1, 1  # every visible key the same
    inputs = {"q": np.ones((2, t, H, D), np.float32), "weights": np.ones((2, t, H), np.float32), "pos": pos,
              "n_valid": n_valid, "new": np.ones((2, 4, D), np.float32)}  # fmt: skip
    check_index(case, 5, inputs, whole, used)
    found = case.onnx({**inputs, "keys": used})["out0"]
    assert found[0, 12].tolist() == [0, 1, 2, 3, 4] and found[1, 12].tolist() == [0, 1, 2, 3, 4]
    assert found[1, 0].tolist() == [0, 1, -1, -1, -1]


def attention_case(tmp_path: Path, entries: bool, selected: int = 0, ring: int = WINDOW) -> Case:
    case = Case(tmp_path)
    pos, n_valid = case.i32("pos", B), case.i32("n_valid", B)
    operands = [case.f32("q", B, T, H, D), case.f32("kv", B, T, D), case.f32("ring", B, ring, D)]
    operands += [case.f32("sinks", H), pos, n_valid]
    if entries:
        new = case.f32("new", B, (sym("T") + 3) // RATIO, D)
        operands.append(case.entries("entries", new, pos, n_valid, RATIO))
    if selected:
        operands.append(case.i32("selected", B, T, selected))
    ratio = RATIO if entries else 0
    return case.output(case.b.op("attention", *operands, scale=0.4, window=WINDOW, ratio=ratio)).build()


def attention_inputs(pos: Arr, n_valid: Arr, t: int, ring: int = WINDOW) -> dict[str, Arr]:
    b = len(pos)
    return {"q": 3 * numbers(1, b, t, H, D), "kv": numbers(2, b, t, D), "ring": numbers(3, b, ring, D),
            "sinks": numbers(4, H), "pos": pos, "n_valid": n_valid}  # fmt: skip


def check_attention(
    case: Case, inputs: dict[str, Arr], whole: Arr | None = None, used: Arr | None = None
) -> None:
    real = valid_tokens(inputs["q"].shape[1], inputs["n_valid"])
    expected = case.meaning(inputs, {} if whole is None else {"entries": whole})["out0"]
    found = case.onnx(inputs if used is None else {**inputs, "entries": used})["out0"]
    close(found[real], expected[real])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("ring", [WINDOW, WINDOW + 2])
def test_window_attention(tmp_path: Path, ring: int) -> None:
    case = attention_case(tmp_path, entries=False, ring=ring)
    for start, t in STEPS:
        for pos, n_valid in batches(t, start):
            check_attention(case, attention_inputs(pos, n_valid, t, ring))


def test_attention_over_every_entry(tmp_path: Path) -> None:
    case = attention_case(tmp_path, entries=True)
    for start, t in STEPS:
        for pos, n_valid in batches(t, start):
            whole, used = kept("entries", len(pos), pos, D)
            inputs = attention_inputs(pos, n_valid, t) | {"new": numbers(5, len(pos), -(-t // RATIO), D)}
            check_attention(case, inputs, whole, used)


def test_attention_over_selected_entries(tmp_path: Path) -> None:
    case = attention_case(tmp_path, entries=True, selected=3)
    for start, t in STEPS:
        for pos, n_valid in batches(t, start):
            whole, used = kept("entries", len(pos), pos, D)
            inputs = attention_inputs(pos, n_valid, t) | {"new": numbers(5, len(pos), -(-t // RATIO), D)}
            check_attention(case, inputs | {"selected": choices(pos, t)}, whole, used)


def choices(pos: Arr, t: int) -> Arr:
    """i32 [B,T,3]: distinct entries each token may see, in no order, and -1."""
    rng, out = np.random.default_rng(t), np.full((len(pos), t, 3), -1, np.int32)
    for b in range(len(pos)):
        for i in range(t):
            seen = rng.permutation((pos[b] + i + 1) // RATIO)[:3]
            out[b, i, : len(seen)] = seen
            rng.shuffle(out[b, i])
    return out


@pytest.mark.parametrize("budget", [1, 400, 3000])
def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(blocks, "BUDGET", budget)
    (tmp_path / "index").mkdir()
    case, index = attention_case(tmp_path, entries=True), index_case(tmp_path / "index", 3)
    for t in (1, 6, 31, 32, 33):
        pos, n_valid = ints(9, 2), ints(t, t - 1)
        whole, used = kept("entries", 2, pos, D)
        new = numbers(5, 2, -(-t // RATIO), D)
        check_attention(case, attention_inputs(pos, n_valid, t) | {"new": new}, whole, used)
        inputs = {"q": numbers(1, 2, t, H, D), "weights": numbers(2, 2, t, H), "pos": pos, "n_valid": n_valid}
        check_index(index, 3, inputs | {"new": new}, whole, used)


def test_a_sink_alone_takes_everything(tmp_path: Path) -> None:
    case = attention_case(tmp_path, entries=False)
    inputs = attention_inputs(ints(0), ints(1), 1) | {"sinks": np.full(H, 1e4, np.float32)}
    assert np.abs(case.onnx(inputs)["out0"]).max() == 0


def test_padding_poisons_no_other_token(tmp_path: Path) -> None:
    case = attention_case(tmp_path, entries=False)
    inputs = attention_inputs(ints(4), ints(3), 8)
    clean = case.onnx(inputs)["out0"][:, :3]
    inputs["q"] = inputs["q"].copy()
    inputs["q"][:, 3:] = np.nan
    close(case.onnx(inputs)["out0"][:, :3], clean)
