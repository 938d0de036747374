"""DeepSeek-V4-Flash in its real shape through passes and emitters for devices, without a byte of weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import onnx
import pytest

from dsv4c import api
from dsv4c.cli.estimate_source import module_of
from dsv4c.passes import over_devices
from dsv4c.runtime.container.layout import STORAGE
from dsv4c.runtime.gpu.check import check_step
from dsv4c.targets import TARGETS, parse_target
from dsv4c.targets.gpu.arch import gpu
from dsv4c.targets.gpu.devices import check_fits, device_facts
from dsv4c.targets.gpu.plan import draft
from dsv4c.targets.hardware import load_devices
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
        self.nbytes += math.prod(shape) * STORAGE[dtype].itemsize

    def add_section(self, name: str, data: bytes) -> None:
        self.programs[name] = data

    def set_meta(self, key: str, value: Any) -> None:
        self.meta = value


@pytest.mark.parametrize("target", ["ascend", pytest.param("mlu", marks=pytest.mark.matrix)])
def test_flash_over_sixteen_devices(target: str) -> None:
    """284 billion parameters in INT8: every op and node is legal, and no stage holds twice the mean."""
    module, _ = module_of(CONFIG)
    module.store = NoBytes()
    chosen, passes = TARGETS[target], "with(bind_shapes{stages=16, context=8192})"
    fast = chosen.numerics["fast"].replace('head="int8"', 'head="int8", samples=0')
    lowered = api.lower(module, target, "onnx", passes=(fast, passes)).module
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


@pytest.mark.parametrize(
    ("target", "numerics", "stages", "low", "high"),
    [
        ("ascend:950", "fast", 4, 155e9, 165e9),
        pytest.param("mlu:590", "half", 16, 568e9, 575e9, marks=pytest.mark.matrix),
        ("cuda:sm_90a", "fast", 8, 155e9, 165e9),
        pytest.param("cuda:sm_80", "fast", 8, 568e9, 575e9, marks=pytest.mark.matrix),
        pytest.param("rocm:gfx942", "fast", 8, 155e9, 165e9, marks=pytest.mark.matrix),
        pytest.param("rocm:gfx942", "half", 8, 568e9, 575e9, marks=pytest.mark.matrix),
    ],
)
def test_flash_in_other_formats(target: str, numerics: str, stages: int, low: float, high: float) -> None:
    """Every node is legal; released codes take 160 GB in all, FP16 two bytes a number."""
    module, _ = module_of(CONFIG)
    module.store = NoBytes()
    family, arch = parse_target(target)
    unread = {
        name: text.replace("requantise{", "requantise{samples=0, ")
        for name, text in family.numerics_of(arch, family.format("onnx")).items()
    }
    arch, passes = (
        dataclasses.replace(arch, numerics=unread),
        f"with(bind_shapes{{stages={stages}, context=8192}})",
    )
    _, pipeline = api.in_numerics(family, arch, family.format("onnx"), numerics, passes)
    lowered = api.lower(module, target, "onnx", passes=pipeline).module
    artifact: Any = Sizes()
    dialect = family.dialect_of(arch)
    assert dialect is not None
    emit_static(lowered, module.store, artifact, dialect)
    assert low < artifact.nbytes < high
    assert len(artifact.programs) == 2 * stages


@pytest.mark.parametrize(
    ("target", "card"),
    [("cuda:sm_90a", "h200"), pytest.param("rocm:gfx942", "mi300x", marks=pytest.mark.matrix)],
)
def test_flash_as_a_plan_for_eight_cards(target: str, card: str) -> None:
    """Every launch and handover of a token and of a prompt; no card has a fifth more than the mean."""
    module, _ = module_of(CONFIG)
    module.store = NoBytes()
    family, arch = parse_target(target)
    _, pipeline = api.in_numerics(family, arch, family.format("plan"))
    lowered = api.lower(module, target, "plan", passes=over_devices(pipeline, 8)).module
    plan = draft(lowered, gpu(arch.name)).plan
    facts = device_facts(plan, lowered)
    check_fits(facts, load_devices()[card])
    held = [d["weight_bytes"] + d["state_bytes"] for d in facts["devices"]]
    assert 155e9 < sum(held) < 165e9 and max(held) < 1.2 * sum(held) / 8
    assert [h["name"] for h in facts["handovers"]] == [
        f"layers.{d['layers'][1]}.streams" for d in facts["devices"][:-1]
    ]
    for tokens in (1, 512):
        sizes = {"B": 1, "T": tokens, "L": 1, "ctx": 8192, "ctx_4": 2048, "ctx_128": 64}
        check_step(plan, sizes)
