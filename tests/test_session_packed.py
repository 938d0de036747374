"""Models whose artifacts keep codes and scales: every layer kind, mixed schemes, against the evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_model_harness import TOLERANCE, Arr, Models

import dsv4c
from dsv4c.runtime import Artifact

FUSE = "merge_common_subexpressions,fuse_swiglu,fuse_index_select,fuse_expert_gemms"
MIXED = 'requantise{experts="nvfp4",linears="int8",embedding="int4"}'
PIPELINES = {
    "as published": f'{FUSE},narrow_weights{{storage="packed"}}',
    "mixed schemes": f'{MIXED},{FUSE},narrow_weights{{storage="packed"}}',
    "as numbers": f'{FUSE},narrow_weights{{storage="f32"}}',
}
CODES = {
    "default": {"f8e4m3", "f4e2m1x2", "f8e8m0"},
    "as published": {"f8e4m3", "f4e2m1x2", "f8e8m0"},
    "mixed schemes": {"i8", "i4x2", "f4e2m1x2", "f8e4m3", "f8e8m0"},
    "as numbers": set(),
}  # fmt: skip
PLAIN = {"f32", "i32", "bf16"}


@pytest.fixture
def checkpoint(models: Models) -> Path:
    return models.checkpoint("ratio16")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(i) for i in np.random.default_rng(3).integers(2, 61, 70)]


def compiled(checkpoint: Path, name: str, format: str, folder: Path) -> Path:
    output = folder / f"{format}.dsv4"
    dsv4c.compile(checkpoint, output=output, format=format, passes=PIPELINES[name])
    return output


def dtypes(path: Path) -> set[str]:
    return {t.dtype for t in Artifact.open(path).tensors.values() if not t.name.startswith("golden.")}


def expected(checkpoint: Path, ids: list[int], name: str) -> Arr:
    module = dsv4c.load_checkpoint(checkpoint)
    if name == "mixed schemes":
        from dsv4c.passes import parse_pipeline, run_pipeline

        run_pipeline(module, parse_pipeline(MIXED))
    return np.asarray(dsv4c.evaluate(module, ids))


@pytest.mark.parametrize(
    "name", ["default", "mixed schemes", "as numbers", pytest.param("as published", marks=pytest.mark.matrix)]
)
def test_packed_artifacts(
    models: Models, checkpoint: Path, ids: list[int], name: str, tmp_path: Path
) -> None:
    """By the target's own pipeline, which leaves codes as published, and by few passes."""
    own = name == "default"
    path = models.artifact("ratio16", "tvm") if own else compiled(checkpoint, name, "tvm", tmp_path)
    assert dtypes(path) - PLAIN == CODES[name]
    session = dsv4c.Session(path, context=256)
    found = session.step([ids])[0]
    want = expected(checkpoint, ids, name)
    assert np.abs(found - want).max() <= TOLERANCE / 10 * np.ptp(want)
    session.reset()
    pieces = [session.step([ids[a:b]])[0] for a, b in ((0, 1), (1, 2), (2, 5), (5, 70))]
    np.testing.assert_array_equal(np.concatenate(pieces), found)


def test_onnx_takes_the_numbers(checkpoint: Path, ids: list[int], tmp_path: Path) -> None:
    """Its emitter knows no codes; whatever the pipeline left packed is stored as float32."""
    path = compiled(checkpoint, "as published", "onnx", tmp_path)
    assert dtypes(path) <= {"f32", "i32"}
    found, want = dsv4c.Session(path, context=256).step([ids])[0], expected(checkpoint, ids, "as published")
    assert np.abs(found - want).max() <= TOLERANCE * np.ptp(want)
