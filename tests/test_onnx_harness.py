"""What the tests of the ONNX lowerings share: one op in a module, run by the evaluator and by ONNX Runtime.

Also checks the table of lowerings against the table of ops.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv4c.errors import TargetError
from dsv4c.ir.dims import Dim, sym
from dsv4c.ir.graph import Builder, Module, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.ops import OPS
from dsv4c.ir.types import f32, i32
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.onnx_backend import open_session
from dsv4c.targets import TARGETS
from dsv4c.targets.onnx.emit import emit_onnx
from dsv4c.targets.onnx.ops import HOST_OPS
from dsv4c.targets.onnx.table import LOWERINGS

pytest.importorskip("onnxruntime")

Arr = npt.NDArray[Any]
B, T, L = sym("B"), sym("T"), sym("L")
TOLERANCE = 1e-5  # of the range: FP32 sums in another order


class DictStore:
    """Checkpoint tensors from a dictionary."""

    def __init__(self, tensors: dict[str, Arr] | None = None) -> None:
        self.tensors = tensors or {}

    def read(self, name: str) -> Arr:
        return self.tensors[name]


class Case:
    """A module under construction, then the same module on both sides."""

    def __init__(self, tmp_path: Path) -> None:
        self.module = Module("case", level=Level.TARGET)
        self.b = Builder(self.module)
        self.b.loc = "case"
        self.path = tmp_path / "case.dsv4"

    def f32(self, name: str, *shape: Dim | int) -> Value:
        return self.b.input(name, f32(*shape))

    def i32(self, name: str, *shape: Dim | int) -> Value:
        return self.b.input(name, i32(*shape))

    def entries(self, name: str, rows: Value, pos: Value, n_valid: Value, ratio: int) -> Value:
        """A state of entries that `rows` are appended to; the value after."""
        state = self.b.state(name, f32(B, sym("ctx") // ratio, rows.type.shape[2]))
        after = self.b.op("entries_append", state, rows, pos, n_valid, ratio=ratio)
        self.module.outputs[name] = after
        return after

    def output(self, *values: Value) -> Case:
        self.module.outputs |= {f"out{i}": v for i, v in enumerate(values)}
        return self

    def build(self, store: DictStore | None = None) -> Case:
        self.store = store or DictStore()
        with ArtifactWriter(self.path) as writer:
            emit_onnx(self.module, self.store, writer)
        self.artifact = Artifact.open(self.path)
        self.session = open_session(self.artifact, threads=1)
        return self

    def meaning(self, inputs: dict[str, Arr], state: dict[str, Arr] | None = None) -> dict[str, Arr]:
        step = Evaluator(self.module, self.store, np.float64)(inputs, state or {})
        return step.outputs | step.state

    def onnx(self, inputs: dict[str, Arr]) -> dict[str, Arr]:
        names = [o.name for o in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs), strict=True))

    def compare(self, inputs: dict[str, Arr]) -> None:
        """Every output agrees with its meaning, whole."""
        expected, found = self.meaning(inputs), self.onnx(inputs)
        for name, value in expected.items():
            close(found[name], value, name)


def close(found: Arr, expected: Arr, what: str = "", scale: float | None = None) -> None:
    """Equal shapes and kinds; integers equal, floats within the tolerance of the range."""
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    assert (found.dtype.kind == "f") == (expected.dtype.kind == "f"), what
    if found.dtype.kind != "f":
        assert np.array_equal(found, expected), what
    elif expected.size:
        assert np.isfinite(found).all(), what
        top = scale or max(1.0, float(np.abs(expected).max()))
        assert float(np.abs(found - expected).max()) <= TOLERANCE * top, what


def numbers(seed: int, *shape: int) -> Arr:
    """float32 around 0 with a spread of 1."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: Any) -> Arr:
    return np.array(values, np.int32)


# --------------------------------------------------------------------------------------- the table


def test_every_lowering_is_that_of_an_op() -> None:
    assert set(LOWERINGS) <= set(OPS)


def test_ops_without_a_lowering_are_those_the_passes_remove() -> None:
    removed = {"clamp", "index_scores", "index_topk", "dispatch", "scale_rows", "combine", "weight"}
    only_tvm = TARGETS["cpu"].format("tvm").extra_ops - TARGETS["cpu"].format("onnx").extra_ops
    assert set(OPS) - set(LOWERINGS) == removed | only_tvm | HOST_OPS


def test_a_lowering_has_the_name_and_the_file_of_its_op() -> None:
    from dsv4c.ir.ops import attention, core, engram, hyper, moe, state, vision

    families = {"core": core.CORE, "state": state.STATE, "attention": attention.ATTENTION}
    families |= {"hyper": hyper.HYPER, "moe": moe.MOE, "engram": engram.ENGRAM, "vision": vision.VISION}
    for stem, definitions in families.items():
        for definition in definitions:
            if definition.name in LOWERINGS:
                lowering = LOWERINGS[definition.name]
                assert lowering.__name__ == definition.name
                assert lowering.__module__.endswith(f".onnx.{stem}")


def test_an_op_without_a_lowering_is_named_with_its_place(tmp_path: Path) -> None:
    case = Case(tmp_path)
    x = case.f32("x", B, T, 4)
    case.b.loc = "layers.7.ffn"
    case.output(case.b.op("clamp", x, low=-1.0, high=1.0))
    with pytest.raises(TargetError, match=r"layers\.7\.ffn: clamp has no ONNX lowering; allowed: .*linear"):
        case.build()
    assert not case.path.exists()


def test_entries_cannot_be_read_as_a_tensor(tmp_path: Path) -> None:
    case = Case(tmp_path)
    pos, n_valid = case.i32("pos", B), case.i32("n_valid", B)
    after = case.entries("e", case.f32("rows", B, T, 4), pos, n_valid, 4)
    case.output(case.b.op("scale", after, factor=2.0))
    with pytest.raises(TargetError, match="scale reads entries as one tensor"):
        case.build()


