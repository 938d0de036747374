"""The benchmark that is carried to a GPU: what it packs, its dry run, and its arithmetic on made-up times."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_support import GOLDEN, FakeDriver, lowered
from test_gpu_plan import loaded, small

from dsv4c import api
from dsv4c.errors import ArtifactError, UsageError
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.costs import Needs, Rates, launch_needs
from dsv4c.runtime.container.plan import Plan
from dsv4c.runtime.gpu.check import check_program
from dsv4c.runtime.verify import Check
from dsv4c.targets.gpu import emit
from dsv4c.targets.gpu.arch import gpu
from dsv4c.targets.gpu.build import Built
from dsv4c.targets.gpu.emit import plan_report
from dsv4c.targets.gpu.plan import Draft, draft

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(FOLDER))

import carried  # noqa: E402
import ceilings  # noqa: E402
import timing  # noqa: E402
from cutting import cut, layers_of  # noqa: E402
from filling import BLOCK, Filler, stored  # noqa: E402
from metering import MEASURE, DryMeter, open_meter  # noqa: E402
from packing import pack_bundle, shape_module  # noqa: E402
from summing import Goal, Row, goals_of, goals_table, rows_of, table, total  # noqa: E402
from timing import Case, read_experts  # noqa: E402

CONFIG = GOLDEN / "v4" / "config.json"
BF16 = 'quantise_activations{rule="bf16"}'


def shaped(layers: int) -> tuple[Draft, list[Any]]:
    """The plan of the golden shape, and its calls."""
    module = lowered(shape_module(CONFIG, layers), BF16)
    found = draft(module, gpu("sm_90a"))
    return found, [p["calls"] for p in plan_report(found.plan, module, found, None)["programs"]]


@pytest.fixture(scope="module")
def whole() -> tuple[Draft, list[Any]]:
    return shaped(0)


# ---------------------------------------------------------------------------------------- the cut


def test_a_cut_plan_is_sound_at_every_number_of_layers(whole: tuple[Draft, list[Any]]) -> None:
    plan, calls = whole[0].plan, whole[1]
    assert layers_of(plan) == 5
    for layers in range(1, 6):
        less, _ = cut(plan, calls, layers)
        for case in (Case("d", 1, 1, 10, 256), Case("d", 3, 4, 10, 1024), Case("p", 1, 300, 0, 4096)):
            sizes = case.sizes(less)
            check_program(less, less.program(sizes), sizes)
    for layers in (0, 6):
        with pytest.raises(ArtifactError, match="allowed: 1 to 5"):
            cut(plan, calls, layers)


def test_a_cut_plan_does_what_that_of_a_smaller_model_does(whole: tuple[Draft, list[Any]]) -> None:
    """The same launches with the same needs, and the same buffers, but for the slots of temporaries."""
    less, less_calls = cut(whole[0].plan, whole[1], 3)
    made, made_calls = shaped(3)
    sizes = {**Case("d", 2, 1, 100, 256).sizes(whole[0].plan), "past": 100}
    for one, two, calls, other in zip(less.programs, made.plan.programs, less_calls, made_calls, strict=True):
        for a, b in zip(one.launches, two.launches, strict=True):
            assert (a.op, a.grid) == (b.op, b.grid)
            assert less.kernels[a.kernel] == made.plan.kernels[b.kernel]
        assert launch_needs(less, one, calls, sizes) == launch_needs(made.plan, two, other, sizes)
    assert set(less.buffers) == set(made.plan.buffers)


# ------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("vendor", ["cuda", "hip"])
def test_events_and_copies_are_called_as_the_driver_wants(vendor: str) -> None:
    plan, _ = loaded(small()[0])
    fake = FakeDriver()
    if vendor == "hip":
        plan = Plan.from_json({**plan.as_json(), "vendor": "hip", "capability": "gfx942"}, "here")
    device, meter = open_meter(plan, "m.dsv4", False, fake)
    assert meter.facts() == {"name": "A card", "driver": 13000, "memory": 200 << 20}
    assert meter.free_bytes() == 100 << 20
    first, between, last = meter.mark(), meter.mark(), meter.mark()
    assert meter.seconds(first, last) == pytest.approx(0.002)
    meter.forget(first, between, last)
    one, two = device.allocate(64), device.allocate(64)
    device.write(one, np.arange(16, dtype=np.int32))
    meter.copy(two, one, 64)
    back = np.zeros(16, np.int32)
    device.read(two, back)
    assert (back == np.arange(16)).all()
    meter.wait()
    called = set(MEASURE[vendor].functions.values()) - {"cuGetErrorString"}
    assert called <= set(fake.calls)


def test_copies_are_counted_read_and_written() -> None:
    plan, _ = loaded(small()[0])
    device, meter = open_meter(plan, "m.dsv4", False, FakeDriver())
    assert ceilings.copy_rate(device, meter, 1 << 20) == pytest.approx(2 * (1 << 20) / 0.001)
    dry, stand_in = open_meter(plan, "m.dsv4", True)
    assert isinstance(stand_in, DryMeter) and ceilings.copy_rate(dry, stand_in, 1 << 20) is None
    with pytest.raises(ArtifactError, match="are no live memory"):
        stand_in.copy(1, 2, 3)


def test_a_card_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = loaded(small()[0])
    device, meter = open_meter(plan, "m.dsv4", False, FakeDriver())

    def gone() -> Any:
        raise OSError("libcublas.so.13: cannot open")

    monkeypatch.setattr(ceilings, "find_cublas", gone)
    rate, source = ceilings.matrix_rate(device, meter, Filler(plan, device, meter), "cuda")
    assert rate is None and source == "no cuBLAS: libcublas.so.13: cannot open"
    assert ceilings.matrix_rate(device, meter, Filler(plan, device, meter), "hip")[0] is None


@pytest.mark.parametrize(("factors", "source"), [("bf16", "cuBLAS"), ("int8", "cuBLAS"), ("fp8", "cuBLASLt")])
def test_one_large_product_of_every_kind(
    monkeypatch: pytest.MonkeyPatch, factors: str, source: str
) -> None:
    """Two that warm up and twelve that count, each a millisecond by the clock of the stand-in."""
    called: list[str] = []

    class Library:
        def __getattr__(self, name: str) -> Any:
            return lambda *given: called.append(name) or 0

    plan, _ = loaded(small()[0])
    device, meter = open_meter(plan, "m.dsv4", False, FakeDriver())
    monkeypatch.setattr(ceilings, "find_cublas", lambda *name: Library())
    monkeypatch.setattr(ceilings, "SIDE", 64)
    filler = Filler(plan, device, meter)
    rate, found = ceilings.matrix_rate(device, meter, filler, "cuda", factors)
    assert rate == pytest.approx(2 * 64**3 / 0.001) and found == f"{source}, 64 x 64 x 64"
    assert called.count("cublasLtMatmul" if factors == "fp8" else "cublasGemmEx") == 14


# -------------------------------------------------------------------------------- made-up weights


def test_made_up_weights_are_numbers_everywhere(whole: tuple[Draft, list[Any]]) -> None:
    plan = whole[0].plan
    fake = FakeDriver()
    device, meter = open_meter(plan, "m.dsv4", False, fake)
    filler = Filler(plan, device, meter)
    for buffer in plan.of_kind("weight"):
        count = int(np.prod([int(n) for n in buffer.shape]))
        address = device.allocate(count * buffer.item_bytes)
        filler.weight(buffer, address)
        raw = np.zeros(count * buffer.item_bytes, np.uint8)
        device.read(address, raw)
        match buffer.dtype:
            case "f8e4m3":
                assert not ((raw & 0x7F) == 0x7F).any() and len(np.unique(raw)) > 32
            case "f8e8m0":
                assert raw.max() < 255 and raw.min() > 64
            case "f32":
                numbers = raw.view(np.float32)
                assert np.isfinite(numbers).all() and numbers.any()
            case "i32" if len(buffer.shape) == 2:
                ids = raw.view(np.int32).reshape(-1, int(buffer.shape[1]))
                assert ids.min() >= 0 and ids.max() < filler._experts
                assert all(len(set(row)) == len(row) for row in ids)


def test_blocks_cover_all_of_a_large_tensor() -> None:
    plan, _ = loaded(small()[0])
    device, meter = open_meter(plan, "m.dsv4", False, FakeDriver())
    nbytes = 2 * BLOCK + 256
    address = device.allocate(nbytes)
    Filler(plan, device, meter).rows(address, nbytes)
    raw = np.zeros(nbytes // 2, np.uint16)
    device.read(address, raw)
    assert raw.reshape(-1, 128).any(axis=1).all()


def test_floats_are_stored_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5], np.float32)
    assert stored(values, "bf16").tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC020]
    assert stored(values, "f16").dtype == np.float16 and stored(values, "f32").dtype == np.float32


# ------------------------------------------------------------------------------------- arithmetic

RATES = Rates(bandwidth=100.0, matrix=1000.0, vector=50.0)


def test_times_of_launches_become_rows() -> None:
    plan, _ = small()  # three launches of one kernel without products
    needs = [Needs(10, 100, 0), Needs(10, 100, 100), Needs(200, 0, 0)]
    (row,) = rows_of(plan, plan.programs[0], needs, [2.0, 4.0, 8.0], RATES)
    assert (row.kernel, row.launches, row.seconds, row.flops, row.bytes) == ("copy", 3, 14.0, 220, 300)
    assert (row.least, row.bound) == (1.0 + 2.0 + 4.0, "compute")  # 4 seconds compute against 3 of memory
    assert row.bandwidth == pytest.approx(300 / 14) and row.rate == pytest.approx(220 / 14)
    (dry,) = rows_of(plan, plan.programs[0], needs, [], RATES)
    assert dry.seconds is None and dry.bandwidth is None and dry.least == 7.0
    (unknown,) = rows_of(plan, plan.programs[0], needs, [1.0] * 3, Rates(100.0, None, None))
    assert unknown.least is None and unknown.bound == "unknown"
    assert total([row, row]).seconds == 28.0 and total([row, dry]).seconds is None


def test_goals_of_decode_and_of_many_tokens() -> None:
    rows = [
        Row("linear", 3, 2.0, 10, 170, 1.7, "memory"), Row("expert_up", 1, 1.0, 600, 10, 0.6, "compute"),
        Row("expert_down", 1, 1.0, 500, 10, 0.5, "compute"), Row("advance", 1, 1e-3, 1, 1, 1e-3, "memory"),
    ]  # fmt: skip
    (goal,) = goals_of("decode", 1, rows, RATES)  # neither what computes nor what takes no time
    assert (goal.name, goal.wanted, goal.verdict) == ("linear: of copy bandwidth", 0.8, "met")
    assert goal.reached == pytest.approx(0.85)
    (goal,) = goals_of("prefill", 4096, rows, RATES)
    assert goal.reached == pytest.approx(0.55) and goal.verdict == "missed"
    assert goals_of("prefill", 512, rows, RATES) == []
    assert Goal("x", 0.8, None).verdict == "not measured"
    text = table(rows, RATES)
    assert "| linear | 3 | 2e+03 | 8.5e-08 | 85 % |" in text and text.count("\n") == 6
    text = goals_table(goals_of("decode", 1, rows, RATES))
    assert "| linear: of copy bandwidth | 80 % | 85 % | met |" in text


def test_products_of_codes_are_held_to_their_own_peak() -> None:
    rates = dataclasses.replace(RATES, fp8=2000.0)
    rows = [
        Row("expert_up_codes", 1, 1.0, 1600, 10, 0.8, "compute", "fp8"),
        Row("expert_down_codes", 1, 1.0, 1200, 10, 0.6, "compute", "fp8"),
        Row("linear", 1, 1.0, 500, 10, 0.5, "compute"),
    ]  # fmt: skip
    (goal,) = goals_of("prefill", 4096, rows, rates)
    assert goal.name == "grouped products at 4096 tokens: of the FP8 matrix peak"
    assert goal.reached == pytest.approx(0.7) and goal.verdict == "met"
    lines = table(rows, rates).split("\n")
    assert "| 80 % | compute |" in lines[2] and "| 50 % | compute |" in lines[4]


def test_bytes_of_experts_are_those_that_were_chosen(whole: tuple[Draft, list[Any]]) -> None:
    plan = whole[0].plan
    program = plan.programs[0]
    names = [plan.kernels[launch.kernel].name for launch in program.launches]
    needs = [Needs(1, 8, 1)] * len(names)
    routes = [np.array([3, 1, 0, 0], np.int32)] * names.count("expert_count")  # two of four that might be
    out = read_experts(plan, program, needs, routes)
    changed = {names[i] for i, n in enumerate(out) if n.weight_bytes != 8}
    assert changed == {"expert_up", "expert_down"}
    assert {n.weight_bytes for n in out} == {8, 4} and all(n.data_bytes == 1 for n in out)


def test_as_many_layers_as_fit(whole: tuple[Draft, list[Any]]) -> None:
    plan = whole[0].plan
    cases = [Case("decode", 2, 1, 255, 256), Case("prefill", 1, 512, 0, 512)]
    sizes = [carried.needed(plan, cases, n) for n in range(1, 6)]
    assert sizes == sorted(sizes)
    assert carried.fitting(plan, cases, 1 << 40) == 5
    assert carried.fitting(plan, cases, sizes[2]) == 3
    assert carried.fitting(plan, cases, sizes[2] - 1) == 2
    with pytest.raises(ArtifactError, match="a card with more memory"):
        carried.fitting(plan, cases, 1)


# ------------------------------------------------------------------------------------- the bundle


def packed(output: Path, golden: Path, numerics: str = "bf16") -> Path:
    """A small bundle whose objects are four bytes each, so that no compiler of kernels is needed."""

    def fake(kernels: Any, target: Any, cache: Any = None, progress: Any = None) -> Built:
        facts = {"registers": 32, "spilled": 0, "matrix": {}, "occupancy": 1.0}
        made = [dataclasses.replace(k, entry=k.name, nbytes=4, facts=facts) for k in kernels]
        return Built(tuple(made), b"code", 13, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emit, "build", fake)
        patch.setattr(api, "_check_packages", lambda form: None)
        assert pack_bundle(["sm_90a"], output, golden, CONFIG, 4, numerics) < 64 << 20
    return output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> Path:
    return packed(tmp_path_factory.mktemp("carried") / "gpu", tiny_directory)


def there(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as it runs on the other machine: from the folder alone, where the compiler is missing."""
    missing = [f"dsv4c.{part}" for part in ("ir", "targets", "passes", "frontend")]
    missing += ["triton", "tvm", "torch", "onnx"]
    script = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({missing}))\n"
        f"sys.path.insert(0, {str(bundle)!r})\nsys.argv = ['gpu', *{list(arguments)}]\n"
        f"runpy.run_path({str(bundle)!r}, run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=bundle.parent, env=environment
    )


