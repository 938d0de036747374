"""Launch plans of DeepSeek-V4.1 without Triton and without a device: launches, images, the image encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_support import GOLDEN, lowered, write_draft
from support import B, Case, T

from dsv4c import api
from dsv4c.errors import ArtifactError, TargetError, UsageError
from dsv4c.ir.graph import Builder, Module
from dsv4c.ir.types import f32
from dsv4c.runtime.backends import dimension, load_backend
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.plan import Plan
from dsv4c.runtime.engram import TableOptions
from dsv4c.runtime.gpu.check import check_program
from dsv4c.runtime.gpu.dry_run import DryRunDevice
from dsv4c.runtime.gpu_backend import GpuBackend
from dsv4c.runtime.images import ImagePlan
from dsv4c.runtime.images.rows import ImageRows
from dsv4c.runtime.images.tower import tower_indices
from dsv4c.targets.gpu.arch import GPUS, gpu
from dsv4c.targets.gpu.plan import draft


@pytest.fixture(scope="module")
def module() -> Module:
    return lowered(GOLDEN / "v41")


@pytest.fixture(scope="module")
def plan(module: Module) -> Plan:
    return draft(module, gpu("sm_90a")).plan


@pytest.mark.parametrize("target", GPUS, ids=lambda g: g.name)
def test_every_launch_is_sound_at_many_sizes(module: Module, target: Any) -> None:
    """Of both programs of the step and of the image encoder."""
    plan = draft(module, target).plan
    for b, t, images, ctx in ((1, 1, 1, 64), (3, 1, 2, 4096), (2, 7, 3, 129), (1, 300, 200, 4096)):
        sizes = {"B": b, "T": t, "L": 1, "I": images, "ctx": ctx}
        for program in plan.programs:
            if not program.part and (not program.most or b * t <= program.most):
                check_program(plan, program, sizes)
    for patches, tokens in ((1, 1), (20, 4), (9216, 1024)):
        sizes = {"B": 1, "N": patches, "M": tokens, "S": tokens + 34}
        check_program(plan, plan.program(sizes, "vision"), sizes)


def test_a_plan_with_parts_survives_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.as_json())), "here") == plan
    assert plan.parts == ("vision",) and [p.name for p in plan.programs] == ["few", "many", "vision"]
    assert [b.name for b in plan.inputs()] == ["tokens", "n_valid", "rows", "images", "n_images"]
    names = ["vision.patches", "vision.places", "vision.cells", "vision.layout"]
    assert [b.name for b in plan.inputs("vision")] == names


@pytest.mark.parametrize(
    ("program", "change", "what"),
    [
        (2, {"most": 4}, "sm_90a, vision: the last program must be for any size"),
        (2, {"part": "audio"}, "vision, launch 0 .*buffer 'vision.places'; allowed: pos, "),
        (0, {"part": "vision"}, "few, launch . for embed , embed.tokens: buffer 'tokens'; allowed: pos, "),
    ],
)
def test_a_part_keeps_to_its_own_inputs(
    plan: Plan, program: int, change: dict[str, Any], what: str
) -> None:
    data = json.loads(json.dumps(plan.as_json()))
    data["programs"][program] |= change
    with pytest.raises(ArtifactError, match=what):
        Plan.from_json(data, "here")
    data = json.loads(json.dumps(plan.as_json()))
    next(b for b in data["buffers"] if b["kind"] == "state")["part"] = "vision"
    with pytest.raises(ArtifactError, match="states belong to no part"):
        Plan.from_json(data, "here")


def test_a_model_of_images_runs_dry(module: Module, tmp_path: Path) -> None:
    """Text alone, a call with rows of an image, and the image encoder between steps of one state."""
    artifact = Artifact.open(write_draft(module, module.store, tmp_path / "m.dsv4"))
    device = DryRunDevice()
    backend = GpuBackend(artifact, device, check=True, resident=True)
    sizes = {"B": 1, "ctx": 256}
    state = {
        n: np.zeros([dimension(str(d), sizes) for d in v.type.shape], v.type.dtype.storage)
        for n, v in module.states.items()
    }
    few, many, vision = (len(p.launches) for p in backend.plan.programs)

    def step(t: int, images: ImageRows | None = None) -> int:
        before, n_valid = len(device.launches), np.full(1, t, np.int32)
        tokens, rows = np.zeros((1, t), np.int32), np.zeros((1, 1), np.int32)
        assert backend.step(tokens, n_valid, rows, state, images).shape == (1, 1, 512)
        return len(device.launches) - before

    assert step(1) == few
    assert step(20, ImageRows(np.zeros((1, 7, 128), np.float32), np.full(1, 7, np.int32))) == many
    before, grid = len(device.launches), ImagePlan(0, 0, 4, 5, 2, 2)
    found = backend.call_part("vision", [np.zeros((1, 20, 588), np.float32), *tower_indices(grid, 3)])
    assert found["rows"].shape == (1, 8, 128) and len(device.launches) - before == vision
    assert step(1) == few
    with pytest.raises(ArtifactError, match="there is no program 'audio'; allowed: vision"):
        backend.call_part("audio", [])


def test_tables_on_disk_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """By the compiler, which names the pass, and by a session that asks for them."""
    checkpoint = api.load_checkpoint(GOLDEN / "v41")
    tables = 'layout_engram{stats="", hot_bytes=0, cache_bytes=65536, tier="disk"}'
    passes = f"default,before(narrow_weights, {tables})"
    with pytest.raises(TargetError, match="engram_prefetch is not legal here") as caught:
        api.lower(checkpoint, "cuda", "plan", passes)
    assert caught.value.hint.startswith("leave out layout_engram: a plan holds tables in device memory")

    class Plain:
        path, meta = tmp_path / "m.dsv4", {"format": "plan", "arch": {}}

    with pytest.raises(UsageError, match="holds its tables in device memory") as wrong:
        load_backend(Plain(), None, TableOptions("disk"))  # type: ignore[arg-type]
    assert "leave out --tables disk" in wrong.value.hint


def test_a_part_with_states_is_refused() -> None:
    case = Case()
    case.op("scale", case.f32("x", B, T, 8), factor=2.0)
    part = Module("encoder")
    Builder(part).state("ring", f32(B, 4, 8))
    case.module.parts["encoder"] = part
    with pytest.raises(TargetError, match="part encoder has states; allowed: parts without") as caught:
        draft(case.module, gpu("sm_90a"))
    assert caught.value.hint.endswith("allow_replay")


def test_scores_of_candidates_are_no_wider_than_their_blocks(plan: Plan) -> None:
    """Layer 6 keeps to five blocks of four entries of layer 4, however long the context is."""
    many = plan.programs[1]
    found = {b.shape for b in many.temporaries if b.shape[:2] == ("B", "T") and b.dtype == "f32"}
    assert ("B", "T", "20") in found and ("B", "T", "ctx") in found
