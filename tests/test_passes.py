"""What holds for all passes: table, pipeline strings, levels, broken results, and that numbers stay the same.

What each pass does to a module is in `filetests`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import ClassVar

import numpy as np
import pytest
from support import B, T, ints

import dsv4c.passes as package
from dsv4c.errors import PassError
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Builder, Module
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.text import print_module
from dsv4c.ir.types import f32
from dsv4c.passes import PASSES, Pass, parse_pipeline, print_pipeline, run_pipeline
from dsv4c.passes.narrow_weights import NarrowWeights
from dsv4c.targets import TARGETS


def on_disk() -> set[type[Pass]]:
    """Every subclass of `Pass` in the files of the package."""
    found: set[type[Pass]] = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found |= {
            c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Pass) and c is not Pass
        }
    return found


def small() -> Module:
    m = Module("small")
    b = Builder(m)
    m.outputs["y"] = b.op("scale", b.input("x", f32(B, T, 6)), factor=2.0)
    return m


def test_the_table_is_complete() -> None:
    assert set(PASSES.values()) == on_disk()
    assert all(name == p.name for name, p in PASSES.items())


@pytest.mark.parametrize("p", PASSES.values(), ids=list(PASSES))
def test_a_pass_is_a_documented_frozen_value(p: type[Pass]) -> None:
    assert is_dataclass(p) and p.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert p() == p() and hash(p()) == hash(p())
    assert p.doc and not p.doc.endswith(".") and p.doc[0].islower()
    assert p.takes and all(isinstance(level, Level) for level in p.takes)
    assert parse_pipeline(str(p())) == (p(),)


def test_pipelines_round_trip() -> None:
    passes = parse_pipeline('fuse_swiglu, narrow_weights{storage = "f32"}')
    assert passes[1] == NarrowWeights("f32") != NarrowWeights()
    assert print_pipeline(passes) == 'fuse_swiglu,narrow_weights{storage="f32"}'
    assert parse_pipeline(print_pipeline(passes)) == passes
    assert parse_pipeline("") == () and print_pipeline(()) == ""


def test_every_targets_pipeline_parses() -> None:
    for target in TARGETS.values():
        for form in target.formats:
            assert print_pipeline(parse_pipeline(form.passes)) == form.passes


@dataclass(frozen=True)
class Optioned(Pass):
    name: ClassVar[str] = "optioned"
    doc: ClassVar[str] = "takes options"
    rate: float
    count: int = 3

    def run(self, module: Module) -> int:
        return self.count


def test_options_are_typed() -> None:
    assert Optioned.with_options({"rate": 2}) == Optioned(2.0, 3)
    assert str(Optioned(0.5)) == "optioned{rate=0.5, count=3}"
    assert [f.name for f in fields(Optioned)] == ["rate", "count"]
    with pytest.raises(PassError, match="optioned: option 'rate' is required; allowed: float"):
        Optioned.with_options({})
    with pytest.raises(PassError, match=r"option count = 1\.5 is mistyped; allowed: int"):
        Optioned.with_options({"rate": 1.0, "count": 1.5})
    with pytest.raises(
        PassError, match=r"unknown option 'rat'; allowed: count, rate\n  hint: did you mean 'rate'"
    ):
        Optioned.with_options({"rat": 1.0})


def test_options_are_typed_without_postponed_annotations() -> None:
    """As in a file of someone else's that lacks `from __future__ import annotations`."""
    names = {"name": "outside", "doc": "from outside"}
    options = [("rate", float), ("label", str, "x")]
    outside = make_dataclass("Outside", options, bases=(Pass,), namespace=names, frozen=True)
    assert outside.with_options({"rate": 2, "label": "y"}) == outside(2.0, "y")
    with pytest.raises(PassError, match="option label = 3 is mistyped; allowed: str"):
        outside.with_options({"rate": 1.0, "label": 3})


def test_records_and_callback() -> None:
    m = small()
    Builder(m).op("scale", m.inputs["x"], factor=3.0)
    seen: list[tuple[str, int]] = []
    records = run_pipeline(m, (Optioned(1.0),), lambda p, left: seen.append((p.name, len(left.ops))))
    (record,) = records
    assert (record.name, record.changes) == ("optioned{rate=1.0, count=3}", 3)
    assert (record.ops_before, record.ops_after) == (2, 1), "dead code goes after every pass"
    assert record.seconds >= 0 and seen == [("optioned", 1)]


def test_levels_are_checked_and_set() -> None:
    m = small()
    with pytest.raises(PassError, match="fuse_expert_gemms: does not take level MODEL; allowed: FUSED"):
        run_pipeline(m, parse_pipeline("fuse_expert_gemms"))
    run_pipeline(m, parse_pipeline("merge_common_subexpressions"))
    assert m.level is Level.MODEL, "None as `gives` keeps the level"
    run_pipeline(m, parse_pipeline("fuse_swiglu,fuse_expert_gemms"))
    assert m.level is Level.FUSED


