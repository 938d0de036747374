"""Launch plans without Triton and without a device: sizes, validation, the check of every launch, the
drivers.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_support import GOLDEN, FakeDriver, lowered, quiet, write_draft
from support import B, Case, T

from dsv4c.errors import ArtifactError, CompileError, TargetError, ToolchainError
from dsv4c.ir.graph import Module
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.container.plan import Argument, Buffer, Kernel, Launch, Parameter, Plan
from dsv4c.runtime.container.sizes import size, symbols
from dsv4c.runtime.gpu.check import check_program
from dsv4c.runtime.gpu.driver import Library
from dsv4c.runtime.gpu.driver_cuda import CUDA, CudaDevice
from dsv4c.runtime.gpu.driver_hip import HIP, HipDevice
from dsv4c.runtime.gpu.dry_run import DryRunDevice
from dsv4c.runtime.gpu_backend import GpuBackend
from dsv4c.targets.base import Arch
from dsv4c.targets.gpu import build as building
from dsv4c.targets.gpu.arch import GPUS, gpu
from dsv4c.targets.gpu.emit import emit_plan
from dsv4c.targets.gpu.lowering import LOWERINGS
from dsv4c.targets.gpu.occupancy import occupancy
from dsv4c.targets.gpu.ops import PLAN_OPS
from dsv4c.targets.gpu.plan import draft
from dsv4c.targets.gpu.table import SOURCES, source
from dsv4c.targets.gpu.tiles import tiles

KERNELS = Path(building.__file__).parent / "kernels"


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("B*T", 6), ("(T+3)//4", 1), ("max(B,T)-min(B,5)", 1), ("(2*(B+T))//2", 5), ("T*-1+4", None)],
)
def test_sizes(text: str, value: int | None) -> None:
    if value is None:
        with pytest.raises(ArtifactError, match="is no size"):
            size(text, {"T": 1})
    else:
        assert size(text, {"B": 2, "T": 3}) == value


@pytest.mark.parametrize(
    "text", ["", "B.real", "__import__('os')", "B**9", "B/2", "1.5", "True", "[B]", "f(B)", "max()"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="is no size; allowed: integers"):
        symbols(text)


def test_sizes_need_their_symbols_and_do_not_divide_by_zero() -> None:
    with pytest.raises(ArtifactError, match="size 'B\\*T' needs B; allowed: T"):
        size("B*T", {"T": 1})
    with pytest.raises(ArtifactError, match="divides by zero"):
        size("T//(T-1)", {"T": 1})


# ------------------------------------------------------------------------------------- the tables


def test_every_op_and_every_kernel_is_in_its_table() -> None:
    assert set(LOWERINGS) == PLAN_OPS
    found = {}
    for path in KERNELS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in {s.name for s in SOURCES}:
                found[node.name] = path.stem, node
    for entry in SOURCES:
        module, node = found[entry.name]
        assert module == entry.module and ast.get_docstring(node), entry.name
        constants = {a.arg for a in node.args.args if a.annotation is not None}
        given = [a.arg for a in node.args.args if a.annotation is None]
        parameters = entry.parameters({"W": "*u8", "S": "*u8"}, 1)
        assert [p.name for p in parameters] == given, entry.name
        for p in parameters:
            assert symbols(p.elements or "0") <= constants | set(given), (entry.name, p.name)


@pytest.mark.parametrize("target", GPUS, ids=lambda g: g.name)
def test_every_heavy_kernel_has_tiles_on_every_gpu(target: Any) -> None:
    for name in (
        "linear",
        "expert_up",
        "expert_down",
        "attention",
        "index_scores",
        "index_topk",
        "hc_project",
        "full_attention",
    ):
        for few in (True, False):
            found = tiles(name, target, few)
            assert found.warps * target.warp <= 1024 and found.stages >= 1


def test_occupancy_follows_registers_and_shared_memory() -> None:
    h100, mi300 = gpu("sm_90a"), gpu("gfx942")
    assert occupancy(h100, {"registers": 32}, 0, 4) == 1.0
    assert occupancy(h100, {"registers": 128}, 0, 4) == 0.25
    assert occupancy(h100, {"registers": 32}, 100 << 10, 4) == 0.125
    assert occupancy(mi300, {"registers": 256}, 0, 4) == 0.25


# ------------------------------------------------------------------------------------------ plans


@pytest.fixture(scope="module")
def golden_module() -> Module:
    return lowered(GOLDEN / "v4")


@pytest.fixture(scope="module")
def golden_plan(golden_module: Module) -> Plan:
    return draft(golden_module, gpu("sm_90a")).plan


def test_a_plan_survives_json(golden_plan: Plan) -> None:
    text = json.dumps(golden_plan.as_json())
    assert Plan.from_json(json.loads(text), "here") == golden_plan


def edited(plan: Plan, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(plan.as_json()))
    edit(data)
    return data


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a place such as `kernels.0.warps`; the value None removes it."""

    def edit(data: dict[str, Any]) -> None:
        *way, last = path.split(".")
        place: Any = data
        for part in way:
            place = place[int(part)] if part.isdigit() else place[part]
        if value is None:
            del place[last]
        else:
            place[int(last) if last.isdigit() else last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("version", 1, "its launch plan has version 1; allowed: 2"),
        ("vendor", "metal", "vendor 'metal'; allowed: cuda, hip"),
        ("arch", 3, r"here\.arch: '3' is no str"),
        ("exact", "yes", r"here\.exact: 'yes' is no bool"),
        ("kernels", {}, r"here\.kernels: '{}' is no a list"),
        ("kernels.0.warps", None, r"here\.kernels\[0\]: fields missing or unknown: warps"),
        ("kernels.0.blocks", 1, "fields missing or unknown: blocks"),
        ("kernels.0.warps", 3, "3 warps of 32 threads"),
        ("kernels.0.warps", True, r"kernels\[0\]\.warps: 'True' is no int"),
        ("kernels.0.parameters.0.type", "*fp64", "type '\\*fp64'; allowed: \\*fp32"),
        ("kernels.0.parameters.0.elements", "B..", "is no size"),
        ("programs.0.launches.0.grid", ["1"], "a grid has three sizes"),
        ("programs.0.launches.0.kernel", 999, "kernel 999 does not exist"),
        ("programs.0.launches.0.arguments", [], "copy takes 3 arguments, not 0"),
        ("programs.0.launches.0.arguments.0.buffer", "nowhere", "buffer 'nowhere'; allowed: x"),
        ("programs.0.launches.0.arguments.0.integer", "1", "an argument is a buffer, an integer or a number"),
        ("programs.0.temporaries.0.slot", -1, "temporaries, and they alone, have a slot and a life"),
        ("programs.0.temporaries.0.slot", 10**6, "is no temporary with a slot"),
        ("programs.0.outputs.c", "nowhere", "buffer 'nowhere'"),
        ("programs.0.most", 4, "the last program must be for any size"),
        ("buffers.0.dtype", "f64", "dtype 'f64'; allowed: f32"),
        ("programs.0.temporaries.0.name", "x", "two buffers share a name"),
    ],
)  # fmt: skip
def test_a_damaged_plan_says_where(path: str, value: Any, what: str) -> None:
    with pytest.raises(ArtifactError, match=what):
        Plan.from_json(edited(small()[0], _set(path, value)), "here")


