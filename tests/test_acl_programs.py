"""Converted programs on a device, with a stand-in for AscendCL's binding that runs the ONNX models."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from test_model_harness import Models

from dsv4c.cli import main
from dsv4c.errors import SessionError, ToolchainError
from dsv4c.runtime import Artifact
from dsv4c.runtime.acl_programs import acl_opener
from dsv4c.runtime.unpack import unpack
from dsv4c.runtime.verify import verify

SHAPES = 'with(bind_shapes{{tokens="1,24", batch=1, context=64, stages={stages}}})'


class Binding:
    """The part of the binding that is used: memory by address, models that are ONNX files, and which device.

    Buffers stay alive in `memory`; the device of every load and run is kept in `used`.
    """

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.models: dict[int, onnxruntime.InferenceSession] = {}
        self.device, self.used = -1, list[int]()
        self.rt = SimpleNamespace(set_device=self.set_device, malloc=self.malloc, memcpy=self.memcpy)
        self.mdl = SimpleNamespace(
            load_from_file=self.load, create_desc=lambda: {}, get_desc=self.describe,
            get_num_inputs=lambda d: len(d["in"]), get_num_outputs=lambda d: len(d["out"]),
            get_input_size_by_index=lambda d, i: d["in"][i],
            get_output_size_by_index=lambda d, i: d["out"][i],
            create_dataset=list, add_dataset_buffer=lambda s, b: (s.append(b) or s, 0), execute=self.execute,
        )  # fmt: skip

    def init(self) -> int:
        return 0

    def set_device(self, number: int) -> int:
        self.device = number
        return 0 if number < 4 else 107001

    def malloc(self, size: int, policy: int) -> tuple[int, int]:
        buffer = (ctypes.c_byte * size)()
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer), 0

    def memcpy(self, target: int, room: int, source: int, count: int, kind: int) -> int:
        assert count <= room and kind in (1, 2)
        ctypes.memmove(target, source, count)
        return 0

    def load(self, path: str) -> tuple[int, int]:
        options = onnxruntime.SessionOptions()
        session = onnxruntime.InferenceSession(
            path.replace("/om/", "/").replace(".om", ".onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.models[len(self.models)] = session
        self.used.append(self.device)
        return len(self.models) - 1, 0

    def describe(self, desc: dict[str, list[int]], model: int) -> int:
        session = self.models[model]
        for key, infos in (("in", session.get_inputs()), ("out", session.get_outputs())):
            desc[key] = [4 * int(np.prod(info.shape)) for info in infos]
        return 0

    def create_data_buffer(self, place: int, size: int) -> tuple[int, int]:
        return place, size

    def execute(self, model: int, fed: list[tuple[int, int]], made: list[tuple[int, int]]) -> int:
        session = self.models[model]
        feeds = {}
        for info, (place, size) in zip(session.get_inputs(), fed, strict=True):
            dtype = np.int32 if "int32" in info.type else np.float32
            raw = ctypes.string_at(place, size)
            feeds[info.name] = np.frombuffer(raw, dtype).reshape(info.shape)
        for result, (place, size) in zip(session.run(None, feeds), made, strict=True):
            assert result.nbytes == size
            ctypes.memmove(place, np.ascontiguousarray(result).ctypes.data, size)
        self.used.append(self.device)
        return 0


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Binding]:
    found = Binding()
    module = ModuleType("acl")
    for name in ("init", "rt", "mdl", "create_data_buffer"):
        setattr(module, name, getattr(found, name))
    monkeypatch.setitem(sys.modules, "acl", module)
    yield found


def device_folder(models: Models, tmp_path: Path, stages: int) -> tuple[Path, Path]:
    """An artifact, and where its converted programs are: the exact ones, which need no functions renamed."""
    tmp_path.mkdir(exist_ok=True)
    passes = SHAPES.format(stages=stages)
    artifact = models.artifact("v4", "onnx", target="ascend", numerics="exact", passes=passes)
    unpack(Artifact.open(artifact), tmp_path / "device")
    (tmp_path / "device" / "om").mkdir()
    for model in (tmp_path / "device").glob("*.onnx"):
        (tmp_path / "device" / "om" / f"{model.stem}.om").touch()
    return artifact, tmp_path / "device" / "om"


@pytest.mark.parametrize("stages", [1, 3])
def test_the_golden_prompt_on_the_device(
    models: Models, binding: Binding, tmp_path: Path, stages: int
) -> None:
    artifact, programs = device_folder(models, tmp_path, stages)
    checks = verify(Artifact.open(artifact), opener=acl_opener(programs))
    assert all(c.ok for c in checks) and checks[-1].name == "logits" and checks[-1].error > 0
    assert set(binding.used) == set(range(stages))


def test_command_line(
    models: Models, binding: Binding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, programs = device_folder(models, tmp_path, 1)
    assert main(["verify", str(artifact), "--on", "device", "--programs", str(programs)]) == 0
    assert "ok:" in capsys.readouterr().out
    for words, message in {
        "--on gpu": "--on gpu; allowed: cpu, device",
        "--on device": "--on device without --programs",
        "--programs x": "--programs without --on device",
        f"--on device --programs {tmp_path}": "the converted program is missing",
    }.items():
        assert main(["verify", str(artifact), *words.split()]) == 2
        assert message in capsys.readouterr().err


def test_programs_of_another_artifact_are_refused(models: Models, binding: Binding, tmp_path: Path) -> None:
    artifact, programs = device_folder(models, tmp_path, 1)
    other = device_folder(models, tmp_path / "other", 3)[1]
    (other / "step.24.om").touch()
    (other.parent / "step.24.onnx").write_bytes((other.parent / "step.24.0.onnx").read_bytes())
    with pytest.raises(SessionError, match="as compiled"):
        verify(Artifact.open(artifact), opener=acl_opener(other))
    assert programs.is_dir()


def test_without_the_binding(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="AscendCL's Python binding is not installed here"):
        acl_opener(tmp_path)


def test_a_device_that_does_not_answer(models: Models, binding: Binding, tmp_path: Path) -> None:
    artifact, programs = device_folder(models, tmp_path, 5)
    with pytest.raises(SessionError, match=r"acl.rt.set_device\(4\) failed with 107001"):
        verify(Artifact.open(artifact), opener=acl_opener(programs))
