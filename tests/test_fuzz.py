"""A bounded run of the fuzzer, and proof that it notices; `tests/fuzzing.py --seconds 600` runs longer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import fuzzing
import pytest

from dsv4c.errors import PassError
from dsv4c.ir.graph import Module
from dsv4c.ir.text import print_module
from dsv4c.passes import PASSES, Pass


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs(seed: int) -> None:
    fuzzing.check(fuzzing.random_graph(seed))


@pytest.mark.parametrize("seed", range(4))
def test_random_models(seed: int) -> None:
    assert fuzzing.check(fuzzing.random_model(seed)) > 0


def test_graphs_are_the_same_for_the_same_seed_and_not_all_alike() -> None:
    for make in (fuzzing.random_graph, fuzzing.random_model):
        assert print_module(make(3)) == print_module(make(3)) != print_module(make(4))
    ops = {op.name for seed in range(24) for op in fuzzing.random_graph(seed).ops}
    assert ops >= {"linear", "swiglu", "dispatch", "combine", "rotary", "hc_mix", "ring_write", "split_heads"}


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
