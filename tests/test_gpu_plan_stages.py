"""Launch plans over several devices, without Triton and without a device: cuts, what passes between stages,
damage, and the order of copies on a machine whose streams run as late as they may.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_machine import Machine, chain, written
from gpu_support import GOLDEN, lowered, write_draft

from dsv4c import api
from dsv4c.cli.devices import HEAD, device_rows, device_sentences
from dsv4c.errors import ArtifactError, TargetError, UsageError
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module
from dsv4c.passes import parse_pipeline
from dsv4c.passes.pipeline import over_devices
from dsv4c.runtime.backends import dimension
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.plan import Plan
from dsv4c.runtime.gpu.check import check_step
from dsv4c.runtime.gpu.driver_cuda import CudaDevice
from dsv4c.runtime.gpu.driver_hip import HipDevice
from dsv4c.runtime.gpu.dry_run import DryRunDevice
from dsv4c.runtime.gpu_backend import GpuBackend
from dsv4c.targets.gpu.arch import GPUS, gpu
from dsv4c.targets.gpu.devices import check_fits
from dsv4c.targets.gpu.emit import plan_report
from dsv4c.targets.gpu.plan import Draft, draft
from dsv4c.targets.hardware import load_devices

KINDS: dict[str, Any] = {"cuda": CudaDevice, "hip": HipDevice}


@pytest.fixture(scope="module", params=["v4", "v41"])
def model(request: pytest.FixtureRequest) -> Module:
    return lowered(GOLDEN / request.param)


@pytest.fixture(scope="module")
def v41() -> Module:
    return lowered(GOLDEN / "v41")


def over(module: Module, devices: int, context: int = 64) -> Module:
    """The same module for so many devices."""
    out = clone(module)
    out.parts, out.store = module.parts, module.store
    out.meta["spread"] = {"devices": devices, "batch": 1, "context": context}
    return out


def sizes_of(plan: Plan, b: int, t: int, ctx: int) -> dict[str, int]:
    return {"B": b, "T": t, "L": 1, "I": 2, "ctx": ctx} | {f"ctx_{n}": ctx // n for n in (2, 4, 128)}


# ------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(g, id=g.name, marks=() if g.name in ("sm_90a", "gfx942") else pytest.mark.matrix)
        for g in GPUS
    ],
)
def test_every_launch_and_handover_is_sound_at_many_sizes(model: Module, target: Any) -> None:
    for devices in (2, 3, 5):
        plan = draft(over(model, devices), target).plan
        assert len(plan.stages) == devices
        for b, t, ctx in ((1, 1, 64), (2, 7, 129), (1, 300, 4096)):
            check_step(plan, sizes_of(plan, b, t, ctx))


def test_stages_have_every_layer_weight_and_state_once(model: Module) -> None:
    """Layers follow one another; what is on two devices is no layer's, or a state that both keep."""
    one, cut = (draft(over(model, n), gpu("sm_90a")).plan for n in (1, 3))
    assert [s.first for s in cut.stages][1:] == [s.last + 1 for s in cut.stages][:-1]
    assert (cut.stages[0].first, cut.stages[-1].last) == (0, model.meta["layers"] - 1)  # type: ignore[operator]
    held = [{b.name for b in cut.held(n)} for n in range(3)]
    assert set.union(*held) == {b.name for b in one.held(0)}
    assert set(cut.buffers) == set(one.buffers) and cut.of_kind("state") == one.of_kind("state")
    assert sorted(map(str, cut.kernels)) == sorted(map(str, one.kernels))
    kept = {b.name for b in cut.of_kind("state")}
    for n, stage in enumerate(cut.stages):
        for name in held[n]:
            layer = int(name.split(".")[1]) if name.startswith("layers.") else stage.first
            assert stage.first <= layer <= stage.last or (name in kept and layer < stage.first), name
    assert cut.results() == {"logits": 2}
    assert {"tokens", "n_valid"} <= held[0] and "rows" in held[2] and "pos" in held[0] & held[1] & held[2]


def test_one_device_is_as_if_nothing_had_been_asked_for(model: Module) -> None:
    plain = clone(model)
    plain.parts = model.parts
    del plain.meta["spread"]
    found, want = draft(over(model, 1), gpu("sm_90a")).plan, draft(plain, gpu("sm_90a")).plan
    assert found == want and not found.handovers and [p.name for p in found.programs][:2] == ["few", "many"]