def test_a_dry_run_goes_through_everything(bundle: Path) -> None:
    sizes = ("--decode", "1,3", "--prefill", "20", "--context", "64")
    file = bundle.parent / "dry.json"
    run = there(bundle, "run", "--dry-run", *sizes, "-o", str(file))
    assert run.returncode == 0, run.stderr
    assert "A DRY RUN, nothing is measured" in run.stdout
    assert run.stdout.rstrip().endswith("nothing was computed and nothing was measured.")
    report = json.loads(file.read_text())
    assert (report["measured"], report["layers"], report["arch"]) == (False, 4, "sm_90a")
    assert [c["program"] for c in report["cases"]] == ["few", "few", "many"]
    for case in report["cases"]:
        assert case["seconds"] is None and case["launch_seconds"] == [] and case["chosen_experts"] == []
        assert all(row["seconds"] is None and row["least"] > 0 for row in case["kernels"])


def test_without_a_driver_the_run_fails(bundle: Path) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has the driver")
    run = there(bundle, "run", "--arch", "sm_90a")
    assert run.returncode == 2 and "there is no driver" in run.stderr
    run = there(bundle, "run", "--dry-run", "--arch", "sm_80")
    assert run.returncode == 2 and "allowed: sm_90a" in run.stderr


def options(bundle: Path, **given: Any) -> Namespace:
    known = {
        "bundle": bundle, "dry_run": False, "arch": "", "layers": 0, "decode": [1], "prefill": [20],
        "context": 64, "repeats": 4, "output": bundle.parent / "measured.json",
    }  # fmt: skip
    return Namespace(**(known | given))