# ------------------------------------------------------------------------------ check of launches


@pytest.mark.parametrize("target", GPUS, ids=lambda g: g.name)
def test_every_launch_of_a_model_is_sound_at_many_sizes(golden_module: Module, target: Any) -> None:
    plan = draft(golden_module, target).plan
    for b, t, ctx in ((1, 1, 64), (3, 1, 4096), (2, 7, 129), (1, 300, 4096)):
        sizes = {"B": b, "T": t, "L": 1, "ctx": ctx, "ctx_4": ctx // 4, "ctx_128": ctx // 128}
        for program in plan.programs:
            if not program.most or b * t <= program.most:
                check_program(plan, program, sizes)


def small() -> tuple[Plan, dict[str, int]]:
    """x -> a -> b -> c, three launches of one kernel; a and c share a slot."""
    kernel = Kernel(
        "copy", "rowwise", "copy",
        (Parameter("x", "*fp32", "r", "M*N"), Parameter("y", "*fp32", "w", "M*N", True), Parameter("M",
        "i32")),
        {"N": 4}, 4, 1, shared=1024,
    )  # fmt: skip
    names = [("x", "a"), ("a", "b"), ("b", "c")]
    launches = tuple(
        Launch(0, ("B", "1", "1"), (Argument(x), Argument(y), Argument(integer="B*T")), f"{x} to {y}")
        for x, y in names
    )
    held = tuple(
        Buffer(n, "temporary", "f32", ("B", "T", "4"), slot, first, last)
        for n, slot, first, last in (("a", 0, 0, 1), ("b", 1, 1, 2), ("c", 0, 2, 2))
    )
    from dsv4c.runtime.container.plan import Program

    program = Program("many", "1", 0, held, ("B*T*16", "B*T*16"), launches, {"c": "c"})
    inputs = (Buffer("x", "input", "f32", ("B", "T", "4")),)
    return Plan(2, "cuda", "sm_90a", "9.0", True, 0, 2048, inputs, (kernel,), (program,)), {"B": 2, "T": 3}


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("kernels.0.shared", 4096, "launch 0, copy for x to a: 4096 bytes of shared memory; allowed: 2048"),
        ("programs.0.launches.1.grid.1", "B*100000", r"launch 1, copy for a to b: grid \[2, 200000, 1\]"),
        ("programs.0.launches.1.grid.0", "B-2", r"grid \[0, 1, 1\]"),
        ("programs.0.launches.2.arguments.0.buffer", "a", "x: a lives from 0 to 1"),
        ("programs.0.launches.0.arguments.0.buffer", "b", "b is read before anything is written to it"),
        ("programs.0.launches.0.arguments.1.buffer", "x", "y: writes input x"),
        ("programs.0.launches.1.arguments.1.buffer", "a", "y writes a, as does x"),
        ("programs.0.launches.1.arguments.0.offset", "3", "x: elements 3 to 27 of a, which has 24"),
        ("programs.0.launches.1.arguments.2.integer", "B*T+1", "elements 0 to 28 of a, which has 24"),
        ("programs.0.launches.1.arguments.2.integer", "B*2147483648", "is no int32"),
        ("programs.0.slots.1", "B*T", "b does not fit its slot"),
        ("programs.0.temporaries.1.slot", 0, "b overwrites a, which is still needed"),
        ("programs.0.outputs.c", "b", "output c: b is read after|c: b"),
    ],
)  # fmt: skip
def test_an_unsound_launch_is_found(path: str, value: Any, what: str) -> None:
    plan, sizes = small()
    check_program(plan, plan.programs[0], sizes)
    if path.endswith("outputs.c"):  # b is still there: nothing wrong with that
        return
    bad = Plan.from_json(edited(plan, _set(path, value)), "here")
    with pytest.raises(ArtifactError, match=what):
        check_program(bad, bad.programs[0], sizes)