def test_cuts_follow_bytes_of_weights_and_states(v41: Module) -> None:
    """Layers of a long context weigh what their entries take; the image encoder is the first device's."""
    short, long = (draft(over(v41, 3, ctx), gpu("sm_90a")).plan for ctx in (64, 8192))
    assert [(s.first, s.last) for s in short.stages] != [(s.first, s.last) for s in long.stages]
    assert [(s.first, s.last) for s in long.stages] == [(0, 2), (3, 4), (5, 7)]
    assert [p.stage for p in long.programs] == [0, 0, 1, 1, 2, 2, 0]
    assert {b.name for b in long.inputs("vision")} <= {b.name for b in long.held(0)}


def test_what_later_layers_read_goes_to_each_that_reads_it(v41: Module) -> None:
    """Layer 4 of eight makes entries, index keys and candidates for all behind it; these are appended to
    copies of its states on their devices, and selections go on from the layer that made them.
    """
    plan = draft(over(v41, 8), gpu("sm_90a")).plan
    ways: dict[str, list[tuple[int, int]]] = {}
    for h in plan.handovers:
        ways.setdefault(h.buffer.name, []).append((h.source, h.target))
    assert ways["layers.4.attn.compressor.rotary"] == [(4, 5), (4, 6), (4, 7)]
    assert ways["layers.4.attn.indexer.norm_rotary"] == [(4, 6)]
    assert ways["layers.4.attn.indexer.index_candidates.0"] == [(4, 5)]
    assert ways["layers.4.attn.indexer.index_candidates.1"] == [(4, 6)]
    assert ways["layers.6.attn.indexer.index_select"] == [(6, 7)]
    for layer in range(7):
        assert ways[f"layers.{layer}.streams"] == [(layer, layer + 1)]
    keepers = {n for n in range(8) if any(b.name == "layers.4.entries" for b in plan.held(n))}
    assert keepers == {4, 5, 6, 7}
    selected = next(h.buffer for h in plan.handovers if h.buffer.name.endswith("index_select"))
    assert (selected.dtype, selected.shape) == ("i32", ("B", "T", "8"))


def test_more_devices_than_layers_are_refused(model: Module) -> None:
    with pytest.raises(TargetError, match=r"9 stages; allowed: at most its \d layers"):
        draft(over(model, 9), gpu("sm_90a"))


def test_devices_are_an_option_of_the_pass_that_cuts() -> None:
    plan = api.choose_pipeline(api.parse_target("cuda")[0].format("plan"))
    assert [str(p) for p in over_devices(plan, 8) if p.spreads] == [
        "spread_layers{devices=8, batch=1, context=8192}"
    ]
    onnx = api.choose_pipeline(api.parse_target("ascend")[0].format("onnx"))
    assert "stages=4" in ",".join(map(str, over_devices(onnx, 4)))
    with pytest.raises(UsageError, match=r"a pipeline that cuts no model; allowed: .*bind_shapes, spread"):
        over_devices(parse_pipeline("fuse_swiglu"), 2)


