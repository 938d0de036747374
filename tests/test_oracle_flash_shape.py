"""DeepSeek-V4-Flash in its real shape through passes and emitters for devices, without a byte of weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest

from dsv4c import api
from dsv4c.cli.estimate_source import module_of
from dsv4c.targets import TARGETS
from dsv4c.targets.mlu.scripts import device_files
from dsv4c.targets.onnx.emit_static import emit_static

CONFIG = Path(__file__).parent / "data" / "configs" / "v4-flash"
pytestmark = pytest.mark.oracle


class NoBytes:
    """A store that must not be read."""

    def read(self, name: str) -> Any:
        raise AssertionError(f"reads {name}")


class Sizes:
    """An artifact that keeps the programs and only counts the weights."""

    def __init__(self) -> None:
        self.nbytes, self.programs = 0, dict[str, bytes]()

    def add_tensor(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Any) -> None:
        self.nbytes += math.prod(shape) * {"f32": 4, "i8": 1, "i32": 4}[dtype]

    def add_section(self, name: str, data: bytes) -> None:
        self.programs[name] = data

    def set_meta(self, key: str, value: Any) -> None:
        self.meta = value


@pytest.mark.parametrize("target", ["ascend", "mlu"])
def test_flash_over_sixteen_devices(target: str) -> None:
    """284 billion parameters in INT8: every op and node is legal, and no stage holds twice the mean."""
    module, _ = module_of(CONFIG)
    module.store = NoBytes()
    chosen, passes = TARGETS[target], "with(bind_shapes{stages=16, context=8192})"
    fast = chosen.numerics["fast"].replace('head="int8"', 'head="int8", samples=0')
    lowered = api.lower(module, target, passes=(fast, passes)).module
    artifact: Any = Sizes()
    assert chosen.dialect is not None
    emit_static(lowered, module.store, artifact, chosen.dialect())
    assert 284e9 < artifact.nbytes < 290e9
    assert len(artifact.programs) == 32
    held = []
    for name, data in artifact.programs.items():
        model = onnx.load_from_string(data)
        if name.startswith("onnx.1."):
            held.append(sum(math.prod(t.dims) for t in model.graph.initializer))
    assert max(held) < 2 * sum(held) / 16 < 64e9
    if target == "mlu":
        for arch in chosen.archs:
            files, left = device_files(lowered, arch, 128)
            assert files["build.sh"].count("cncc ") >= 2 and not left
