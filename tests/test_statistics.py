"""Calibration statistics: what a file keeps, and the words with which one that does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsv4c.errors import PassError
from dsv4c.passes.statistics import ExpertUsage, Statistics


def usage(*tokens: int) -> ExpertUsage:
    counts = np.array(tokens, np.int64)
    return ExpertUsage(counts, counts * 0.5, counts * 3.0)


def some() -> Statistics:
    extra = {"engram/layers.1/rows": np.arange(6, dtype=np.int32).reshape(2, 3), "share": np.float64([0.25])}
    return Statistics("a model", 61, 40, {"layers.0.ffn": usage(3, 0, 5), "layers.7.ffn": usage(1, 1)}, extra)


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    some().save(path)
    found = Statistics.load(str(path))
    assert (found.identity, found.vocab_size, found.tokens_seen) == ("a model", 61, 40)
    assert dict(found.experts) == dict(some().experts) and list(found.experts) == list(some().experts)
    assert found.extra.keys() == some().extra.keys()
    for name, array in some().extra.items():
        np.testing.assert_array_equal(found.extra[name], array)
        assert found.extra[name].dtype == array.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.npz"], "nothing half-written stays"
    again = tmp_path / "again.npz"
    found.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_it_is_a_plain_npz(tmp_path: Path) -> None:
    some().save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert json.loads(file["meta"].tobytes())["layers"] == ["layers.0.ffn", "layers.7.ffn"]
        np.testing.assert_array_equal(file["experts/layers.0.ffn/tokens"], [3, 0, 5])


def test_the_mean_saliency_of_an_unrouted_expert_is_zero() -> None:
    found = ExpertUsage(np.array([2, 0]), np.array([1.0, 0.0]), np.array([7.0, 0.0]))
    np.testing.assert_array_equal(found.mean_saliency, [3.5, 0.0])
    assert found.experts == 2 and not found.tokens.flags.writeable


def test_usages_are_equal_by_value() -> None:
    assert usage(1, 2) == usage(1, 2) != usage(2, 1)
    assert usage(1) != "usage"


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ((np.array([1, 2]), np.zeros(3), np.zeros(2)), r"gate is float64\[3\]; allowed: float64\[2\]"),
        ((np.array([1, 2]), np.zeros(2), np.zeros((2, 1))), r"saliency is float64\[2, 1\]"),
        ((np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)), r"tokens is float64\[2\]; allowed: int64\[2\]"),
        ((np.array([1, -2]), np.zeros(2), np.zeros(2)), "tokens holds a number that is negative"),
        ((np.array([1, 2]), np.array([0, np.nan]), np.zeros(2)), "gate holds a number that is .* not finite"),
    ],
)
def test_impossible_numbers_are_refused(arrays: tuple[np.ndarray, ...], what: str) -> None:
    with pytest.raises(PassError, match=what):
        ExpertUsage(*arrays)


def damaged(path: Path, case: str) -> None:
    match case:
        case "text":
            path.write_text("tokens: 3")
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            some().save(path)
            path.write_bytes(path.read_bytes()[:-40])
        case "other npz":
            with path.open("wb") as out:
                np.savez(out, tokens=np.arange(3))
        case "pickle":
            with path.open("wb") as out:
                np.savez(out, meta=np.array([{}], object))
        case "array without a zip":
            with path.open("wb") as out:
                np.save(out, np.arange(3))
        case "lacks an array":
            some().save(path)
            with np.load(path) as file:
                left = {k: v for k, v in file.items() if k != "experts/layers.7.ffn/gate"}
            with path.open("wb") as out:
                np.savez(out, **left)
        case "directory":
            path.mkdir()


DAMAGES = (
    "text", "empty", "truncated", "other npz", "pickle", "array without a zip", "lacks an array", "directory",
)  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_no_statistics_file_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "file.npz"
    damaged(path, case)
    with pytest.raises(PassError) as info:
        Statistics.load(path)
    assert info.value.what == "is not a file of calibration statistics" and info.value.where == str(path)
    assert "dsv4c calibrate" in info.value.hint


def test_a_later_version_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    meta = json.dumps({"format": "dsv4c-statistics", "version": 2}).encode()
    with path.open("wb") as out:
        np.savez(out, meta=np.frombuffer(meta, np.uint8))
    with pytest.raises(PassError, match="is dsv4c-statistics version 2; allowed: dsv4c-statistics version 1"):
        Statistics.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"nothing\.npz: no such file"):
        Statistics.load(tmp_path / "nothing.npz")


def test_objects_and_bad_places_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="odd holds Python objects"):
        Statistics("m", 1, 1, {}, {"odd": np.array([{}], object)}).save(tmp_path / "s.npz")
    with pytest.raises(PassError, match="cannot write statistics"):
        some().save(tmp_path / "no" / "s.npz")
    assert not list(tmp_path.iterdir())


def test_of_another_model() -> None:
    assert some().usage("layers.7.ffn", 2) == usage(1, 1)
    with pytest.raises(PassError, match=r"3 experts in layers\.0\.ffn of a model, the module has 8"):
        some().usage("layers.0.ffn", 8)
    with pytest.raises(PassError, match=r"of a model\) have nothing on layers\.2\.ffn; allowed: "):
        some().usage("layers.2.ffn", 8)