def test_a_model_that_does_not_fit_its_devices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the estimate for the card, before any kernel is compiled; with the number that fits."""
    small = dataclasses.replace(load_devices()["h200"], memory=4_000_000)
    monkeypatch.setattr(api, "known_devices", lambda plugins: {small.name: small})
    monkeypatch.setattr(api, "_check_packages", lambda form: None)
    with pytest.raises(TargetError, match=r"(?s)the model needs \d+ bytes on 2 devices.*--devices \d fits"):
        api.compile(GOLDEN / "v4", output=tmp_path / "m.dsv4", target="cuda", devices=2)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def found(v41: Module) -> Draft:
    return draft(over(v41, 3, 8192), gpu("sm_90a"))


@pytest.fixture(scope="module")
def report(v41: Module, found: Draft) -> Any:
    facts = plan_report(found.plan, over(v41, 3, 8192), found, load_devices()["h200"])
    return json.loads(json.dumps(facts))


def test_the_report_has_every_device(found: Draft, report: Any) -> None:
    memory = report["memory"]
    assert (memory["batch"], memory["context"], len(memory["devices"])) == (1, 8192, 3)
    assert [d["layers"] for d in memory["devices"]] == [[0, 2], [3, 4], [5, 7]]
    # entries of layer 4, kept by two: 64 numbers of 4 bytes for each position
    assert all(d["state_bytes"] > 8192 * 64 * 4 for d in memory["devices"][1:])
    assert [d["handed_bytes"]["decode"] for d in memory["devices"]] == [
        0, 4 * (64 + 8 + 4 + 4 * 128), 4 * (64 + 32 + 5 + 8 + 4 + 4 * 128)
    ]  # fmt: skip
    for step in report["roofline"]["steps"].values():
        stages = step["stages"]
        for name in ("flops", "weight_bytes", "data_bytes"):
            assert sum(s[name] for s in stages) == pytest.approx(step[name], rel=1e-3)
        assert sum(s["seconds"] + s["link_seconds"] for s in stages) == pytest.approx(step["seconds"])
        assert stages[2]["link_seconds"] == pytest.approx(stages[2]["handed_bytes"] / 450e9)
        assert sum(s["launches"] for s in stages) == len(step["launches"])
    assert [p["device"] for p in report["programs"]] == [0, 0, 1, 1, 2, 2, 0]


def test_a_device_that_its_card_does_not_hold_is_refused(report: Any) -> None:
    """By the plan's own bytes, tables of Engram and all that is kept twice included."""
    held = [d["weight_bytes"] + d["state_bytes"] for d in report["memory"]["devices"]]
    card, most = load_devices()["h200"], max(held)
    check_fits(report["memory"], dataclasses.replace(card, memory=int(most / 0.9) + 2))
    check_fits(report["memory"], dataclasses.replace(card, memory=None))
    first, last = report["memory"]["devices"][held.index(most)]["layers"]
    what = rf"h200: layers {first} to {last} take {most} bytes on device {held.index(most)}; allowed: .* 90%"
    with pytest.raises(TargetError, match=what):
        check_fits(report["memory"], dataclasses.replace(card, memory=int(most / 0.9) - 2))


def test_rows_of_the_table_of_devices(report: Any) -> None:
    rows = device_rows(report)
    assert [row[0] for row in rows] == [0, 1, 2, "all"] and {len(row) for row in rows} == {len(HEAD)}
    assert rows[1][1] == "3 to 4"
    sentences = device_sentences(report)
    assert sentences[0] == "Bytes for 1 sequence(s) of 8192 positions."
    assert "layers.4.attn.indexer.index_candidates.1 i32[B, T, 5]" in sentences[1]
    assert sentences[2].startswith("decode: ")


# ----------------------------------------------------------------------------------------- damage

SIZES = {"B": 1, "T": 3, "R": 1}


def edited(path: str, value: Any) -> dict[str, Any]:
    """The chain with a place such as `handovers.0.source` set; the value None removes it."""
    data: Any = json.loads(json.dumps(chain().as_json()))
    *way, last = path.split(".")
    place = data
    for part in way:
        place = place[int(part) if part.isdigit() else part]
    if value is None:
        del place[int(last) if last.isdigit() else last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return dict(data)


def test_the_chain_is_sound() -> None:
    plan = chain()
    assert Plan.from_json(json.loads(json.dumps(plan.as_json())), "here") == plan
    check_step(plan, SIZES)
    check_step(plan, SIZES | {"T": 40})


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("handovers.0.source", 1, "handover of a, stage 1 to 1: a value goes to a later stage"),
        ("handovers.0.source", -1, "a value goes to a later stage"),
        ("handovers.3.target", 4, "a value goes to a later stage; allowed: 4 stages"),
        ("handovers.3.source", 1, "stage 1 to 3, program 1.few: output 'a'; allowed: b"),
        ("handovers.0.buffer.dtype", "i32", "an output of dtype 'f32'; allowed: i32"),
        ("handovers.0.buffer.kind", "input", "a: a input is handed over"),
        ("handovers.1.target", 1, "the value comes from two stages"),
        ("handovers.0", None, "1.few, launch 0 for a to b, add_one.x: buffer 'a'; allowed: x, total, b"),
        ("handovers.2", None, "2.few, launch 0 for b to c, add_one.x: buffer 'b'"),
        ("programs.0.outputs", {}, "stage 0 to 1, program 0.few: output 'a'"),
        ("programs.1.outputs.c", "a", "stages 1 and 2 both give c"),
        ("programs.2.stage", 4, "program 2.few: there is no stage 4"),
        ("programs.4.stage", 1, "sm_90a, stage 0: the last program must be for any size"),
        ("stages", [], "program 0.few: there is no stage 0"),
        ("stages.0.last", "all", r"stages\[0\]\.last: 'all' is no int"),
    ],
)
def test_a_damaged_handover_is_refused(path: str, value: Any, what: str) -> None:
    with pytest.raises(ArtifactError, match=what):
        Plan.from_json(edited(path, value), "here")


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        (
            "handovers.1.buffer.shape.1", "T+1",
            r"handover of stage 0 to 2: a has shape \[1, 3, 4\]; allowed: \[1, 4, 4\]",
        ),
        ("handovers.1.buffer.shape.1", "T-1", r"x: elements 0 to 12 of a, which has 8"),
        ("programs.2.launches.0.arguments.1.buffer", "a", "y writes a, as does x|writes handed a"),
        ("programs.0.launches.0.arguments.1.buffer", "total", "output a: a is read before anything is"),
    ],
)  # fmt: skip
def test_an_unsound_handover_is_found(path: str, value: Any, what: str) -> None:
    data = edited(path, value)
    if path.startswith("programs.0"):  # the other program is sound
        data["programs"][0]["temporaries"][0]["last"] = 0
    plan = Plan.from_json(data, "here")
    with pytest.raises(ArtifactError, match=what):
        check_step(plan, SIZES)