@dataclass(frozen=True)
class Breaker(Pass):
    name: ClassVar[str] = "breaker"
    doc: ClassVar[str] = "breaks the graph"
    how: str = "order"

    def run(self, module: Module) -> int:
        if self.how == "order":
            module.ops.clear()
        else:
            module.ops[0].attrs["factor"] = 1.0
            module.ops[0].result.type = f32(B, T, 7)
        return 1


@pytest.mark.parametrize(
    ("how", "what"), [("order", "output 'y' is not made by the module"), ("type", "scale: has results")]
)
def test_a_pass_that_breaks_the_graph_is_named(how: str, what: str) -> None:
    with pytest.raises(PassError, match=f"breaker: left a broken graph: .*{what}"):
        run_pipeline(small(), (Breaker(how),))


@dataclass(frozen=True)
class Mistyper(Pass):
    name: ClassVar[str] = "mistyper"
    doc: ClassVar[str] = "leaves an op whose operands do not fit"

    def run(self, module: Module) -> int:
        y = Builder(module).op("add", module.inputs["x"], module.inputs["x"])
        assert y.producer is not None
        y.producer.set_operand(0, Builder(module).input("z", f32(B, T, 7)))
        module.outputs["y"] = y
        return 1


def test_a_pass_that_leaves_a_misfit_is_named() -> None:
    with pytest.raises(
        PassError, match=r"mistyper: left a broken graph: .*add needs equal shapes"
    ):
        run_pipeline(small(), (Mistyper(),))


# --------------------------------------------------------------------------- passes change no number


def evaluate(module: Module) -> dict[str, np.ndarray]:
    """Two calls over two sequences of different length, every output and state."""
    evaluator = Evaluator(module, precision=np.float64)
    state = evaluator.fresh_state(B=2, ctx=32)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 19))
    out: dict[str, np.ndarray] = {}
    for call, (cut, n_valid) in enumerate(((slice(0, 14), ints(14, 9)), (slice(14, 19), ints(3, 5)))):
        rows = np.array([[0, n - 1] for n in n_valid])
        step = evaluator({"tokens": tokens[:, cut], "n_valid": n_valid, "rows": rows}, state)
        state = step.state
        out |= {f"{name}.{call}": a for name, a in {**step.outputs, **step.state}.items()}
    return out


def is_exact(text: str) -> bool:
    return not any(p.effect().changes for p in parse_pipeline(text))


EVERY = [*PASSES, *sorted({f.passes for t in TARGETS.values() for f in t.formats})]
PIPELINES = [text for text in EVERY if is_exact(text)]
IDLE = {
    "eliminate_dead_code": "the front end leaves it no work",
    "merge_common_subexpressions": "the front end leaves it no work",
    "prune_experts": "its default removes what no token can choose, and here every expert is chosen",
    "fold_norm_scale": "no norm of a random model has powers of two for scales",
    "fold_constants": "the front end leaves it no work",
    "layout_engram": "the model has no n-gram tables; tests/test_layout_engram.py has",
    "allow_replay": "the model has no decoder half; tests/test_replay.py has",
    "plan_memory": "it changes nothing and leaves a note",
    "spread_layers": "it changes nothing and leaves a note",
}
FIRST = {
    "instrument_experts": "fuse_swiglu,fuse_expert_gemms",
    "instrument_inputs": "fuse_swiglu,fuse_expert_gemms",
    "fold_shared_expert": "fuse_swiglu,fuse_expert_gemms,narrow_weights",
    "fuse_rotary_write": "fuse_swiglu,fuse_norm_rotary",
}
"""What a pass needs before it to have work; the others need at most to reach their level."""


@pytest.mark.parametrize("text", PIPELINES)
def test_no_pass_changes_a_number(text: str, tiny_model: Module) -> None:
    """Each pass alone, from the level it takes, and each target's pipeline: equal up to summation order."""
    before = evaluate(tiny_model)
    changed = clone(tiny_model)
    passes = parse_pipeline(text)
    if changed.level not in passes[0].takes:
        run_pipeline(changed, parse_pipeline(FIRST.get(text, "fuse_swiglu")))
    records = run_pipeline(changed, passes)
    after = evaluate(changed)
    assert before.keys() <= after.keys()  # a pass may add states of its own
    for name, want in before.items():
        np.testing.assert_allclose(after[name], want, rtol=1e-12, atol=1e-12, err_msg=name)
    if text not in IDLE:
        assert sum(r.changes for r in records) > 0 and print_module(changed) != print_module(tiny_model)