def test_an_offset_must_be_at_16_bytes_where_the_code_relies_on_it() -> None:
    plan, sizes = small()
    data = edited(plan, _set("programs.0.launches.0.arguments.1.offset", "1"))
    data["programs"][0]["launches"][0]["arguments"][2]["integer"] = "1"
    bad = Plan.from_json(data, "here")
    with pytest.raises(ArtifactError, match="a from element 1 on is not at 16 bytes"):
        check_program(bad, bad.programs[0], sizes)


def test_a_slot_that_another_has_taken_is_found() -> None:
    """c takes the slot of a; a launch behind it that reads a is a use after free."""
    plan, sizes = small()
    data = edited(plan, _set("programs.0.temporaries.0.last", 3))
    data["programs"][0]["temporaries"][2]["last"] = 3
    data["programs"][0]["launches"][2]["arguments"][1]["buffer"] = "c"
    with pytest.raises(ArtifactError, match="c overwrites a, which is still needed"):
        bad = Plan.from_json(data, "here")
        check_program(bad, bad.programs[0], sizes)


# ---------------------------------------------------------------------------------------- running


def step_of(t: int) -> dict[str, Any]:
    return {
        "tokens": np.zeros((1, t), np.int32), "n_valid": np.full(1, t, np.int32), "rows": np.zeros((1, 1),
        np.int32)
    }  # fmt: skip


def test_a_model_runs_dry(tmp_path: Path) -> None:
    """The program for few rows up to 16 tokens; memory that grows moves; every launch is checked."""
    module = lowered(GOLDEN / "v4")
    artifact = Artifact.open(write_draft(module, module.store, tmp_path / "m.dsv4"))
    device = DryRunDevice()
    backend = GpuBackend(artifact, device, check=True)
    sizes = {"B": 1, "ctx": 256, "ctx//4": 64, "ctx//128": 2}
    state = {
        n: np.zeros([sizes.get(str(d), d) for d in v.type.shape], v.type.dtype.storage)  # type: ignore[arg-type]
        for n, v in module.states.items()
    }
    counts = []
    for t in (1, 16, 17, 1):
        before = len(device.launches)
        assert backend.call(step_of(t), state)["logits"].shape == (1, 1, 320)
        counts.append(len(device.launches) - before)
    few, many = (len(p.launches) for p in backend.plan.programs)
    assert counts == [few, few, many, few]
    state["pos"] = np.zeros(2, np.int32)
    with pytest.raises(ArtifactError, match="has shape"):
        backend.call(step_of(1), state)