def test_a_state_that_only_one_of_its_keepers_writes_is_found() -> None:
    """Stage 1 reads what stage 3 adds to, and would see the state of before for ever."""
    data = edited("programs.1.launches.0.arguments.0.buffer", "total")
    plan = Plan.from_json(data, "here")
    with pytest.raises(ArtifactError, match="stages 1, 3 keep state total, and only 3 write to it"):
        check_step(plan, SIZES)


# ---------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def artifact(v41: Module, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("stages") / "m.dsv4"
    return Artifact.open(write_draft(over(v41, 3), v41.store, path))


def test_a_model_runs_dry_on_several_devices(v41: Module, artifact: Artifact) -> None:
    """Every device has its launches and no others, memory of its own, and what it is handed."""
    devices = [DryRunDevice() for _ in range(3)]
    backend = GpuBackend(artifact, devices, check=True, resident=True)
    state = {
        n: np.zeros([dimension(str(d), {"B": 1, "ctx": 256}) for d in v.type.shape], v.type.dtype.storage)
        for n, v in v41.states.items()
    }
    plan, vocabulary = backend.plan, v41.meta["vocab_size"]
    for t, kind in ((1, 0), (17, 1), (1, 0)):
        before = [len(d.launches) for d in devices]
        ids = np.zeros((1, t), np.int32)
        logits = backend.step(ids, np.full(1, t, np.int32), np.zeros((1, 1), np.int32), state)
        assert logits.shape == (1, 1, vocabulary)
        made = [len(d.launches) - n for d, n in zip(devices, before, strict=True)]
        assert made == [len(plan.programs_of(n)[kind].launches) for n in range(3)]
    backend.bring()
    assert [len(d.taken) for d in devices] == [3 * len(plan.handed_to(n)) for n in range(3)]
    streams = 4 * 4 * int(str(v41.meta["hidden_size"]))
    assert streams in devices[2].taken and 17 * streams in devices[2].taken


def test_every_stage_has_room_or_nothing_runs(v41: Module, artifact: Artifact) -> None:
    others = [DryRunDevice(), DryRunDevice()]
    what = r"stage 1 \(layers \d to \d\) needs \d+ bytes more for its weights, and device 1 has 1000 free\n"
    with pytest.raises(ArtifactError, match=what) as caught:
        GpuBackend(artifact, [others[0], DryRunDevice(1000), others[1]])
    weights = int(str(caught.value).split("needs ")[1].split()[0])
    backend = GpuBackend(artifact, [others[0], DryRunDevice(weights + 200_000), others[1]])
    state = {
        n: np.ones([dimension(str(d), {"B": 2, "ctx": 4096}) for d in v.type.shape], v.type.dtype.storage)
        for n, v in v41.states.items()
    }
    ids = np.zeros((2, 4), np.int32)
    with pytest.raises(ArtifactError, match=r"stage 1 .* bytes more for states and temporaries"):
        backend.step(ids, np.full(2, 4, np.int32), np.zeros((2, 1), np.int32), state)
    assert all((array == 1).all() for array in state.values()), "a step that does not fit changes nothing"


