"""Splitting a model over devices: everything once, within capacity, and errors that say what would do."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from dsv4c.cli.estimate_source import module_of
from dsv4c.errors import PassError, TargetError
from dsv4c.frontend.config import load_config
from dsv4c.frontend.table import ledger
from dsv4c.passes.statistics import ExpertUsage, Statistics
from dsv4c.targets.placement import (
    Demand,
    Placement,
    balanced_runs,
    by_blocks,
    by_load,
    place,
    ranges,
    shares_of,
)
from dsv4c.targets.workload import Workload, survey

ROOT = Path(__file__).resolve().parents[1]
KJV = ROOT / "examples" / "kjv" / "checkpoint"
FLASH = ROOT / "tests" / "data" / "configs" / "v4-flash"
GB = 10**9


@pytest.fixture(scope="module")
def kjv() -> Workload:
    return survey(module_of(KJV)[0])


@pytest.fixture(scope="module")
def flash() -> Workload:
    return survey(module_of(FLASH)[0])


def statistics(w: Workload, tokens: list[int]) -> Statistics:
    usage = ExpertUsage(np.array(tokens, np.int64), np.zeros(len(tokens)), np.zeros(len(tokens)))
    return Statistics("x", 10, 100, {f"layers.{i}.ffn": usage for i in range(len(w.layers))})


def check_whole(w: Workload, placement: Placement, devices: int) -> None:
    """Every layer and every expert in exactly one place, and memory that adds up."""
    assert [i for stage in placement.stages for i in stage.layers()] == list(range(len(w.layers)))
    assert [d for stage in placement.stages for d in stage.devices] == list(range(devices))
    assert len(placement.memory) == devices
    for stage in placement.stages:
        for layer, held in zip(stage.layers(), stage.experts, strict=True):
            assert sorted(itertools.chain(*held)) == list(range(len(w.layers[layer].experts)))
    assert sum(m.experts for m in placement.memory) == sum(sum(layer.experts) for layer in w.layers)
    dense = sum(placement.memory[stage.devices[0]].dense for stage in placement.stages)
    assert dense == w.weight_bytes - sum(sum(layer.experts) for layer in w.layers)


# ------------------------------------------------------------------------------------ bytes by hand


def test_bytes_of_the_example_by_hand(kjv: Workload) -> None:
    """hidden 256, inner 128, packed FP4 with a scale byte per 32: three matrices of 32768 values."""
    one = 3 * (256 * 128 // 2 + 256 * 128 // 32)
    assert all(layer.experts == (one,) * 8 and layer.chosen == 2 for layer in kjv.layers)
    ring, d, index = 64, 96, 64
    # two tokens in two bytes: window; CSA adds two rings of 2 x 4 rows of 2 x 96, entries, and the same of 64
    assert kjv.state_bytes(0, 1024, 2) == 2 * ring * d
    csa = 2 * (8 * 2 * d) + 1024 // 4 * d + 2 * (8 * 2 * index) + 1024 // 4 * index
    assert kjv.state_bytes(1, 1024, 2) == 2 * (ring * d + csa)
    assert kjv.state_bytes(2, 1024, 2) == 2 * (ring * d + 2 * 128 * d + 1024 // 128 * d)


def test_bytes_of_the_released_flash(flash: Workload) -> None:
    """The ledger of the checkpoint holds the drafting block and 8-byte ids too, 3.6 GB together."""
    whole = ledger(load_config(FLASH))[1]
    assert 0 < whole - flash.weight_bytes < 0.03 * whole
    assert flash.layers[5].experts == (3 * (4096 * 2048 // 2 + 4096 * 2048 // 32),) * 256
    int8 = survey(flash.module, {"experts": "int8"})
    assert int8.layers[5].experts[0] == 3 * 4096 * 2048 + 4 * (2048 + 2048 + 4096)
    assert int8.layers[5].dense == flash.layers[5].dense


# ------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5, 8, 10, 20, 40])
def test_everything_is_placed_once(kjv: Workload, devices: int) -> None:
    check_whole(kjv, place(Demand(kjv, 7, 512, 2, {}), devices, GB), devices)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_stages_can_be_chosen(kjv: Workload, stages: int) -> None:
    placement = place(Demand(kjv, 1, 512, 2, {}), 10 if stages > 1 else 5, GB, stages)
    assert len(placement.stages) == stages
    check_whole(kjv, placement, 10 if stages > 1 else 5)


@pytest.mark.parametrize("devices", [3, 4, 16, 244, 384])
def test_the_large_model_fits_and_is_whole(flash: Workload, devices: int) -> None:
    placement = place(Demand(flash, 64, 8192, 2, {}), devices, 64 * GB)
    check_whole(flash, placement, devices)
    if devices == 244:  # one stage, in which twelve devices hold two experts of a layer
        assert [sum(len(ids) == 2 for ids in held) for held in placement.stages[0].experts] == [12] * 43
    assert placement.fits and placement.usable == 576 * GB // 10
    assert all(m.total <= placement.usable for m in placement.memory)


def test_more_devices_hold_less_each(flash: Workload) -> None:
    totals = [place(Demand(flash, 64, 8192, 2, {}), n, 200 * GB).fullest.total for n in (1, 2, 4, 8, 16, 64)]
    assert totals == sorted(totals, reverse=True) and totals[0] > 2 * totals[-1]


def test_state_follows_batch_and_context(kjv: Workload) -> None:
    def state(batch: int, context: int) -> int:
        return place(Demand(kjv, batch, context, 2, {}), 2, GB).memory[0].state

    one = sum(kjv.state_bytes(i, 512, 2) for i in range(5))
    assert state(1, 512) == state(2, 512) == one and state(3, 512) == 2 * one
    assert state(2, 1024) > state(2, 512)


def test_runs_are_the_best_there_are() -> None:
    assert balanced_runs([1, 1, 1, 1], 2) == [(0, 1), (2, 3)]
    assert balanced_runs([9, 1, 1, 1], 2) == [(0, 0), (1, 3)]
    sizes = [3, 1, 4, 1, 5, 9, 2, 6]
    found = max(sum(sizes[a : b + 1]) for a, b in balanced_runs(sizes, 3))
    cuts = itertools.combinations(range(1, 8), 2)
    assert found == min(max(sum(sizes[:a]), sum(sizes[a:b]), sum(sizes[b:])) for a, b in cuts)


def test_blocks_fill_the_emptiest() -> None:
    assert by_blocks([1] * 7, [5, 0, 5]) == ((0, 1), (2, 3, 4), (5, 6))
    assert by_blocks([1] * 4, [0, 0]) == ((0, 1), (2, 3))


def test_loads_are_balanced_within_room() -> None:
    assert by_load([1] * 4, [8, 1, 1, 8], [0, 0]) == ((0, 1), (2, 3))
    held = by_load([1] * 6, [100, 1, 1, 1, 1, 1], [0, 0, 0])
    assert all(len(ids) == 2 for ids in held)  # the busiest device still takes its share of the experts


def test_calibration_spreads_busy_experts(kjv: Workload) -> None:
    tokens = [90, 80, 1, 1, 1, 1, 1, 1]
    shares = shares_of(kjv, statistics(kjv, tokens))
    assert shares[0][0] == 1.0 and shares[0][2] == pytest.approx(2 / 176)
    placement = place(Demand(kjv, 1, 512, 2, shares), 4, GB)
    check_whole(kjv, placement, 4)
    for held in placement.stages[0].experts:
        assert not any({0, 1} <= set(ids) for ids in held)
        assert {len(ids) for ids in held} == {2}
    with pytest.raises(PassError, match="of another model: 3 experts"):
        shares_of(kjv, statistics(kjv, [1, 2, 3]))


def test_what_does_not_fit_says_what_would(flash: Workload) -> None:
    demand = Demand(flash, 1, 8192, 2, {})
    with pytest.raises(TargetError) as caught:
        place(demand, 2, 64 * GB)
    text = str(caught.value)
    assert "on 2 devices" in text and "2 x 64000000000 leave 115200000000" in text
    assert "allowed: at least 3 devices" in text and "hint: " in text
    assert place(demand, 3, 64 * GB).fits
    with pytest.raises(TargetError, match="none up to 2048 devices holds it"):
        place(Demand(flash, 10**7, 8192, 2, {}), 4, 64 * GB)


def test_impossible_splits(kjv: Workload) -> None:
    demand = Demand(kjv, 1, 512, 2, {})
    with pytest.raises(TargetError, match=r"cannot be split over 11 devices; allowed: .* at most 5 x 8"):
        place(demand, 11, GB)
    with pytest.raises(TargetError, match="over 4 devices in 3 stages"):
        place(demand, 4, GB, stages=3)


def test_unknown_memory_always_places(kjv: Workload) -> None:
    placement = place(Demand(kjv, 1, 512, 2, {}), 2, None)
    assert placement.fits is None and placement.as_json()["usable_bytes"] is None
    check_whole(kjv, placement, 2)


def test_ranges() -> None:
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
