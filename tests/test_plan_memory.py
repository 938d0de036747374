"""Placement of temporaries: nothing that is live together overlaps; the peak is what arithmetic says."""

from __future__ import annotations

import pytest

from dsv4c import api
from dsv4c.ir.cost import Cost, module_cost, op_cost, stored_bytes
from dsv4c.ir.graph import Module
from dsv4c.ir.text import parse_module
from dsv4c.passes.plan_memory import ALIGN, PlanMemory, plan

SIZES = {"B": 1, "T": 32, "L": 1, "ctx": 64, "routed rows": 8}

CHAIN = """
module "m" level MODEL {
  input %x : f32[B, T, 16]
  %1 = scale(%x) {factor = 2.0} : f32[B, T, 16] @a
  %2 = scale(%1) {factor = 2.0} : f32[B, T, 16] @b
  %3 = scale(%2) {factor = 2.0} : f32[B, T, 16] @c
  %4 = add(%3, %1) : f32[B, T, 16] @d
  output y = %4
}
"""
ROW = 32 * 16 * 4


def test_a_chain_by_hand() -> None:
    """%1 lives to %4; %2 dies at %3; %3 and %4 meet %1: three places, not four."""
    found = plan(parse_module(CHAIN), SIZES)
    assert (found.total, found.bound, found.peak) == (4 * ROW, 3 * ROW, 3 * ROW)
    assert [live for _, live in found.timeline] == [ROW, 2 * ROW, 3 * ROW, 3 * ROW]
    offsets = [p.offset for p in found.places]
    assert offsets[3] == offsets[1], "%4 takes the place that %2 left"


def test_a_view_keeps_what_it_shows_alive() -> None:
    text = """
module "m" level MODEL {
  input %x : f32[B, T, 16]
  %1 = scale(%x) {factor = 2.0} : f32[B, T, 16] @a
  %2 = split_heads(%1) {heads = 4} : f32[B, T, 4, 4] @b
  %3 = scale(%x) {factor = 3.0} : f32[B, T, 16] @c
  %4 = unit_norm(%2) {eps = 0.1} : f32[B, T, 4, 4] @d
  output y = %3
  output z = %4
}
"""
    found = plan(parse_module(text), SIZES)
    assert len(found.places) == 3 and found.peak == 3 * ROW


def test_states_and_weights_need_no_place(tiny_model: Module) -> None:
    lowered = api.lower(tiny_model).module
    found = plan(lowered, SIZES)
    for place in found.places:
        assert place.value.producer is not None and place.value.producer.weight is None
        assert place.value.producer.definition.consumes is None


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_no_overlap_on_a_whole_model(tiny_model: Module, tokens: int) -> None:
    for module in (tiny_model, api.lower(tiny_model).module):
        found = plan(module, {**SIZES, "T": tokens})
        assert found.bound <= found.peak <= found.total
        for i, a in enumerate(found.places):
            assert a.offset % ALIGN == 0
            for b in found.places[:i]:
                together = a.first <= b.last and b.first <= a.last
                apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
                assert apart or not together, f"{a} and {b}"


def test_the_pass_leaves_its_numbers_for_the_report(tiny_model: Module) -> None:
    low = api.lower(tiny_model)
    PlanMemory(tokens=16).run(low.module)
    one, many = low.module.notes["plan_memory"]["steps"]
    assert (one["tokens"], many["tokens"]) == (1, 16)
    assert one["bound"] <= one["peak"] < many["peak"] and many["temporaries"] == one["temporaries"]
    assert max(point["live"] for point in many["timeline"]) == many["bound"]


# ------------------------------------------------------------------------------------------- cost


def test_the_cost_of_a_product_by_hand() -> None:
    m = parse_module("""
module "m" level MODEL {
  input %x : f32[B, T, 16]
  %w = weight cast(source{name = "w", dtype = bf16, shape = [8, 16]}){dtype = bf16} : bf16[8, 16] @w
  %y = linear(%x, %w) : f32[B, T, 8] @y
  output y = %y
}
""")
    assert op_cost(m.ops[1], {"B": 2, "T": 3}) == Cost(2 * 6 * 8 * 16, 8 * 16 * 2, 4 * 6 * (16 + 8))
    assert module_cost(m, {"B": 2, "T": 3}) == {"linear": (1, op_cost(m.ops[1], {"B": 2, "T": 3}))}


def test_packed_weights_cost_what_they_take() -> None:
    m = parse_module(
        """
module "m" level MODEL {
  %w = weight decode_fp4(source{name = "w", dtype = f4e2m1x2, shape = [8, 32]},
source{name = "s", dtype = f8e8m0, shape = [8, 2]}) : f32[8, 64] @w
}
""".replace(",\nsource", ", source")
    )
    assert stored_bytes(m.ops[0]) == 8 * 32 + 8 * 2


def test_a_decode_step_reads_the_experts_it_chose(tiny_model: Module) -> None:
    lowered = api.lower(tiny_model).module
    one = module_cost(lowered, {"B": 1, "T": 1, "L": 1, "ctx": 64})["expert_mlp"][1]
    many = module_cost(lowered, {"B": 1, "T": 64, "L": 1, "ctx": 64})["expert_mlp"][1]
    assert one.weight_bytes < many.weight_bytes and many.flops == 64 * one.flops
    past = module_cost(lowered, {"B": 1, "T": 1, "L": 1, "ctx": 64, "past": 60})
    fresh = module_cost(lowered, {"B": 1, "T": 1, "L": 1, "ctx": 64})
    assert past["attention"][1].flops > fresh["attention"][1].flops
