"""The `state` lowerings and the compressor, at every offset around the borders of rings and groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_onnx_harness import Arr, B, Case, T, close, ints, numbers

STEPS = [(0, 1), (0, 9), (3, 1), (3, 2), (3, 6), (4, 1), (4, 4), (7, 1), (7, 17), (8, 8), (21, 3), (1000, 5)]
"""(pos, tokens)"""


def batches(tokens: int, pos: int) -> list[tuple[Arr, Arr]]:
    """(pos, n_valid) of one full row, and of three rows that differ."""
    uneven = ints(pos, max(0, pos - 1), pos + 5), ints(tokens - 1, tokens, 0)
    return [(ints(pos), ints(tokens)), uneven]


def test_positions(tmp_path: Path) -> None:
    case = Case(tmp_path)
    tokens, pos, n_valid = case.i32("tokens", B, T), case.i32("pos", B), case.i32("n_valid", B)
    case.output(
        case.b.op("positions", tokens, pos), case.b.op("entry_positions", tokens, pos, ratio=4),
        case.b.op("advance", pos, n_valid),
    ).build()  # fmt: skip
    for start, count in STEPS:
        for at, valid in batches(count, start):
            case.compare({"tokens": np.zeros((len(at), count), np.int32), "pos": at, "n_valid": valid})


@pytest.mark.parametrize("width", [4, 5])
def test_ring_write(tmp_path: Path, width: int) -> None:
    case = Case(tmp_path)
    ring, rows = case.f32("ring", B, width, 3), case.f32("rows", B, T, 3)
    case.output(case.b.op("ring_write", ring, rows, case.i32("pos", B), case.i32("n_valid", B))).build()
    for start, count in STEPS:
        for at, valid in batches(count, start):
            b = len(at)
            rows_ = numbers(count, b, count, 3)
            rows_[np.arange(count) >= valid[:, None]] = np.nan  # padding never reaches the ring
            case.compare({"ring": numbers(start, b, width, 3), "rows": rows_, "pos": at, "n_valid": valid})


def test_entries_come_back_as_new_rows_only(tmp_path: Path) -> None:
    case = Case(tmp_path)
    rows = case.f32("rows", B, T, 3)
    case.entries("e", rows, case.i32("pos", B), case.i32("n_valid", B), 4)
    case.build()
    given = numbers(1, 2, 3, 3)
    inputs = {"rows": given, "pos": ints(4, 9), "n_valid": ints(8, 1), "e": numbers(0, 2, 5, 3)}
    assert np.array_equal(case.onnx(inputs)["e.after"], given)
    assert case.artifact.meta["onnx"]["states"] == {"e": {"output": "e.after", "ratio": 4, "read": "some"}}


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (3, True), (8, False)])
def test_compress(tmp_path: Path, ratio: int, overlap: bool) -> None:
    case, channels = Case(tmp_path), 6
    kv, gate = case.f32("kv", B, T, channels), case.f32("gate", B, T, channels)
    rows = ratio * (2 if overlap else 1)
    rings = case.f32("kv_ring", B, rows, channels), case.f32("gate_ring", B, rows, channels)
    pos, n_valid = case.i32("pos", B), case.i32("n_valid", B)
    case.output(case.b.op("compress", kv, gate, *rings, pos, n_valid, ratio=ratio, overlap=overlap)).build()
    for start, count in STEPS:
        for at, valid in batches(count, start):
            b = len(at)
            inputs = {"kv": numbers(1, b, count, channels), "gate": 20 * numbers(2, b, count, channels)}
            inputs |= {"kv_ring": numbers(3, b, rows, channels), "gate_ring": numbers(4, b, rows, channels)}
            case.compare({**inputs, "pos": at, "n_valid": valid})


def test_compress_does_not_look_at_padding(tmp_path: Path) -> None:
    case = Case(tmp_path)
    kv, gate = case.f32("kv", B, T, 2), case.f32("gate", B, T, 2)
    rings = case.f32("kv_ring", B, 4, 2), case.f32("gate_ring", B, 4, 2)
    operands = (kv, gate, *rings, case.i32("pos", B), case.i32("n_valid", B))
    case.output(case.b.op("compress", *operands, ratio=4, overlap=False)).build()
    inputs = {"kv": numbers(1, 1, 9, 2), "gate": numbers(2, 1, 9, 2), "kv_ring": numbers(3, 1, 4, 2),
              "gate_ring": numbers(4, 1, 4, 2), "pos": ints(2), "n_valid": ints(3)}  # fmt: skip
    clean = case.onnx(inputs)["out0"]
    for name in ("kv", "gate"):
        inputs[name] = inputs[name].copy()
        inputs[name][:, 3:] = np.nan
    close(case.onnx(inputs)["out0"], clean)


def test_position_bias(tmp_path: Path) -> None:
    case = Case(tmp_path)
    x, bias = case.f32("x", B, T, 3), case.f32("bias", 4, 3)
    case.output(case.b.op("position_bias", x, bias, case.i32("pos", B))).build()
    for start, count in STEPS:
        for at, _ in batches(count, start):
            case.compare({"x": numbers(1, len(at), count, 3), "bias": numbers(2, 4, 3), "pos": at})


def test_rotary(tmp_path: Path) -> None:
    case = Case(tmp_path)
    angles = case.b.multi("rope_angles", case.i32("positions", B, T), case.f32("frequencies", 3)).results
    for inverse in (False, True):
        for x in (case.f32(f"h{inverse}", B, T, 2, 10), case.f32(f"k{inverse}", B, T, 6)):
            case.module.outputs[f"{x.name}.out"] = case.b.op("rotary", x, *angles, inverse=inverse)
    case.output(*angles).build()
    for b, t in [(1, 1), (2, 5), (3, 1)]:
        inputs = {f"h{i}": numbers(1, b, t, 2, 10) for i in (False, True)}
        inputs |= {f"k{i}": numbers(2, b, t, 6) for i in (False, True)}
        inputs["positions"] = np.random.default_rng(t).integers(0, 1 << 20, (b, t)).astype(np.int32)
        case.compare({**inputs, "frequencies": np.float32([1, 0.0316, 5e-6])})