@pytest.mark.parametrize("numerics", ["fp8", pytest.param("int8", marks=pytest.mark.matrix)])
def test_a_dry_run_of_products_of_codes(
    tmp_path: Path, tiny_directory: Path, capsys: pytest.CaptureFixture[str], numerics: str
) -> None:
    """The goal is a share of that format's peak; nothing is measured, so the published one stands in."""
    made = packed(tmp_path / "gpu", tiny_directory, numerics)
    given = {"dry_run": True, "prefill": [4096], "output": tmp_path / "dry.json"}
    assert carried.run_bundle(options(made, **given)) == 0
    report = json.loads((tmp_path / "dry.json").read_text())
    assert report["numerics"] == numerics and report["ceilings"]["used"][numerics] == 1979e12
    assert report["ceilings"]["matrix_source"][numerics] == "published for h200 (not measured)"
    goal = f"grouped products at 4096 tokens: of the {numerics.upper()} matrix peak"
    assert [g["name"] for g in report["cases"][-1]["goals"]] == [goal]
    assert f"{numerics.upper()} products: 1979 TFLOP/s, published" in capsys.readouterr().out


def test_a_run_with_a_driver_that_computes_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every call of a measurement, with a clock that ticks a millisecond per event."""
    fakes: list[FakeDriver] = []

    def opened(plan: Plan, where: str, dry: bool) -> Any:
        fakes.append(FakeDriver())
        return open_meter(plan, where, dry, fakes[-1])

    monkeypatch.setattr(carried, "open_meter", opened)
    monkeypatch.setattr(carried, "golden", lambda artifact, dry: True)
    monkeypatch.setattr(carried, "SPARE", 0)
    monkeypatch.setattr(ceilings, "find_cublas", lambda: (_ for _ in ()).throw(OSError("not here")))
    monkeypatch.setattr(timing, "PIECE", 1 << 16)
    monkeypatch.setattr(carried, "BLOCK", 0)
    assert carried.run_bundle(options(bundle, arch="sm_90a")) == 0
    report = json.loads((bundle.parent / "measured.json").read_text())
    assert report["measured"] and report["card"]["name"] == "A card" and report["layers"] == 4
    assert report["ceilings"]["matrix_source"] == {"bf16": "published for h200 (no cuBLAS: not here)"}
    assert report["ceilings"]["copy_bytes_per_second"] > 0
    decode, prefill = report["cases"]
    for case in (decode, prefill):
        assert case["seconds_all"] == pytest.approx([0.001] * 4) and case["seconds"] == pytest.approx(0.001)
        assert case["launch_seconds"] and case["launch_seconds"] == pytest.approx(
            [0.001] * len(case["launch_seconds"])
        )
        assert sum(row["seconds"] for row in case["kernels"]) == pytest.approx(sum(case["launch_seconds"]))
        assert len(case["chosen_experts"]) == 4
    # the second step of few rows is recorded, it and all behind it are replayed; long ones are launched
    assert fakes[-1].calls.count("cuGraphLaunch") == 5
    assert decode["goals"] and all(goal["reached"] is not None for goal in decode["goals"])
    printed = capsys.readouterr().out
    assert "4 of 4 layers" in printed and "tokens/s" in printed and "| goal | wanted |" in printed


def test_wrong_golden_vectors_stop_the_run(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("state layers.0.window", 1e-6, 1e-4), Check("state layers.1.window", 0.5, 1e-4)]
    monkeypatch.setattr(carried, "verify", lambda artifact: checks)
    monkeypatch.setattr(carried, "shape", lambda *given: pytest.fail("went on"))
    assert carried.run_bundle(options(bundle, arch="sm_90a")) == 1
    assert "FAILED: 1 of 2 golden checks, first state layers.1.window. Stopped." in capsys.readouterr().out
    monkeypatch.setattr(carried, "verify", lambda artifact: checks[:1])
    assert carried.golden(Artifact.open(bundle / "golden-sm_90a.dsv4"), False)


def test_what_cannot_be_packed_or_run(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="arch 'sm_75'; allowed: sm_80"):
        pack_bundle(["sm_75"], tmp_path / "x")
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(UsageError, match="the folder holds something else"):
        pack_bundle(["sm_90a"], tmp_path)
    with pytest.raises(UsageError, match=r"no bundle\.json"):
        carried.run_bundle(options(tmp_path))
    with pytest.raises(UsageError, match="a size is too small"):
        carried.cases_of(options(bundle, decode=[0]))
