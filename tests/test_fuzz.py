"""A bounded run of the fuzzer, and proof that it notices; `tests/fuzzing.py --seconds 600` runs longer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import fuzzing
import pytest

from dsv4c.errors import PassError
from dsv4c.ir.graph import Module
from dsv4c.ir.text import print_module
from dsv4c.passes import PASSES, Pass, parse_pipeline, run_pipeline


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs(seed: int) -> None:
    fuzzing.check(fuzzing.random_graph(seed))


@pytest.mark.parametrize("seed", range(4))
def test_random_models(seed: int) -> None:
    assert fuzzing.check(fuzzing.random_model(seed)) > 0


@pytest.mark.parametrize("seed", [0, 5, 6])
def test_random_models_of_v41(seed: int) -> None:
    assert fuzzing.check(fuzzing.random_model_v41(seed)) > 0


@pytest.mark.parametrize("seed", range(2))
def test_random_image_encoders(seed: int) -> None:
    assert fuzzing.check(fuzzing.random_vision(seed)) > 0


def test_graphs_are_the_same_for_the_same_seed_and_not_all_alike() -> None:
    for make in fuzzing.MAKERS:
        assert print_module(make(3)) == print_module(make(3)) != print_module(make(4))


def names(make: Callable[[int], Module], seeds: int) -> set[str]:
    return {op.name for seed in range(seeds) for op in make(seed).ops}


def test_what_is_fuzzed() -> None:
    assert names(fuzzing.random_graph, 24) >= {
        "linear", "swiglu", "dispatch", "combine", "rotary", "hc_mix", "ring_write", "split_heads",
        "index_topk", "index_restrict", "candidate_blocks",
    }  # fmt: skip
    assert names(fuzzing.random_model_v41, 8) >= {
        "compress", "index_restrict", "candidate_blocks", "merge_images", "engram_rows", "engram_gate",
    }  # fmt: skip
    assert names(fuzzing.random_vision, 2) >= {"grid_angles", "full_attention", "gather_cells", "image_span"}


def test_the_fusions_of_v41_fire_on_what_is_fuzzed() -> None:
    for make, seeds in ((fuzzing.random_graph, 24), (fuzzing.random_model_v41, 8)):
        found, blocks, outside = set[str](), 0, 0
        for seed in range(seeds):
            module = make(seed)
            run_pipeline(module, parse_pipeline("fuse_swiglu,fuse_index_select,fuse_hyper"))
            found |= {op.name for op in module.ops}
            blocks += sum(op.name == "index_select" and len(op.operands) > 5 for op in module.ops)
            borders = [op for op in module.ops if op.name in ("hc_pre", "hc_post_pre")]
            outside += sum(len(op.operands) == op.definition.arity[1] for op in borders)
        assert "index_candidates" in found and outside > 0
        assert blocks > 0 or make is fuzzing.random_graph


def test_every_pass_without_options_is_fuzzed() -> None:
    assert {p.name for p in fuzzing.simple_passes()} >= set(PASSES) - {"prune_experts", *fuzzing.NEEDS_FILES}


@dataclass(frozen=True)
class Flipper(Pass):
    """Wrong: turns the sign of the first addend."""

    name: ClassVar[str] = "flipper"
    doc: ClassVar[str] = "breaks additions"

    def run(self, module: Module) -> int:
        for op in module.ops:
            if op.name == "scale":
                op.attrs["factor"] = -float(op.attrs["factor"])  # type: ignore[arg-type]
                return 1
        return 0


def test_a_wrong_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "simple_passes", lambda: [Flipper()])
    with pytest.raises(PassError, match="flipper: changes output"):
        for seed in range(24):
            fuzzing.check(fuzzing.random_graph(seed))
