"""Numerics `int8` of whole models: which products take codes; artifacts do what the evaluator does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_model_harness import Models

import dsv4c
from dsv4c.api import in_numerics, load_checkpoint
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.packed import packed_form
from dsv4c.passes import run_pipeline
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.verify import verify
from dsv4c.targets import parse_target
from dsv4c.targets.cpu.tvm.emit import build_relax
from dsv4c.targets.cpu.tvm.kernels.packing import Simd

STORED = {
    "as published": {"mxfp4": "int8", "fp8": "bf16"},
    "mixed": {"int8": "int8", "nvfp4": "int8", "fp8": "bf16"},
}
"""Scheme -> what products with it take."""
MIXED = 'before(fuse_swiglu, requantise{experts="nvfp4", linears="int8", samples=0})'


def passes(stored: str) -> str | None:
    return MIXED if stored == "mixed" else None


def lowered(directory: Path, stored: str) -> Module:
    module = load_checkpoint(directory)
    target, arch = parse_target("cpu:x86-64-v4-amx")
    _, pipeline = in_numerics(target, arch, target.formats[0], "int8", passes(stored))
    run_pipeline(module, pipeline)
    return module


def scheme(op: Op, operand: int) -> str:
    weight = op.operands[operand].producer
    held = packed_form(weight.weight) if weight is not None and weight.weight is not None else None
    return held.scheme.name if held is not None else ""


@pytest.mark.parametrize("stored", STORED)
def test_which_products_take_codes(models: Models, stored: str) -> None:
    """Integers and FP4 take INT8 rows, other narrow numbers BF16 ones, and the router what it is given."""
    module, seen = lowered(models.checkpoint("ratio16"), stored), set()
    for op in module.ops:
        if op.name in ("linear", "grouped_linear"):
            held, takes = scheme(op, 1), op.attrs["inputs"]
        elif op.name == "expert_mlp":
            held, takes = scheme(op, 4), str(op.attrs["rounding"]).removesuffix("_rows")
        else:
            continue
        if held in STORED[stored]:
            assert takes == STORED[stored][held], (op.loc, held)
            seen.add(held)
        if ".gate" in op.loc:
            assert takes == "any", op.loc
        if takes == "int8":
            producer = op.operands[0].producer
            assert producer is not None
            assert (producer.attrs["rule"], producer.attrs["block"]) == ("int8", 32)
    assert seen == set(STORED[stored])
    for simd in (Simd.AMX, Simd.AVX512_BF16, Simd.AVX2):
        calls = [name.rpartition("_")[0] for name in build_relax(module, simd)[0].calls]
        assert ("coded_rows" in calls) == (simd is not Simd.AVX2)


@pytest.mark.parametrize("stored", STORED)
def test_an_artifact_does_what_the_evaluator_does(models: Models, tmp_path: Path, stored: str) -> None:
    """Within what a code that fell the other way may change, and however tokens are cut into calls."""
    path = tmp_path / "m.dsv4"
    dsv4c.compile(models.checkpoint("ratio16"), output=path, numerics="int8", passes=passes(stored))
    checks = verify(Artifact.open(path))
    assert checks and all(check.ok for check in checks), [c for c in checks if not c.ok]
    tokens = np.random.default_rng(1).integers(2, 61, 40).tolist()
    whole, cut = (Session(path, context=64, threads=n) for n in (1, 2))
    last = whole.prefill([tokens])
    for part in (tokens[:1], tokens[1:4], tokens[4:37], *([t] for t in tokens[37:])):
        found = cut.prefill([part])
    np.testing.assert_array_equal(last, found)
