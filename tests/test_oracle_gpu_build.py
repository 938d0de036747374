"""Objects of kernels for every GPU, without one: they assemble, nothing spills, and matrix units are used."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from gpu_support import GOLDEN, in_numerics, lowered, quiet

from dsv4c.errors import CompileError
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.container.plan import Kernel, Plan
from dsv4c.runtime.gpu.dry_run import DryRunDevice
from dsv4c.runtime.gpu_backend import GpuBackend
from dsv4c.targets.base import Arch
from dsv4c.targets.gpu.arch import GPUS, gpu
from dsv4c.targets.gpu.build import build
from dsv4c.targets.gpu.emit import emit_plan
from dsv4c.targets.gpu.plan import draft
from dsv4c.targets.gpu.table import source

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle

USUAL = ("sm_90a", "gfx942")
ARCHS = [pytest.param(g.name, marks=() if g.name in USUAL else pytest.mark.slow) for g in GPUS]
MACHINE = {"cuda": 190, "hip": 224}
AMD = {"gfx90a": 0x3F, "gfx942": 0x4C, "gfx950": 0x4F}


@pytest.mark.parametrize("checkpoint", ["v4", "v41"])
@pytest.mark.parametrize("name", ARCHS)
def test_a_model_compiles(name: str, checkpoint: str, tmp_path: Path) -> None:
    """A real object per kernel; the second time everything comes from the cache."""
    module, target, cache = lowered(GOLDEN / checkpoint), gpu(name), tmp_path / "cache"
    with ArtifactWriter(tmp_path / "m.dsv4") as writer:
        emit_plan(module, module.store, writer, Arch(name, {}), quiet, cache)  # type: ignore[arg-type]
    artifact = Artifact.open(tmp_path / "m.dsv4")
    plan = Plan.from_json(json.loads(artifact.section("plan")), name)
    code = artifact.section("code")
    for kernel in plan.kernels:
        check_object(
            kernel, plan, code[kernel.offset : kernel.offset + kernel.nbytes], source(kernel.name).hot
        )
    report = artifact.meta["plan"]
    assert {k["name"] for k in report["kernels"]} == {k.name for k in plan.kernels}
    assert all(0 < k["occupancy"] <= 1 for k in report["kernels"])
    assert build(draft(module, target).plan.kernels, target, cache).compiled == 0
    GpuBackend(artifact, DryRunDevice())  # every object lies in the section


def check_object(kernel: Kernel, plan: Plan, blob: bytes, hot: bool) -> None:
    """An ELF file for that machine, with its entry, no spills where it is hot, matrix instructions where it
    must.
    """
    assert blob[:4] == b"\x7fELF" and kernel.entry.encode() in blob
    machine, flags = struct.unpack_from("<H", blob, 18)[0], struct.unpack_from("<I", blob, 48)[0]
    assert machine == MACHINE[plan.vendor]
    if plan.vendor == "hip":
        assert flags & 0xFF == AMD[plan.arch]
    facts: dict[str, Any] = kernel.facts
    assert kernel.shared <= plan.shared_limit and facts["registers"] > 0
    assert not (hot and facts["spilled"])
    if source(kernel.name).matrix:
        assert sum(facts["matrix"].values()) > 0
    if plan.arch == "sm_90a" and kernel.name == "linear" and kernel.constants["BM"] == 64:
        assert any(instruction.startswith("HGMMA") for instruction in facts["matrix"])


CODED = {
    "fp8": r"QMMA|QGMMA|UTCQMMA|v_mfma_\w+(fp8_fp8|f8f6f4)", "int8": r"IMMA|IGMMA|UTCIMMA|v_mfma_i32\w+i8",
}  # fmt: skip
"""Instructions that multiply codes."""
IN_FP16 = ("sm_90a", "sm_100a")
"""GPUs that have instructions of FP8 for 64 rows and more only; for few the compiler makes FP16 of both."""


@pytest.mark.parametrize("numerics", ["fp8", "int8"])
@pytest.mark.parametrize("name", ARCHS)
def test_products_of_codes_use_the_instructions_for_them(name: str, numerics: str, tmp_path: Path) -> None:
    target = gpu(name)
    known = draft(in_numerics(numerics, "cuda:sm_90a"), target).plan.kernels
    kernels = [k for k in known if source(k.name).module in ("codes", "rounding")]
    assert kernels and (numerics == "int8" or target.fp8 or {k.name for k in kernels} == {"round_rows"})
    for kernel in build(kernels, target, tmp_path).kernels:
        assert not kernel.facts["spilled"]
        if source(kernel.name).matrix:
            few = numerics == "fp8" and name in IN_FP16 and kernel.constants["BM"] == 16
            wanted = re.compile("HMMA" if few else CODED[numerics])
            found = kernel.facts["matrix"]
            assert found and all(wanted.match(i) for i in found), (kernel.name, found)


def test_a_kernel_that_does_not_compile_says_so(tmp_path: Path) -> None:
    target = gpu("sm_90a")
    some = next(k for k in draft(lowered(GOLDEN / "v4"), target).plan.kernels if k.name == "unary")
    bad = Kernel(
        some.name, some.module, "", some.parameters, {**some.constants, "BN": 3}, some.warps, some.stages
    )  # fmt: skip
    with pytest.raises(CompileError, match=r"(?s)unary on sm_90a.*power of 2"):
        build([bad], target, tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.json")), "a failure is not kept"
