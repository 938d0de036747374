"""Patterns, rules, and the explanation of a rule that does not fire."""

from __future__ import annotations

import pytest
from support import B, T

from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.rewrite import Bindings, Pat, Rule, any_, apply_rules, explain, match, try_rule
from dsv4c.ir.types import f32
from dsv4c.ir.verify import verify
from dsv4c.passes.fuse_elementwise import CLAMPED_SWIGLU, INDEX_SELECT
from dsv4c.passes.fuse_expert_gemms import recognise


def scaled(*factors: float) -> tuple[Module, Builder, Value]:
    """A chain of `scale` over an input; its end is output `y`."""
    m = Module("m")
    b = Builder(m)
    y = b.input("x", f32(B, T, 6))
    for index, factor in enumerate(factors):
        b.loc = f"scale.{index}"
        y = b.op("scale", y, factor=factor)
    m.outputs["y"] = y
    return m, b, y


def _product(b: Builder, bindings: Bindings, op: Op) -> Value:
    inner = bindings["inner"].producer
    assert inner is not None
    first, second = inner.attrs["factor"], op.attrs["factor"]
    assert isinstance(first, float) and isinstance(second, float)
    return b.op("scale", bindings["x"], factor=first * second)


def _exact(bindings: Bindings, op: Op) -> str:
    return "" if op.attrs["factor"] in (2.0, 4.0) else f"{op.attrs['factor']} is no power of two"


FOLD = Rule("fold_scales", Pat("scale", (Pat("scale", (any_("x"),), "inner"),)), _product, _exact)


def test_match_binds_values() -> None:
    m, _, y = scaled(2.0, 4.0)
    found = match(FOLD.pattern, y)
    assert found.bindings == {"x": m.inputs["x"], "inner": m.ops[0].result}
    assert (found.depth, found.reason) == (2, "")


@pytest.mark.parametrize(
    ("pattern", "depth", "reason"),
    [
        (Pat("add"), 0, "expected add, found scale"),
        (Pat("scale", (Pat("scale", (Pat("scale"),)),)), 2, "expected scale, found an argument"),
        (Pat("scale", (Pat("add"),)), 1, "expected add, found scale"),
        (Pat("scale", attrs=(("factor", 3.0),)), 0, "scale.factor is 4.0, not 3.0"),
        (Pat("scale", (any_(), any_())), 1, "scale has 1 operands, the pattern 2"),
        (Pat("scale", (Pat("scale", (any_("v"),), "v"),)), 2, "'v' would be two different values"),
    ],
)
def test_a_match_that_fails_says_why(pattern: Pat, depth: int, reason: str) -> None:
    found = match(pattern, scaled(2.0, 4.0)[2])
    assert (found.bindings, found.depth, found.reason) == (None, depth, reason)


def test_one_name_is_one_value() -> None:
    m, b, y = scaled(2.0)
    twice = Pat("add", (any_("a"), any_("a")))
    assert match(twice, b.op("add", y, y)).bindings == {"a": y}
    assert match(twice, b.op("add", y, m.inputs["x"])).bindings is None


def test_single_use_looks_at_readers_outside_the_match() -> None:
    m, b, y = scaled(2.0, 4.0)
    pattern = Pat("scale", (Pat("scale", single_use=True),))
    assert match(pattern, y).bindings is not None
    b.op("unit_norm", m.ops[0].result, eps=1e-6)
    assert match(pattern, y).reason == "scale @scale.0 has 2 readers"


def test_apply_replaces_readers_and_outputs() -> None:
    m, b, y = scaled(3.0, 2.0)
    reader = b.multi("unit_norm", y, eps=1e-6)
    assert apply_rules(m, (FOLD,)) == 1
    new = m.outputs["y"].producer
    assert new is not None and new.attrs["factor"] == 6.0 and new.loc == "scale.1"
    assert new.operands == [m.inputs["x"]] and reader.operands == [new.result] and not y.uses
    verify(m)


def test_rules_see_what_earlier_rewrites_left() -> None:
    m, _, _ = scaled(3.0, 2.0, 4.0)
    assert apply_rules(m, (FOLD,)) == 2
    new = m.outputs["y"].producer
    assert new is not None and new.attrs["factor"] == 24.0 and new.operands == [m.inputs["x"]]
    verify(m)


def test_a_check_stops_a_rule() -> None:
    m, _, _ = scaled(2.0, 3.0)
    assert apply_rules(m, (FOLD,)) == 0
    assert explain(m, FOLD) == "fold_scales: matched 2 op(s) at scale @scale.1, then 3.0 is no power of two"


def test_explain_shows_the_deepest_partial_match() -> None:
    m, b, y = scaled(2.0)
    assert (
        explain(m, FOLD)
        == "fold_scales: matched 1 op(s) at scale @scale.0, then expected scale, found an argument"
    )
    b.op("unit_norm", y, eps=1e-6)
    assert "scale @scale.0" in explain(m, FOLD), "a shallower failure later in the module says less"
    b.loc = "deeper"
    b.op("scale", y, factor=3.0)
    assert explain(m, FOLD) == "fold_scales: matched 2 op(s) at scale @deeper, then 3.0 is no power of two"
    b.op("scale", y, factor=2.0)
    assert explain(m, FOLD) == ""
    assert explain(Module("empty"), FOLD) == "fold_scales: matched 0 op(s), then the module has no ops"


def test_ops_with_many_results_match_nothing(tiny_model: Module) -> None:
    mix = next(op for op in tiny_model.ops if op.name == "hc_mix")
    assert try_rule(FOLD, mix).reason == "hc_mix has 3 results"


def test_the_projects_own_rules_explain_themselves(tiny_model: Module) -> None:
    assert explain(tiny_model, CLAMPED_SWIGLU) == "" and explain(tiny_model, INDEX_SELECT) == ""
    for topk in [op for op in tiny_model.ops if op.name == "index_topk"]:
        Builder(tiny_model).op("index_topk", topk.operands[0], k=1)
    assert explain(tiny_model, INDEX_SELECT).endswith("index_scores @layers.1.attn.indexer has 2 readers")
    for op in tiny_model.ops:
        if op.name == "clamp" and op.attrs["low"] != op.attrs["high"]:
            op.attrs["high"] = 7.0
    assert "the clamps are not (-inf, L] and [-L, L]" in explain(tiny_model, CLAMPED_SWIGLU)


def test_experts_say_why_they_stay_apart(tiny_model: Module) -> None:
    combine = next(op for op in tiny_model.ops if op.name == "combine")
    assert recognise(combine) == "expert 0 is no clamped SwiGLU MLP: expected clamped_swiglu, found swiglu"