def loaded(plan: Plan) -> tuple[Plan, bytes]:
    kernel = dataclasses.replace(plan.kernels[0], nbytes=4, shared=64 << 10)
    return dataclasses.replace(plan, kernels=(kernel,)), b"code"


@pytest.mark.parametrize("vendor", ["cuda", "hip"])
def test_a_driver_is_called_as_it_wants_to_be(vendor: str) -> None:
    plan, code = loaded(small()[0])
    fake = FakeDriver(devices=2)
    if vendor == "hip":
        plan = dataclasses.replace(plan, vendor="hip", capability="gfx942")
    kind: Any = CudaDevice if vendor == "cuda" else HipDevice
    device, other = kind(plan, "m.dsv4", fake), kind(plan, "m.dsv4", fake, 1)
    device.load(plan.kernels, code)
    address = device.allocate(64)
    given = np.arange(16, dtype=np.float32)
    device.write(address, given)
    back = np.zeros((4, 4), np.float32)
    device.read(address, back)
    np.testing.assert_array_equal(back.reshape(-1), given)
    device.launch(0, (5, 2, 1), [address, address, 7])
    # grid, block, dynamic shared memory; three parameters and two addresses of scratch memory
    assert fake.launches == [((5, 2, 1, 128, 1, 1, 64 << 10), 5)]
    assert device.begin_graph()
    device.launch(0, (1, 1, 1), [address, address, 7])
    device.run_graph(device.end_graph())
    assert device.free_bytes() == 100 << 20
    device.take(other, [(address, other.allocate(64), 64)])
    device.free(address)
    api = CUDA if vendor == "cuda" else HIP
    assert set(fake.calls) == set(api.functions.values()) - {"cuGetErrorString"}


def test_the_second_step_of_few_rows_is_a_graph(tmp_path: Path) -> None:
    """The first runs launch by launch, the second is recorded, later ones are one call; long ones never."""
    case = Case()
    case.op("scale", case.f32("x", B, T, 8), factor=2.0)
    write_draft(case.module, case.store, tmp_path / "m.dsv4")
    data = json.loads(Artifact.open(tmp_path / "m.dsv4").section("plan"))
    for kernel in data["kernels"]:
        kernel["nbytes"] = 4
    with ArtifactWriter(tmp_path / "n.dsv4") as writer:
        writer.add_section("plan", json.dumps(data).encode())
        writer.add_section("code", b"code")
    artifact, fake = Artifact.open(tmp_path / "n.dsv4"), FakeDriver()
    plan = Plan.from_json(data, "here")
    backend = GpuBackend(artifact, CudaDevice(plan, "m.dsv4", fake))
    for t, launches, graphs in ((1, 1, 0), (1, 2, 1), (1, 2, 2), (40, 3, 2), (40, 4, 2), (1, 5, 2)):
        backend.call({"x": np.zeros((1, t, 8), np.float32)}, {})
        assert (len(fake.launches), fake.calls.count("cuGraphLaunch")) == (launches, graphs), t


def test_a_resident_state_is_fetched_when_asked_for(tmp_path: Path) -> None:
    """Between steps the arrays are stale, but for small ones; `bring` and another state make them current."""
    case = Case()
    _, pos, n_valid = case.step()
    ring = case.state("ring", B, 600, 8)
    case.module.outputs["ring"] = case.b.op("ring_write", ring, case.f32("x", B, T, 8), pos, n_valid)
    artifact = Artifact.open(write_draft(case.module, case.store, tmp_path / "m.dsv4"))

    class Device(DryRunDevice):
        read_ = 0

        def read(self, address: int, array: Any) -> None:
            self.read_ += array.nbytes

    device = Device()
    backend = GpuBackend(artifact, device, resident=True)
    inputs = {
        "tokens": np.zeros((1, 1), np.int32),
        "pos": np.zeros(1, np.int32),
        "n_valid": np.ones(1, np.int32),
    }
    inputs["x"] = np.zeros((1, 1, 8), np.float32)
    one, two = ({"ring": np.zeros((1, 600, 8), np.float32)} for _ in range(2))
    for state, read in ((one, 0), (one, 0), (two, 19200), (two, 19200)):
        backend.call(inputs, state)
        assert device.read_ == read
    backend.bring()
    backend.bring()
    assert device.read_ == 2 * 19200


