"""Use lists, cloning, the view for graph algorithms, and text of whole models."""

from __future__ import annotations

import networkx as nx
import pytest
from support import B, T

from dsv4c.errors import IRError
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.text import parse_module, print_module
from dsv4c.ir.types import f32
from dsv4c.ir.verify import verify
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.targets import TARGETS


def diamond() -> tuple[Module, list[Op]]:
    """x -> a -> (b, c -> d) -> e."""
    m = Module("diamond")
    b = Builder(m)
    a = b.op("scale", b.input("x", f32(B, T, 6)), factor=2.0)
    left = b.op("unit_norm", a, eps=1e-6)
    right = b.op("scale", b.op("scale", a, factor=3.0), factor=4.0)
    m.outputs["y"] = b.op("add", left, right)
    return m, m.ops


def test_use_lists_follow_operands() -> None:
    m, (a, left, c, d, e) = diamond()
    assert set(a.result.uses) == {(left, 0), (c, 0)} and a.result.users() == [left, c]
    e.set_operand(1, left.result)
    assert set(left.result.uses) == {(e, 0), (e, 1)} and left.result.users() == [e]
    assert not d.result.uses
    left.result.replace_with(a.result)
    assert e.operands == [a.result, a.result] and not left.result.uses
    d.drop()
    assert not c.result.uses
    e.set_operand(0, m.inputs["x"])
    assert set(m.inputs["x"].uses) == {(a, 0), (e, 0)}


def test_a_state_is_declared_once() -> None:
    b = Builder(Module("m"))
    b.state("pos", f32(B))
    with pytest.raises(IRError, match="state 'pos' is declared twice"):
        b.state("pos", f32(B))


def test_an_op_with_many_results_has_no_single_one(tiny_model: Module) -> None:
    mix = next(op for op in tiny_model.ops if op.name == "hc_mix")
    with pytest.raises(ValueError):
        _ = mix.result


def test_a_clone_prints_the_same_and_shares_no_value(tiny_model: Module) -> None:
    copy = clone(tiny_model)
    verify(copy)
    assert print_module(copy) == print_module(tiny_model)
    assert not set(copy.arguments().values()) & set(tiny_model.arguments().values())
    assert not set(copy.ops) & set(tiny_model.ops)
    assert (
        copy.store is tiny_model.store and copy.meta == tiny_model.meta and copy.meta is not tiny_model.meta
    )
    before = print_module(tiny_model)
    run_pipeline(copy, parse_pipeline("fuse_swiglu,fuse_index_select,fuse_expert_gemms"))
    assert print_module(tiny_model) == before != print_module(copy)
    verify(tiny_model)


def test_a_clone_has_copies_of_the_parts() -> None:
    """What happens to those of the copy leaves the others as they were; sizes hold for all of them."""
    m, part = diamond()[0], diamond()[0]
    m.parts["vision"] = part
    copy = clone(m)
    assert set(copy.parts) == {"vision"} and copy.parts["vision"] is not part
    assert print_module(copy.parts["vision"]) == print_module(part)
    assert not set(copy.parts["vision"].ops) & set(part.ops)
    copy.parts["vision"].ops.clear()
    del copy.parts["vision"]
    assert set(m.parts) == {"vision"} and len(part.ops) == 5
    sized = clone(m, {"B": 3})
    assert sized.inputs["x"].type == sized.parts["vision"].inputs["x"].type == f32(3, T, 6)


def test_a_whole_model_is_a_fixed_point_of_print_and_parse(tiny_model: Module) -> None:
    text = print_module(tiny_model)
    again = parse_module(text)
    verify(again)
    assert print_module(again) == text
    assert (again.name, again.level, again.meta) == (tiny_model.name, tiny_model.level, tiny_model.meta)


def test_a_fused_model_is_a_fixed_point_of_print_and_parse(tiny_model: Module) -> None:
    run_pipeline(tiny_model, parse_pipeline(TARGETS["cpu"].format("tvm").passes))
    text = print_module(tiny_model)
    assert "expert_mlp" in text and print_module(parse_module(text)) == text


def test_networkx_has_the_graphs_edges_and_orders_it(tiny_model: Module) -> None:
    graph = tiny_model.to_networkx()
    assert set(graph) == set(tiny_model.ops) and nx.is_directed_acyclic_graph(graph)
    expected = {(v.producer, op) for op in tiny_model.ops for v in op.operands if v.producer is not None}
    assert set(graph.edges) == expected
    tiny_model.ops = list(nx.lexicographical_topological_sort(graph, key=tiny_model.ops.index))
    verify(tiny_model)  # any topological order that keeps reads of a state before its write is sound


def test_networkx_finds_the_critical_path() -> None:
    m, (a, left, c, d, e) = diamond()
    graph = m.to_networkx()
    assert nx.dag_longest_path(graph) == [a, c, d, e]
    assert nx.ancestors(graph, e) == {a, left, c, d} and nx.descendants(graph, left) == {e}
