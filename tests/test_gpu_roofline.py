"""The roofline of launch plans: costs of ops, dealt out among launches, over the figures of a device."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gpu_support import GOLDEN, in_numerics, lowered

from dsv4c.cli.kernels import HEAD, kernel_rows, step_sentences
from dsv4c.ir.cost import op_cost
from dsv4c.ir.graph import Module
from dsv4c.runtime.container.costs import Needs, Rates, factors_of, launch_needs, products_of
from dsv4c.runtime.container.plan import Kernel
from dsv4c.targets.gpu.arch import gpu
from dsv4c.targets.gpu.emit import plan_report
from dsv4c.targets.gpu.plan import Draft, draft
from dsv4c.targets.gpu.roofline import step_sizes
from dsv4c.targets.hardware import load_devices

BF16 = 'quantise_activations{rule="bf16"}'


@pytest.fixture(scope="module")
def module() -> Module:
    return lowered(GOLDEN / "v4", BF16)


@pytest.fixture(scope="module")
def found(module: Module) -> Draft:
    return draft(module, gpu("sm_90a"))


@pytest.fixture(scope="module")
def report(module: Module, found: Draft) -> Any:
    """As the artifact carries it."""
    return json.loads(json.dumps(plan_report(found.plan, module, found, load_devices()["h200"])))


@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 1, 1024), (3, 5, 100), (1, 512, 0)])
def test_launches_need_what_their_ops_cost(
    found: Draft, report: Any, batch: int, tokens: int, past: int
) -> None:
    plan, sizes = found.plan, step_sizes(found.plan, batch, tokens, past, 4096)
    for program, facts, callers in zip(plan.programs, report["programs"], found.callers, strict=True):
        needs = launch_needs(plan, program, facts["calls"], sizes)
        assert len(needs) == len(program.launches) == facts["launches"]
        costs = [op_cost(op, sizes) for op in dict.fromkeys(callers)]
        whole = sum(needs, Needs())
        assert whole.flops == pytest.approx(sum(c.flops for c in costs))
        assert whole.weight_bytes == pytest.approx(sum(c.weight_bytes for c in costs))
        assert whole.data_bytes == pytest.approx(sum(c.data_bytes for c in costs))


def test_products_have_the_operations_and_their_own_weights(found: Draft, report: Any) -> None:
    """Of the six launches for experts the two with a matrix: twice as much goes up as comes down."""
    plan = found.plan
    sizes = step_sizes(plan, 1, 1, 64, 4096)
    needs = launch_needs(plan, plan.programs[0], report["programs"][0]["calls"], sizes)
    by_name: dict[str, Needs] = {}
    for launch, need in zip(plan.programs[0].launches, needs, strict=True):
        name = plan.kernels[launch.kernel].name
        by_name[name] = by_name.get(name, Needs()) + need
    up, down = by_name["expert_up"], by_name["expert_down"]
    assert up.flops == pytest.approx(2 * down.flops, rel=1e-3)
    assert up.weight_bytes == pytest.approx(2 * down.weight_bytes, rel=1e-3)
    for name in ("expert_count", "expert_place", "expert_sum", "index_topk"):
        assert not by_name[name].flops and not by_name[name].weight_bytes and by_name[name].data_bytes
    assert by_name["hc_project"].flops and not by_name["hc_sinkhorn"].flops


def kernel(**constants: int | str) -> Kernel:
    return Kernel("some", "module", "", (), constants, 4, 1)


@pytest.mark.parametrize(
    ("constants", "products"),
    [
        ({"BN": 32}, 0),
        ({"PRECISION": "bf16x3", "PIECES": 1, "FORM": 2}, 1),
        ({"PRECISION": "bf16x6", "PIECES": 3, "FORM": 5}, 3),
        ({"PRECISION": "bf16x6", "PIECES": 3, "FORM": 0}, 6),
        ({"PRECISION": "bf16x3"}, 3),
    ],
)
def test_products_of_bf16(constants: dict[str, int | str], products: int) -> None:
    assert products_of(kernel(**constants)) == products


@pytest.mark.parametrize(
    ("constants", "factors"),
    [
        ({"ROWS": 2, "FORM": 5}, "fp8"), ({"ROWS": 3, "FORM": 2}, "fp8"), ({"ROWS": 4, "FORM": 4}, "int8"),
        ({"ROWS": 2, "BLOCK": 128}, "f32"), ({"PRECISION": "bf16x3"}, "bf16"), ({}, "f32"),
    ],
)  # fmt: skip
def test_what_matrix_units_multiply(constants: dict[str, int | str], factors: str) -> None:
    """Rounding to codes multiplies no codes."""
    assert factors_of(kernel(**constants)) == factors


def test_codes_are_held_to_a_peak_of_their_own() -> None:
    rates = Rates(bandwidth=100.0, matrix=1000.0, vector=10.0, fp8=2000.0, int8=4000.0)
    for rows, seconds in ((2, 2.0), (3, 2.0), (4, 1.0)):
        assert rates.least(kernel(ROWS=rows, FORM=2), Needs(4000, 10, 10)) == (seconds, "compute")
    assert Rates(1.0, 1.0, 1.0).least(kernel(ROWS=2, FORM=2), Needs(1, 1, 1)) == (None, "unknown")


@pytest.mark.parametrize(
    ("numerics", "figure"),
    [("fp8", "1979 of FP8"), pytest.param("int8", "1979 of INT8", marks=pytest.mark.matrix)],
)
def test_a_report_of_products_of_codes(numerics: str, figure: str) -> None:
    module = in_numerics(numerics, "cuda:sm_90a")
    drafted = draft(module, gpu("sm_90a"))
    report = json.loads(json.dumps(plan_report(drafted.plan, module, drafted, load_devices()["h200"])))
    assert figure in step_sentences(report)[0]
    sizes = step_sizes(drafted.plan, 1, 512, 0, 4096)
    needs = launch_needs(drafted.plan, drafted.plan.programs[1], report["programs"][1]["calls"], sizes)
    flops = {"bf16": 0.0, numerics: 0.0, "f32": 0.0}
    for launch, need in zip(drafted.plan.programs[1].launches, needs, strict=True):
        flops[factors_of(drafted.plan.kernels[launch.kernel])] += need.flops
    assert flops[numerics] > flops["bf16"] > 0


def test_the_least_time_is_the_longer_of_two() -> None:
    rates = Rates(bandwidth=100.0, matrix=1000.0, vector=10.0)
    split = kernel(PRECISION="bf16x3")
    assert rates.least(split, Needs(500, 100, 100)) == (2.0, "memory")
    assert rates.least(split, Needs(1000, 100, 100)) == (3.0, "compute")  # three products for one
    assert rates.least(kernel(), Needs(30, 100, 0)) == (3.0, "compute")
    assert Rates(None, 1.0, 1.0).least(kernel(), Needs(1, 1, 1)) == (None, "unknown")
    assert Rates(1.0, None, 1.0).least(split, Needs(1, 1, 1)) == (None, "unknown")


def test_the_report_sums_launches_by_kernel_and_step(found: Draft, report: Any) -> None:
    steps = report["roofline"]["steps"]
    assert {name: step["program"] for name, step in steps.items()} == {"decode": "few", "prefill": "many"}
    for step in steps.values():
        program = next(p for p in found.plan.programs if p.name == step["program"])
        assert len(step["launches"]) == len(program.launches)
        assert sum(step["launches"]) == pytest.approx(1e6 * step["seconds"], abs=1e-3 * len(step["launches"]))
        assert sum(row["seconds"] for row in step["kernels"]) == pytest.approx(step["seconds"])
        assert sum(row["launches"] for row in step["kernels"]) == len(program.launches)
        for name in ("flops", "weight_bytes", "data_bytes"):
            assert sum(row[name] for row in step["kernels"]) == pytest.approx(step[name], rel=1e-3)
    # reading its weights once takes a step of decoding at least this long
    assert steps["decode"]["seconds"] >= steps["decode"]["weight_bytes"] / 4.8e12


def test_figures_that_a_card_lacks_leave_times_unknown(module: Module, found: Draft) -> None:
    report = plan_report(found.plan, module, found, load_devices()["rtx-5090"])
    steps = report["roofline"]["steps"]
    assert all(step["seconds"] is None and set(step["launches"]) == {None} for step in steps.values())
    assert "at least unknown us" in step_sentences(report)[1]
    assert "roofline" not in plan_report(found.plan, module, found, None)


def test_rows_of_the_table(found: Draft, report: Any) -> None:
    rows = kernel_rows(report)
    assert len(rows) == len(found.plan.kernels) and {len(row) for row in rows} == {len(HEAD)}
    assert sum(row[6] or 0 for row in rows) == len(found.plan.programs[0].launches)
    assert step_sentences(report)[0].startswith("Least times by the published figures of h200, 4800 GB/s")
    assert kernel_rows({**report, "roofline": {}})[0][6:] == ("", "", "", "")
    assert step_sentences({**report, "roofline": {}}) == []