@pytest.mark.parametrize(
    ("driver", "capability", "kind", "what"),
    [
        (12080, (9, 0), ToolchainError, "the driver is for CUDA 12.8, the code needs 13.0\n.*a newer driver"),
        (13000, (8, 0), ArtifactError, "compiled for sm_90a, this device is 8.0; allowed: 9.0\n.*--target"),
        (13000, (9, 1), ArtifactError, "this device is 9.1"),
    ],
)
def test_a_cuda_device_that_does_not_fit(
    driver: int, capability: tuple[int, int], kind: Any, what: str
) -> None:
    plan = dataclasses.replace(small()[0], driver=13000)
    with pytest.raises(kind, match=what):
        CudaDevice(plan, "m.dsv4", FakeDriver(driver, capability))


def test_code_without_features_of_one_arch_runs_on_later_ones() -> None:
    plan = dataclasses.replace(small()[0], capability="8.0", exact=False)
    CudaDevice(plan, "m.dsv4", FakeDriver(capability=(8, 6)))
    with pytest.raises(ArtifactError, match=r"this device is 9.0"):
        CudaDevice(plan, "m.dsv4", FakeDriver(capability=(9, 0)))


def test_a_hip_device_that_does_not_fit() -> None:
    plan = dataclasses.replace(small()[0], vendor="hip", capability="gfx942")
    with pytest.raises(ArtifactError, match=r"this device is gfx90a; allowed: gfx942"):
        HipDevice(plan, "m.dsv4", FakeDriver(name=b"gfx90a:sramecc+"))


def test_a_missing_driver_and_a_failing_call_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", gone)
    with pytest.raises(
        ToolchainError, match=r"CUDA: there is no driver: libcuda.so.1.*\n.*install NVIDIA's driver"
    ):
        CudaDevice(small()[0], "m.dsv4")
    with pytest.raises(ToolchainError, match=r"ROCm: there is no driver.*\n.*ROCm 6.0"):
        HipDevice(small()[0], "m.dsv4")
    api = dataclasses.replace(HIP, functions={"problem": "hipGetProblem"})
    with pytest.raises(ArtifactError, match=r"m.dsv4: hipGetProblem failed: error 700"):
        Library(api, FakeDriver(), "m.dsv4")("problem")
    with pytest.raises(ToolchainError, match="has no nothing"):
        Library(dataclasses.replace(api, functions={"x": "nothing"}), FakeDriver(), "m.dsv4")


# ---------------------------------------------------------------------------------------- errors


def test_an_unknown_arch_lists_the_known_ones(tmp_path: Path) -> None:
    case = Case()
    case.op("scale", case.f32("x", B, T, 8), factor=2.0)
    with (
        pytest.raises(TargetError, match=r"unknown arch 'sm_91'.*sm_90a"),
        ArtifactWriter(tmp_path / "m") as w,
    ):
        emit_plan(case.module, case.store, w, Arch("sm_91", {}), quiet)


def test_a_missing_triton_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match="the package triton is missing") as caught:
        building.triton_version()
    assert caught.value.hint.startswith('pip install "dsv4c[gpu]"')


@pytest.mark.parametrize(
    ("facts", "shared", "what"),
    [
        (
            {"spilled": 0, "matrix": {"HMMA": 1}},
            1 << 20,
            "needs 1048576 bytes of shared memory; allowed: 232448",
        ),
        (
            {"spilled": 64, "matrix": {"HMMA": 1}},
            0,
            "spills 64 bytes of registers; allowed: none in a hot kernel",
        ),
        ({"spilled": 0, "matrix": {}}, 0, "its code has no matrix instruction; allowed: HMMA"),
    ],
)
def test_a_kernel_that_must_not_be_shipped(facts: dict[str, Any], shared: int, what: str) -> None:
    made = Kernel("linear", "dense", "linear", (), {}, 4, 1, shared=shared, facts=facts)
    with pytest.raises(CompileError, match=f"linear on sm_90a: it? ?{re.escape(what)}|{re.escape(what)}"):
        building.complain(made, gpu("sm_90a"), "linear on sm_90a")


def test_an_op_without_a_kernel_names_the_layer() -> None:
    case = Case()
    case.b.loc = "layers.3"
    case.op("hadamard", case.f32("x", B, T, 8))
    with pytest.raises(TargetError, match=r"layers.3: unknown op 'hadamard'"):
        draft(case.module, gpu("sm_90a"))
    assert source("linear").hot
