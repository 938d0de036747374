"""Estimates against arithmetic by hand, against each other, and through the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4c import cli
from dsv4c.cli.estimate import parse_weights
from dsv4c.cli.estimate_source import module_of
from dsv4c.errors import TargetError, UsageError
from dsv4c.ir.cost import op_cost
from dsv4c.ir.levels import Level
from dsv4c.passes.statistics import ExpertUsage, Statistics
from dsv4c.targets.estimate import Estimate, Settings, estimate
from dsv4c.targets.hardware import OWN, Device, device, load_devices
from dsv4c.targets.roofline import Part
from dsv4c.targets.workload import Workload, survey

ROOT = Path(__file__).resolve().parents[1]
KJV = ROOT / "examples" / "kjv" / "checkpoint"
FLASH = ROOT / "tests" / "data" / "configs" / "v4-flash"
V41 = ROOT / "tests" / "data" / "configs" / "v41-flash"
FULL = {"compute": 1.0, "memory": 1.0, "link": 1.0}
PLAIN = Device("plain", 10**9, 1e9, {"bf16": 1e12, "fp8": 2e12}, 1e8, FULL, "made up")
"""1 GB, 1 GB/s, 1 and 2 Top/s, 0.1 GB/s."""

EXPERT = 3 * (256 * 128 // 2 + 256 * 128 // 32)
"""Bytes of an expert of the example: 256 x 128, three times, FP4 with a scale byte per 32."""


@pytest.fixture(scope="module")
def kjv() -> Workload:
    return survey(module_of(KJV)[0])


@pytest.fixture(scope="module")
def flash() -> Workload:
    return survey(module_of(FLASH)[0])


def ask(w: Workload, where: Device = PLAIN, **asked: Any) -> Estimate:
    return estimate(w, where, Settings(**{"context": 512, "prompt": 64, **asked}))


def part(found: Estimate, name: str, step: str = "decode") -> Part:
    return next(p for p in getattr(found, step).parts if p.name == name)


# ------------------------------------------------------------------------------------ by hand


def test_one_token_reads_the_experts_it_chose(kjv: Workload) -> None:
    """Five layers, two of eight experts: weights, operations and time by hand."""
    found = part(ask(kjv), "experts")
    assert found.weight_bytes == 5 * 2 * EXPERT
    # per route three products, then clamps of gate and up, swiglu at six a value, and the routing weight
    assert found.flops == 5 * 2 * (3 * 2 * 256 * 128 + (1 + 1 + 6 + 1) * 128)
    # bf16: a product reads its rows and writes its columns
    assert found.data_bytes == 5 * 2 * 2 * 3 * (256 + 128)
    assert found.seconds == pytest.approx((found.weight_bytes + found.data_bytes) / 1e9)
    assert found.bound == "memory"


def test_many_tokens_read_experts_by_chance(kjv: Workload) -> None:
    """Three tokens that choose two of eight apart from each other miss an expert with (6/8)^3."""
    found = part(ask(kjv, batch=3), "experts")
    assert found.weight_bytes == round(5 * 8 * (1 - 0.75**3) * EXPERT)
    assert found.flops == 3 * part(ask(kjv), "experts").flops


def test_a_long_prompt_is_bound_by_arithmetic(kjv: Workload) -> None:
    """FP4 weights are multiplied in FP8, FP8 weights too; everything else in BF16."""
    fast = replace(PLAIN, bandwidth=1e15)
    found = part(ask(kjv, fast, prompt=1024), "shared", "prefill")
    # three FP8 products at 2 Top/s, clamps and swiglu at 1 Top/s
    products, rest = 5 * 1024 * 3 * 2 * 256 * 128, 5 * 1024 * 8 * 128
    assert found.flops == products + rest
    assert found.seconds == pytest.approx(products / 2e12 + rest / 1e12)
    assert found.bound == "compute"


def test_the_router_by_hand(kjv: Workload) -> None:
    """[8,256] in BF16, a bias of 8 in F32 where it is no hash layer (3 of 5)."""
    found = part(ask(kjv), "router")
    assert found.weight_bytes == 5 * 8 * 256 * 2 + 3 * 8 * 4


def test_exchanges_by_hand(kjv: Workload) -> None:
    """Two devices, one token each: it meets the other device with chance 3/4, 256 values there and back."""
    found = ask(kjv, batch=2, devices=2).decode
    assert found.link_bytes == 5 * 2 * 0.75 * 256 * 2  # layers, there and back, rows, values, bytes
    assert found.link_seconds == pytest.approx(found.link_bytes / 1e8)


def test_a_pipeline_by_hand(kjv: Workload) -> None:
    """Five stages: streams of 4 x 256 values cross four borders; a batch keeps all stages busy."""
    one = ask(kjv, batch=1, devices=5, stages=5).decode
    assert one.link_bytes == 4 * 4 * 256 * 2 and one.micro_batches == 1
    assert one.seconds == pytest.approx(sum(p.seconds or 0 for p in one.parts) + (one.link_seconds or 0))
    five = ask(kjv, batch=5, devices=5, stages=5).decode
    assert five.micro_batches == 5 and one.seconds is not None and five.seconds is not None
    assert one.seconds < five.seconds < 5 * one.seconds


def test_efficiency_scales_time(kjv: Workload) -> None:
    half = replace(PLAIN, efficiency={"compute": 0.5, "memory": 0.5, "link": 0.5})
    fast, slow = ask(kjv), ask(kjv, half)
    assert slow.decode.seconds == pytest.approx(2 * (fast.decode.seconds or 0))


def test_weights_in_other_formats(kjv: Workload) -> None:
    other = survey(kjv.module, {"experts": "int8", "linears": "bf16"})
    # int8: a byte a value and a float32 scale a row, of 128 + 128 + 256 rows
    assert other.layers[0].experts[0] == 3 * 256 * 128 + 4 * (128 + 128 + 256)
    assert part(ask(other), "attention").weight_bytes > 1.9 * part(ask(kjv), "attention").weight_bytes
    assert part(ask(other), "hyper") == part(ask(kjv), "hyper")
    assert survey(kjv.module, {"experts": "fp4"}).weight_bytes == kjv.weight_bytes


def test_drafts_share_the_reading_of_weights(kjv: Workload) -> None:
    plain, drafted = ask(kjv), ask(kjv, drafts=1, accepted=1.0)
    assert drafted.decode.tokens == 2 and drafted.seconds_per_token is not None
    assert plain.seconds_per_token is not None and plain.decode.seconds is not None
    assert drafted.seconds_per_token < plain.seconds_per_token < (drafted.decode.seconds or 0)
    assert any("1 drafts" in line for line in drafted.assumptions)


# ------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("devices", [1, 4])
def test_more_work_takes_more_time(flash: Workload, devices: int) -> None:
    big = replace(device("mi355x"), memory=10**12)
    by_batch = [ask(flash, big, batch=b, devices=devices).decode for b in (1, 2, 16, 256)]
    seconds = [step.seconds or 0 for step in by_batch]
    assert seconds == sorted(seconds) and seconds[0] > 0
    rates = [step.tokens_per_second or 0 for step in by_batch]
    assert rates == sorted(rates)
    by_context = [ask(flash, big, context=c).decode.seconds or 0 for c in (512, 8192, 1 << 20)]
    assert by_context == sorted(by_context) and by_context[0] < by_context[-1]
    by_prompt = [ask(flash, big, prompt=p).prefill.seconds or 0 for p in (1, 64, 4096)]
    assert by_prompt == sorted(by_prompt)


def test_skewed_experts_take_longer(kjv: Workload) -> None:
    even = {layer: [0.25] * 8 for layer in range(5)}
    skewed = {layer: [1.0, *[1 / 7] * 7] for layer in range(5)}
    asked = Settings(batch=512, context=512, prompt=64, devices=4)
    slow = replace(PLAIN, bandwidth=1e12, peaks={"bf16": 1e9})
    found = [estimate(kjv, slow, asked, shares=shares) for shares in (even, skewed)]
    a, b = (part(one, "experts").seconds or 0 for one in found)
    assert b == pytest.approx(a * (1 + 1 / 7) / 0.5)  # the busiest device holds expert 0 and one more


# ------------------------------------------------------------------------------------ unknown figures


def test_what_is_unknown_stays_unknown(kjv: Workload) -> None:
    found = ask(kjv, device("mlu590"), devices=2)
    assert found.decode.seconds is None and found.seconds_per_token is None
    assert found.decode.bound == found.prefill.bound == "unknown" and found.placement.fits is None
    assert part(found, "experts").weight_bytes > 0 and part(found, "experts").flops > 0
    assert any(
        "not published for mlu590: memory, bandwidth, peak, link" in line for line in found.assumptions
    )
    text = json.dumps(found.as_json(), allow_nan=False)
    assert '"seconds": null' in text


def test_an_unknown_link_spoils_only_exchanges(kjv: Workload) -> None:
    lonely = replace(PLAIN, link=None)
    assert ask(kjv, lonely).decode.seconds is not None
    assert ask(kjv, lonely, devices=2).decode.seconds is None


def test_a_peak_that_is_missing_is_replaced_and_said(kjv: Workload) -> None:
    found = ask(kjv, device("ascend-910b2"))
    assert "fp4 weights are multiplied in bf16" in found.assumptions
    assert "fp4 weights are multiplied in fp8" in ask(kjv, device("h200")).assumptions


# ------------------------------------------------------------------------------------ devices


def test_devices_are_whole() -> None:
    devices = load_devices()
    assert {"ascend-910b2", "ascend-910c-die", "ascend-950pr", "ascend-950dt", "mlu370-x8", "mlu590", "h200",
            "h100", "b200", "mi300x", "mi355x", "a100-80gb", "l40s", "rtx-4090", "mi250x",
            } <= devices.keys()  # fmt: skip
    assert all(
        d.source and set(d.peaks) == {"f32", "bf16", "fp16", "int8", "fp8", "fp4"} for d in devices.values()
    )
    die, card = devices["ascend-910c-die"], devices["ascend-910c-card"]
    assert card.memory == 2 * (die.memory or 0) and card.bandwidth == 2 * (die.bandwidth or 0)
    assert die.memory_rate == 0.6 * 1.6e12 and die.compute_rate(("fp8", "int8")) == ("int8", 0.7 * 752e12)
    assert devices["mlu590"].compute_rate(("bf16", "f32")) is None
    die, card = devices["mi250x-die"], devices["mi250x"]
    assert card.memory == 2 * (die.memory or 0) and card.peaks["bf16"] == 2 * (die.peaks["bf16"] or 0)
    assert devices["rtx-5090"].memory is None is devices["rtx-5090"].compute_rate(("bf16",))
    assert devices["mlu370-x8"].efficiency == {"compute": 0.7, "memory": 0.6, "link": 0.7}  # the default


def test_devices_of_your_own(tmp_path: Path) -> None:
    entry = {
        "name": "mine",
        "memory": 1e9,
        "bandwidth": 1e9,
        "peaks": {"bf16": 1e12},
        "link": None,
        "source": "me",
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"devices": [entry]}))
    assert load_devices(path)["mine"].efficiency["memory"] == 0.6
    for wrong, message in (
        ({"memory": -1}, "memory is -1"), ({"peaks": {"fp32": 1}}, "unknown number format 'fp32'"),
        ({"efficiency": {"memory": 2}}, "efficiency memory is 2; allowed: more than 0, at most 1"),
        ({"bandwidth": "fast"}, "bandwidth is 'fast'"),
    ):  # fmt: skip
        path.write_text(json.dumps({"devices": [{**entry, **wrong}]}))
        with pytest.raises(TargetError, match=message):
            load_devices(path)
    path.write_text("[]")
    with pytest.raises(TargetError, match=r"mine\.json: is not a table of devices"):
        load_devices(path)
    with pytest.raises(TargetError, match="cannot be read"):
        load_devices(tmp_path / "none.json")


def test_tables_are_shipped_beside_the_code() -> None:
    """The wheel takes the whole folder; both tables are found relative to the module."""
    assert OWN.parent.resolve() == ROOT / "targets" and (OWN.parent / "published.json").is_file()


def test_unknown_device_lists_the_known() -> None:
    with pytest.raises(TargetError, match=r"unknown device 'h20'; allowed: .*h200.*mlu590") as caught:
        device("h20")
    assert "did you mean" in caught.value.hint


# ------------------------------------------------------------------------------------ published figures


def test_published_figures_stand_beside(flash: Workload, kjv: Workload) -> None:
    found = ask(flash, device("ascend-950dt"), devices=16)
    assert {(row.batch, row.milliseconds) for row in found.published} >= {
        (16, 6.55),
        (256, 8.78),
        (2880, 25.54),
    }
    assert all(row.source and row.caveat for row in found.published)
    # where both are given, they agree: tokens/s of a device times its time is its share of the batch
    for row in found.published:
        if row.tokens_per_second_per_device and row.devices:
            own = row.tokens_per_second_per_device * row.milliseconds / 1000
            assert own == pytest.approx(row.batch / row.devices, rel=0.01)
    assert not ask(kjv, device("ascend-950dt")).published
    assert not ask(flash, device("mi300x"), devices=2).published


def test_near_a_published_figure(flash: Workload) -> None:
    """Atlas A3 x 64, W8A8: 27.82 ms; a roofline may not be far off, nor much slower than what was reached."""
    w = survey(flash.module, {"experts": "int8", "shared": "int8", "linears": "int8"})
    found = ask(w, device("ascend-910c-die"), batch=7168, context=8192, devices=64)
    assert 0.5 * 27.82e-3 < (found.seconds_per_token or 0) < 1.2 * 27.82e-3


@pytest.mark.parametrize("name", ["h200", "mi300x"])
def test_flash_on_eight_cards(flash: Workload, name: str) -> None:
    """Every card holds all that is dense and an eighth of the experts, and reads what a token needs."""
    card = device(name)
    found = ask(flash, card, batch=1, context=8192, devices=8)
    assert found.placement.fits and len(found.placement.memory) == 8
    experts = sum(sum(layer.experts) for layer in flash.layers)
    assert {m.experts for m in found.placement.memory} == {experts // 8}
    assert all(8e9 < m.dense < 9e9 and m.total < 0.9 * (card.memory or 0) for m in found.placement.memory)
    read = sum(p.weight_bytes for p in found.decode.parts)
    assert found.decode.bound == "memory" and found.seconds_per_token is not None
    assert read / card.memory_rate < found.seconds_per_token < 1.2 * read / card.memory_rate  # type: ignore[operator]
    assert bool(found.published) is (name == "h200")  # of MI300X nobody's figure is at hand


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch": 0}, "batch = 0; allowed: at least 1"),
        ({"context": 4096}, "context = 4096; allowed: 1 to 2048"),
        ({"prompt": 0}, "prompt = 0; allowed: 1 to 2048"),
        ({"drafts": 1, "context": 1}, "context = 1; allowed: 2 to 2048"),
        ({"accepted": 0.5}, "accepted = 0.5; allowed: 0 to 0"),
        ({"devices": 0}, "devices = 0"),
        ({"headroom": 1.0}, "headroom = 1"),
        ({"activations": "fp3"}, "unknown format of activations 'fp3'"),
    ],
)
def test_bad_questions(kjv: Workload, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(kjv, **asked)


def test_bad_modules_and_weights(kjv: Workload) -> None:
    with pytest.raises(UsageError, match=r"unknown weight class 'expert'; allowed: .*experts"):
        survey(kjv.module, {"expert": "int8"})
    with pytest.raises(UsageError, match=r"unknown format of experts 'int9'; allowed: .*int8"):
        survey(kjv.module, {"experts": "int9"})
    with pytest.raises(TargetError, match="level TARGET; allowed: MODEL"):
        survey(replace(kjv.module, level=Level.TARGET))
    for text, message in (("experts", "'experts' is not CLASS=FORMAT"), ("a=b,a=c", "a is named twice")):
        with pytest.raises(UsageError, match=message):
            parse_weights(text)


# ------------------------------------------------------------------------------------ command line

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dsv4c(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["estimate", *map(str, argv)])
        return code, *capsys.readouterr()

    return call


def test_command_on_the_example(dsv4c: Call, tmp_path: Path) -> None:
    usage = ExpertUsage(np.arange(8, dtype=np.int64), np.zeros(8), np.zeros(8))
    Statistics("x", 2, 28, {f"layers.{i}.ffn": usage for i in range(5)}).save(tmp_path / "s.npz")
    line = (KJV, "--device", "ascend-910b2", "--devices", 2, "--batch", "1,16", "--stats", tmp_path / "s.npz")
    code, out, err = dsv4c(*line)
    assert code == 0, err
    for word in (
        "2 x ascend-910b2",
        "ms/token",
        "prefill of 512 tokens",
        "as in the calibration text",
        "layers",
    ):
        assert word in out
    facts = json.loads(dsv4c(*line, "--json")[1])
    assert [one["batch"] for one in facts["estimates"]] == [1, 16] and facts["kind"] == "checkpoint"
    layer = facts["estimates"][0]["placement"]["stages"][0]["experts"][0]
    assert layer["by_device"] == ["0,3-4,7", "1-2,5-6"]
    assert facts["published"] == [] and facts["estimates"][0]["context"] == 2048


def test_command_on_a_config(dsv4c: Call) -> None:
    started = time.perf_counter()
    line = (
        "--device",
        "ascend-910c-die",
        "--devices",
        64,
        "--batch",
        7168,
        "--weights",
        "experts=int8,linears=int8",
    )
    code, out, err = dsv4c(FLASH / "config.json", *line)
    assert code == 0, err
    assert "a config" in out or "config," in out
    assert "27.82" in out and "caveat" not in out and "published by others" in out
    assert "0-42" in out and "0: 0-3; 1: 4-7; ...; 63: 252-255" in out
    assert time.perf_counter() - started < 60  # about six seconds on two slow cores


def test_command_where_nothing_is_published(dsv4c: Call) -> None:
    code, out, err = dsv4c(KJV, "--device", "mlu590", "--json")
    assert code == 0, err
    assert json.loads(out)["estimates"][0]["decode"]["seconds"] is None
    assert "unknown" in dsv4c(KJV, "--device", "mlu590")[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{kjv} --device h20", "unknown device 'h20'; allowed: a100-80gb"),
        ("{kjv} --device h200 --batch 0", "batch = 0; allowed: at least 1"),
        ("{kjv} --device h200 --batch x", "'x' is not a list"),
        ("{kjv} --device h200 --weights expert=int8", "unknown weight class 'expert'"),
        ("{kjv} --device h200 --weights experts=int9", "unknown format of experts 'int9'"),
        ("{kjv} --device h200 --context 4096", "context = 4096; allowed: 1 to 2048"),
        ("{kjv} --device h200 --devices 11", "cannot be split over 11 devices"),
        ("{kjv} --device h200 --stats {missing}", "no such file"),
        ("{kjv} --device h200 --hardware {missing}", "cannot be read"),
        ("{flash} --device ascend-910b2 --devices 2", "allowed: at least 3 devices"),
        ("{missing} --device h200", "no such file or directory; allowed: a checkpoint directory"),
        ("{binary} --device h200", "is neither a checkpoint directory nor a config.json"),
        ("{kjv}", "the following arguments are required: --device"),
    ],
)
def test_bad_command_lines(dsv4c: Call, tmp_path: Path, line: str, message: str) -> None:
    binary = tmp_path / "m.dsv4"
    binary.write_bytes(b"\xff\xfe\x00")
    places = {"kjv": KJV, "flash": FLASH, "missing": tmp_path / "missing", "binary": binary}
    code, out, err = dsv4c(*(word.format(**places) for word in line.split()))
    assert code == 2 and not out
    assert err.startswith("dsv4c: error: ") and message in err


# ------------------------------------------------------------------------------------------- V4.1


def test_what_the_released_v41_asks_of_devices_and_host() -> None:
    """Tables lie with the host; entries with their sources; later selections score candidates only."""
    v41 = survey(module_of(V41)[0])
    rows = 384_006_168 + 384_016_682  # of 256 codes and 8 scales, and the map of tokens
    assert v41.host == rows * (256 + 8) + 4 * 129_280
    assert v41.weight_bytes < 320e9  # of 510 GB: 203 are tables; drafts and image encoder are left out
    plain, engram = v41.layers[0], v41.layers[1]
    assert 0 < engram.dense - plain.dense < 2 * 25_600 * 6_144
    hosts = {"engram_rows", "ngram_rows", "ngram_history", "compress_tokens"}
    assert not {w.op.name for w in v41.work} & hosts
    scored = {w.layer: w for w in v41.work if w.op.name == "index_scores"}
    sizes = {"B": 1, "T": 1, "L": 1, "ctx": 1 << 20, "past": (1 << 20) - 1}
    first, later = (op_cost(scored[layer].op, sizes).flops for layer in (20, 24))
    assert (first, later) == (2 * 32 * 129 * (1 << 20), 2 * 32 * 129 * 2048 * 8)
    grows = [v41.state_bytes(layer, 2000, 2) - v41.state_bytes(layer, 1000, 2) for layer in range(40)]
    want = {2: 500, 8: 500, 14: 500, 20: 1000}  # entries, of 512 and 128 numbers
    assert grows == [want.get(layer, 0) * 2 * (512 + 128) for layer in range(40)]


def test_tables_are_told_apart_from_weights(capsys: pytest.CaptureFixture[str]) -> None:
    source = str(ROOT / "tests" / "data" / "golden" / "v41")
    assert cli.main(["estimate", source, "--device", "ascend-910c-die", "--devices", "16"]) == 0
    text = capsys.readouterr().out
    assert "of tables on the host" in text and "looking their rows up" in text