def opened(vendor: str, machine: Machine, path: Path) -> GpuBackend:
    """The chain on four devices of a machine."""
    plan = chain(vendor)
    devices = [KINDS[vendor](plan, "m.dsv4", machine, n) for n in range(len(plan.stages))]
    return GpuBackend(written(plan, path / "c.dsv4"), devices, check=True, resident=True)


def steps(backend: GpuBackend) -> tuple[list[tuple[float, float]], float]:
    """Results of six steps, the last four as graphs, and the sum that the last device keeps."""
    state = {"total": np.zeros((1, 1, 300, 4), np.float32)}
    out = []
    for x in (1, 10, 100, 1000, 5, 7):
        given = {"x": np.full((1, 1, 4), x, np.float32)}
        found = backend.call(given, state)
        out.append((float(found["c"][0, 0, 0]), float(found["d"][0, 0, 3])))
    backend.bring()
    return out, float(state["total"][0, 0, 0, 1])


WANTED = [(x + 3.0, x + 2.0) for x in (1, 10, 100, 1000, 5, 7)], 1129.0


@pytest.mark.parametrize("vendor", ["cuda", "hip"])
def test_copies_come_between_what_made_them_and_what_reads_them(vendor: str, tmp_path: Path) -> None:
    machine = Machine(4)
    backend = opened(vendor, machine, tmp_path)
    assert steps(backend) == WANTED
    done = [[what for what, device in machine.log if device == n] for n in range(4)]
    once = [
        ["add_one"], ["copy from 0", "add_one"], ["copy from 0", "copy from 1", "add_one", "add_one"],
        ["copy from 0", "sum_up"],
    ]  # fmt: skip
    assert done == [6 * what for what in once]
    assert machine.calls.count(f"{'cu' if vendor == 'cuda' else 'hip'}GraphLaunch") == 4 * 5
    ways = {(0, 1), (0, 2), (1, 2), (0, 3)}
    assert machine.reached == ways | {(b, a) for a, b in ways}
    assert steps(opened(vendor, machine, tmp_path)) == WANTED, "a second session finds access enabled"


@pytest.mark.parametrize("vendor", ["cuda", "hip"])
def test_the_machine_would_notice_a_missing_order(vendor: str, tmp_path: Path) -> None:
    machine = Machine(4)
    machine.events = False
    assert steps(opened(vendor, machine, tmp_path)) != WANTED


def test_the_next_step_waits_until_the_last_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the last device, so without the way back its copies come late: of other numbers."""
    plain = CudaDevice._wait_for

    def forwards(self: Any, other: Any) -> None:
        if other.number < self.number:
            plain(self, other)

    monkeypatch.setattr(CudaDevice, "_wait_for", forwards)
    results, total = steps(opened("cuda", Machine(4), tmp_path))
    assert results == WANTED[0] and total != WANTED[1]


@pytest.mark.parametrize("vendor", ["cuda", "hip"])
def test_a_machine_with_fewer_or_other_devices_is_refused(vendor: str, tmp_path: Path) -> None:
    what = r"compiled for 4 devices, this machine shows 2; allowed: 4 or more of .*\n.*--devices"
    with pytest.raises(ArtifactError, match=what):
        opened(vendor, Machine(2), tmp_path)
    with pytest.raises(ArtifactError, match="1 devices for 4 stages"):
        GpuBackend(written(chain(vendor), tmp_path / "d.dsv4"), DryRunDevice())

    class Mixed(Machine):
        """Its last device is another one."""

        def __getattribute__(self, name: str) -> Any:
            last = name in ("capability", "name") and self.current == 3
            return ((8, 0) if name == "capability" else b"gfx90a") if last else super().__getattribute__(name)

        def _deviceget(self, out: Any, number: Any) -> int:
            self.current = number.value
            return super()._deviceget(out, number)

    with pytest.raises(ArtifactError, match=r"compiled for \w+, device 3 is (8.0|gfx90a); allowed: "):
        opened(vendor, Mixed(4), tmp_path)


def test_a_device_without_room_is_refused(tmp_path: Path) -> None:
    machine = Machine(4)
    backend = opened("cuda", machine, tmp_path)
    machine.free = 100
    with pytest.raises(ArtifactError, match=r"stage 0 \(layers 0 to 0\) needs \d+ bytes more .* 100 free"):
        steps(backend)
