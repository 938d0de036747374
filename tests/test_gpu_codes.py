"""Products of 8-bit codes in launch plans, without Triton: which kernels are chosen, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_support import in_numerics, write_draft
from support import B, Case, T

from dsv4c.errors import CompileError, TargetError
from dsv4c.ir import quantised as q
from dsv4c.ir.dtypes import DType
from dsv4c.ir.formats import SCHEMES
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime.container.plan import Plan
from dsv4c.runtime.gpu.check import check_program
from dsv4c.targets.gpu.arch import GPUS, Gpu, gpu
from dsv4c.targets.gpu.near import SPREAD, Near, check_near
from dsv4c.targets.gpu.plan import draft

SIZES = ((3, 1, 4096), (2, 7, 129), (1, 300, 4096))
CODES = {"linear_codes", "expert_up_codes", "expert_down_codes", "row_codes"}


def names(plan: Plan) -> set[str]:
    return {k.name for k in plan.kernels}


USUAL = {("fp8", "sm_90a"), ("fp8", "sm_80"), ("fp8", "gfx942"), ("int8", "sm_90a")}
MODELS = [
    pytest.param(n, g, "v4", marks=() if (n, g.name) in USUAL else pytest.mark.matrix, id=f"{n}-{g.name}")
    for n in ("fp8", "int8") for g in GPUS
] + [pytest.param(n, gpu("sm_90a"), "v41", marks=pytest.mark.matrix, id=f"{n}-v41") for n in ("fp8", "int8")]
model = functools.cache(in_numerics)


@pytest.mark.parametrize(("numerics", "target", "checkpoint"), MODELS)
def test_every_launch_of_a_model_is_sound(numerics: str, target: Gpu, checkpoint: str) -> None:
    """Products of codes where the matrix units have them, in their kind of E4M3; of numbers elsewhere.

    Of the V4.1 checkpoint experts alone are stored in codes.
    """
    plan = draft(model(numerics, "cuda:sm_90a", checkpoint), target).plan
    codes = numerics == "int8" or bool(target.fp8)
    wanted = CODES - ({"linear_codes"} if (numerics, checkpoint) == ("fp8", "v41") else set())
    assert (names(plan) >= wanted) == codes and ("round_rows" in names(plan)) == (not codes)
    kinds = {k.constants["ROWS"] for k in plan.kernels if k.name in CODES}
    assert kinds == ({4} if numerics == "int8" else {"ocp": {2}, "fnuz": {3}, "": set()}[target.fp8])
    for b, t, ctx in SIZES:
        sizes = {"B": b, "T": t, "L": 1, "I": 2, "ctx": ctx}
        sizes |= {f"ctx_{n}": ctx // n for n in (1, 2, 4, 16, 128)}
        for program in plan.programs:
            if not program.part and (not program.most or b * t <= program.most):
                check_program(plan, program, sizes)


def test_kinds_of_codes_by_gpu() -> None:
    kinds = {target.name: target.fp8 for target in GPUS}
    assert {n for n, kind in kinds.items() if kind == "fnuz"} == {"gfx942"}
    assert {n for n, kind in kinds.items() if not kind} == {"sm_80", "gfx90a"}


def linear(rule: str, channels: int = 0) -> Case:
    c = Case()
    x = c.b.op("round_values", c.f32("x", B, T, 64), rule=rule, block=32, channels=channels)
    c.op("linear", x, c.weight("w", 64, 64, bf16=True))
    return c


def test_roundings_that_no_kernel_knows_are_refused() -> None:
    with pytest.raises(TargetError, match="rounds by 'e2m1'; allowed: bf16, e4m3, int8"):
        draft(linear("e2m1").module, gpu("sm_90a"))
    with pytest.raises(TargetError, match="rounds 32 channels by 'e4m3'; allowed: whole rows, by bf16"):
        draft(linear("e4m3", 32).module, gpu("sm_90a"))


# --------------------------------------------------------------------------------- scales of FP4


def stored(c: Case, codes: Any, scales: Any, name: str = "w") -> WeightExpr:
    return q.decode(
        c.store.add(f"{name}.codes", DType.F4E2M1X2, codes), c.store.add(f"{name}.s", DType.F8E8M0, scales),
        scheme=SCHEMES["mxfp4"],
    )  # fmt: skip


def near(c: Case, rows: int, cols: int, step: int = 128) -> Near:
    """All scales 2^0, all codes 1."""
    codes, scales = np.full((rows, cols // 2), 0x22, np.uint8), np.full((rows, -(-cols // 32)), 127, np.uint8)
    expr = stored(c, codes, scales)
    return Near(expr.args[0], expr.args[1], step, "layers.0.ffn")


@pytest.mark.parametrize(("step", "cols"), [(128, 160), (128, 256), (64, 96), (32, 64)])
def test_scales_may_lie_two_to_the_eleventh_apart(step: int, cols: int) -> None:
    c = Case()
    found = near(c, 6, cols, step)
    scales = c.store.tensors["w.s"]
    scales[3, 0] -= SPREAD
    check_near(found, c.store)
    scales[3, 0] -= 1
    if step == 32:  # each has one of its own
        check_near(found, c.store)
        return
    where = rf"layers\.0\.ffn: in row 3 scales of {step} columns"
    with pytest.raises(CompileError, match=rf"{where} lie 2\^12 apart"):
        check_near(found, c.store)
    c.store.tensors["w.codes"][3, :16] = 0x80  # zeros of both signs, whose scale says nothing
    check_near(found, c.store)
    c.store.tensors["w.codes"][3, 15] = 0x10
    with pytest.raises(CompileError, match="--numerics bf16"):
        check_near(found, c.store)


def test_steps_end_where_their_columns_do() -> None:
    """A far scale in the next step of a row, or in the next row, is none of this one's."""
    c = Case()
    found = near(c, 2, 160)
    c.store.tensors["w.s"][0, 4] = 1
    c.store.tensors["w.s"][1] = 200
    check_near(found, c.store)


def test_a_plan_looks_at_the_scales_it_relies_on(tmp_path: Path) -> None:
    """Nothing is written where they lie too far apart; products of numbers do not mind."""
    c = Case()
    scales = np.full((32, 4), 127, np.uint8)
    scales[5, 2] = 100
    x = c.b.op("round_values", c.f32("x", B, T, 128), rule="e4m3", block=128)
    c.b.loc = "layers.0.wq"
    expr = stored(c, np.full((32, 64), 0x22, np.uint8), scales)
    c.op("linear", x, c.b.weight(expr, "layers.0.wq"))
    with pytest.raises(CompileError, match=r"layers\.0\.wq: in row 5 scales of 128 columns lie 2\^27 apart"):
        write_draft(c.module, c.store, tmp_path / "m.dsv4")
    assert not list(tmp_path.iterdir())
    write_draft(c.module, c.store, tmp_path / "m.dsv4", "sm_80")
