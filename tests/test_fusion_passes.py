"""What file tests of the fusions cannot show: reasons in the notes, weights that are read, exact values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import CTX, B, Case, DictStore, T, ints, normal

from dsv4c.errors import CompileError, IRError
from dsv4c.ir import maps
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType, f32_to_bf16
from dsv4c.ir.graph import Module, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.ops.state import closed_groups
from dsv4c.ir.packed import is_bf16
from dsv4c.ir.text import print_module
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.passes.fuse_elementwise import FuseIndexSelect
from dsv4c.passes.stored_format import stored_format


def notes(case: Case, text: str) -> Any:
    """What the last pass of a pipeline leaves in the notes."""
    case.module.level = Level.FUSED
    passes = parse_pipeline(text)
    run_pipeline(case.module, passes)
    return case.module.notes[passes[-1].name]


# -------------------------------------------------------------------------------------------- reasons


def test_merge_projections_says_why_not() -> None:
    c = Case()
    x, m = c.f32("x", B, T, 8), c.f32("m", 6, 8)
    a, b, twice = c.weight("a", 4, 8, bf16=True), c.weight("b", 4, 8), c.weight("twice", 8, 8)
    c.op("linear", x, a, out="1")
    c.op("linear", x, b, out="2")
    c.op("linear", c.op("linear", x, twice, out="3"), twice, out="4")
    c.op("linear", x, m, out="5")
    assert notes(c, "merge_projections") == {"merged": 0, "kept": {
        "a": "no other linear of these rows is stored as bf16",
        "b": "no other linear of these rows is stored as f32 of f32",
        "twice": "its weight has 2 readers and would be stored twice",
        "case": "its matrix is no weight",
    }}  # fmt: skip


def test_the_ring_keeps_its_write() -> None:
    c = Case()
    kv, cos, sin = c.f32("kv", B, T, 8), c.f32("cos", B, T, 2), c.f32("sin", B, T, 2)
    pos, n = c.i32("pos", B), c.i32("n", B)
    ring = c.state("ring", B, 4, 8)
    rows = c.b.op("norm_rotary", kv, cos, sin, eps=1e-6)
    q = c.b.op("split_heads", kv, heads=1)
    c.op("attention", q, rows, ring, c.weight("s", 1), pos, n, scale=1.0, window=4)
    c.op("ring_write", ring, rows, pos, n, out="ring")
    reason = "attention reads the ring as it was before this call, after the rotation"
    assert notes(c, "fuse_rotary_write") == {"fused": 0, "kept": {"case": reason}}


@pytest.mark.parametrize(
    ("other", "why"),
    [("ratio", "it appends groups of 8, the pooled ones are 4 long"),
     ("pos", "'pos' would be two different values"), ("reader", "norm_rotary @case has 2 readers"),
     ("norm", "expected norm_rotary, found compress")],
)  # fmt: skip
def test_entries_that_stay_open_say_why(other: str, why: str) -> None:
    c = Case()
    kv, pos, n = c.f32("kv", B, T, 8), c.i32("pos", B), c.i32("n", B)
    ring, entries = c.f32("ring", B, 8, 8), c.state("entries", B, CTX // 4, 4)
    angles = [c.f32(a, B, closed_groups(T, 4), 1) for a in ("cos", "sin")]
    rows = c.b.op("compress", kv, kv, ring, ring, pos, n, ratio=4, overlap=True)
    if other != "norm":
        rows = c.b.op("norm_rotary", rows, *angles, c.weight("w", 4), eps=1e-6)
    if other == "reader":
        c.op("scale", rows, factor=2.0)
    at = c.i32("at", B) if other == "pos" else pos
    c.op("entries_append", entries, rows, at, n, ratio=8 if other == "ratio" else 4, out="entries")
    assert notes(c, "fuse_rotary_write") == {"fused": 0, "kept": {"case": why}}


def test_borders_say_why_they_stay() -> None:
    c = Case()
    x, w_ = c.f32("x", B, T, 2, 8), c.weight("w", 8)
    parameters = c.weight("fn", 8, 16), c.weight("base", 8), c.weight("scale", 3)
    mix = c.b.multi("hc_mix", x, *parameters, eps=1e-6, norm_eps=1e-6, iters=3)
    c.b.loc = "post"
    c.op("rms_norm", c.b.op("hc_collapse", x, mix.results[1]), w_, eps=1e-6)
    found = notes(c, "fuse_hyper")
    assert found == {"fused": 0, "kept": {
        "post": "the streams are collapsed by other weights than the mix gives"
    }}  # fmt: skip


def index(c: Case) -> tuple[Value, ...]:
    """q, weights, keys, pos, n_valid of an indexer."""
    q, w_, keys = c.f32("q", B, T, 2, 4), c.f32("w", B, T, 2), c.f32("keys", B, CTX // 4, 4)
    return q, w_, keys, c.i32("pos", B), c.i32("n", B)


OTHER_ENTRIES = "the candidates are of other entries than are scored"


@pytest.mark.parametrize(
    ("odd", "why"),
    [("reader", "the scores are read by candidate_blocks, index_topk, scale"),
     ("two", "the scores are read by candidate_blocks, index_topk, index_topk"),
     ("none", "the scores are read by candidate_blocks"), ("output", "the scores are an output"),
     ("rounding", "the scores are rounded"), ("pos", OTHER_ENTRIES), ("n", OTHER_ENTRIES),
     ("ratio", OTHER_ENTRIES), ("ascending", "the selection is wanted in the order of its ids")],
)  # fmt: skip
def test_candidates_that_stay_apart_say_why(odd: str, why: str) -> None:
    c = Case()
    operands = index(c)
    pos, n = (
        c.i32("other", B) if odd == name else v for name, v in zip(("pos", "n"), operands[3:], strict=True)
    )
    rounding = "reference" if odd == "rounding" else "none"
    scores = c.b.op("index_scores", *operands, ratio=4, rounding=rounding)
    if odd != "none":
        c.op("index_topk", scores, k=2, ascending=odd == "ascending")
    c.op("candidate_blocks", scores, pos, n, ratio=8 if odd == "ratio" else 4, size=2, count=2)
    if odd == "reader":
        c.op("scale", scores, factor=2.0)
    elif odd == "two":
        c.op("index_topk", scores, k=1, out="again")
    elif odd == "output":
        c.module.outputs["scores"] = scores
    before = [op.name for op in c.module.ops]
    assert notes(c, "fuse_index_select") == {"kept": {"case": why}}
    assert [op.name for op in c.module.ops] == before
    assert f"@case: {why}" in FuseIndexSelect().explain(c.module)


def test_what_fuses_into_candidates_is_no_near_miss() -> None:
    c = Case()
    operands = index(c)
    scores = c.b.op("index_scores", *operands, ratio=4)
    c.op("index_topk", scores, k=2)
    c.op("candidate_blocks", scores, *operands[3:], ratio=4, size=2, count=2)
    before = print_module(c.module)
    assert FuseIndexSelect().explain(c.module) == []
    assert print_module(c.module) == before, "explain changes nothing"
    c.module.level = Level.FUSED
    run_pipeline(c.module, parse_pipeline("fuse_index_select"))
    assert [op.name for op in c.module.ops] == ["index_candidates"] and not c.module.notes


def test_a_restricted_selection_says_why_it_stays() -> None:
    c = Case()
    scores = c.b.op("index_scores", *index(c), ratio=4)
    within = c.b.op("index_restrict", scores, c.i32("blocks", B, T, 2), size=2)
    c.op("index_topk", within, k=2)
    c.op("scale", scores, factor=2.0)
    assert FuseIndexSelect().explain(c.module) == ["index_topk @case: index_scores @case has 2 readers"]


def test_borders_by_weights_from_outside_say_why_they_stay() -> None:
    """Streams that nobody mixes (the head), that are mixed twice, and a second border of one mix."""
    c = Case()
    pre, parameters = (
        c.f32("pre", B, T, 2),
        (c.weight("fn", 8, 16), c.weight("base", 8), c.weight("scale", 3)),
    )
    for name, mixes, norms in (("head", 0, 1), ("twice", 2, 1), ("once", 1, 2)):
        x, c.b.loc = c.f32(name, B, T, 2, 8), f"{name}.mix"
        for i in range(mixes):
            c.multi("hc_mix", x, *parameters, outs=(f"{name}{i}",), eps=1e-6, norm_eps=1e-6, iters=3 + i)
        for i in range(norms):
            c.b.loc = f"{name}.{i}"
            w_ = c.weight(f"w.{name}.{i}", 8)
            c.op("rms_norm", c.b.op("hc_collapse", x, pre), w_, eps=1e-6, out=f"{name}.{i}")
    outside = "the streams are collapsed by weights from outside and mixed"
    assert notes(c, "fuse_hyper") == {"fused": 1, "kept": {
        "head.0": f"{outside} 0 times", "twice.0": f"{outside} 2 times",
        "once.mix": "the streams stay: they come from an argument",
        "once.1": "its mix is part of another border",
    }}  # fmt: skip


# ----------------------------------------------------------------------------------------- norm scales


def normed(scale: list[float], reader: str = "linear", bf16: bool = True) -> Case:
    c = Case()
    x = c.f32("x", B, T, 4)
    y = c.b.op("rms_norm", x, c.weight_of("scale", np.array(scale, np.float32), bf16), eps=1e-6)
    if reader == "linear":
        c.op("linear", y, c.weight("a", 3, 4, bf16=True), out="a")
        c.op("linear", y, c.weight("b", 2, 4), out="b")
    else:
        c.op("scale", y, factor=2.0)
    c.module.store = c.store
    return c


def test_powers_of_two_move_into_the_weights() -> None:
    c = normed([1.0, 0.5, 4.0, 2.0**-20])
    x = {"x": normal(np.random.default_rng(0), 2, 3, 4)}
    before = Evaluator(c.module, precision=np.float64)(x, {}).outputs
    assert notes(c, "fold_norm_scale") == {"folded": 1, "kept": {}}
    assert [op.name for op in c.module.ops if op.weight is None] == ["unit_norm", "linear", "linear"]
    after = Evaluator(c.module, precision=np.float64)(x, {}).outputs
    for name, want in before.items():
        np.testing.assert_allclose(after[name], want, rtol=1e-15)
    run_pipeline(c.module, parse_pipeline("narrow_weights"))
    assert {op.loc: op.weight.dtype for op in c.module.weights() if op.weight} == {
        "a": DType.BF16, "b": DType.F32,
    }  # fmt: skip


ROUNDS = "some scale is no power of two, so that folding would move a rounding"


@pytest.mark.parametrize(
    ("scale", "reader", "why"),
    [([1.0, 2.0, 1.0, 3.0], "linear", ROUNDS),
     ([1.0, -2.0, 1.0, 1.0], "linear", ROUNDS),
     ([1.0, 0.0, 1.0, 1.0], "linear", ROUNDS),
     ([1.0] * 4, "scale", "scale reads it, which has no columns to scale")],
)  # fmt: skip
def test_other_scales_stay(scale: list[float], reader: str, why: str) -> None:
    assert notes(normed(scale, reader), "fold_norm_scale") == {"folded": 0, "kept": {"scale": why}}


def test_a_scale_that_would_widen_a_weight_stays() -> None:
    why = "the weight a is BF16 and the scale is not, so that it would be stored wider"
    assert notes(normed([1.0] * 4, bf16=False), "fold_norm_scale")["kept"] == {"scale": why}
    c = normed([1.0] * 4)
    for op in c.module.weights():
        if op.loc == "b":
            codes, scale = w.source("c", DType.F8E4M3, (2, 4)), w.source("s", DType.F8E8M0, (1, 1))
            op.weight = w.decode_fp8(codes, scale, (128, 128))
    why = "the weight b is packed, and its scaled columns would not be"
    assert notes(c, "fold_norm_scale")["kept"] == {"scale": why}


def test_a_graph_without_bytes_is_left_alone() -> None:
    c = normed([1.0] * 4)
    c.module.store = None
    why = "the module has no bytes to look at (it was read from text)"
    assert notes(c, "fold_norm_scale")["kept"] == {"scale": why}


def test_constants_that_may_round_say_so() -> None:
    c = Case()
    a = c.weight("a", 4, 8)
    c.b.loc = "third"
    third = c.b.op("scale", a, factor=1 / 3)
    c.b.loc = "sum"
    c.op("linear", c.f32("x", B, T, 8), c.b.op("add", a, third))
    found = notes(c, "fold_constants")
    assert found["kept"] == {"third": f"the factor {1 / 3} is no power of two"}
    c = Case()
    a = c.weight("a", 4, 8)
    c.op("linear", c.f32("x", B, T, 8), c.b.op("add", a, a))
    why = "add may round; only scale and clamp are known not to"
    assert notes(c, "fold_constants")["kept"] == {"case": why}


# --------------------------------------------------------------------------------------------- weights


def test_mapped_weights_are_exact() -> None:
    store = DictStore()
    bf16 = store.add("a", DType.BF16, f32_to_bf16(np.array([[1.5, -3.0], [0.0, 7.0]], np.float32)))
    scale = store.add("s", DType.F32, np.array([0.25, 8.0], np.float32))
    found = maps.scale_columns(bf16, scale)
    assert w.values(found, store).tolist() == [[0.375, -24.0], [0.0, 56.0]]
    assert not is_bf16(found) and is_bf16(maps.scale_columns(bf16, w.take(bf16, 0)))
    clamped = maps.evaluated(bf16, "clamp", low=-1.0, high=2.0)
    assert w.values(clamped, store).tolist() == [[1.5, -1.0], [0.0, 2.0]]
    assert w.values(maps.evaluated(bf16, "scale", factor=0.5), store).tolist() == [[0.75, -1.5], [0.0, 3.5]]


@pytest.mark.parametrize("factor", [3.0, 0.0, -1.0, 2.0**-140, 2.0**127])
def test_a_factor_that_would_round_is_refused_when_the_bytes_are_made(factor: float) -> None:
    store = DictStore()
    a = store.add("a", DType.F32, np.array([[1.1, 5.1]], np.float32))
    s = store.add("s", DType.F32, np.array([1.0, factor], np.float32))
    with pytest.raises(CompileError, match="a: a factor is no power of two, or the product leaves"):
        w.materialise(maps.scale_columns(a, s), store)


def test_mapped_weights_check_their_operands() -> None:
    a = w.source("a", DType.F32, (2, 3))
    with pytest.raises(IRError, match="scale_columns takes a matrix and its row"):
        maps.scale_columns(a, w.source("s", DType.F32, (2,)))
    with pytest.raises(IRError, match="evaluated stands for scale or clamp, not add"):
        maps.evaluated(a, "add")
    with pytest.raises(IRError, match="evaluated takes numbers"):
        maps.evaluated(w.source("i", DType.I32, (2,)), "clamp")


def test_formats_of_storage() -> None:
    """Equal where joining keeps the storage: the type, and below a decoding its codes, scales and blocks."""
    codes, scale = w.source("c", DType.F8E4M3, (4, 8)), w.source("s", DType.F8E8M0, (1, 1))
    fp8, bf16 = w.decode_fp8(codes, scale, (128, 128)), w.source("b", DType.BF16, (4, 8))
    assert stored_format(bf16) == stored_format(w.cast(fp8, DType.BF16)) == "bf16"
    assert stored_format(fp8) == stored_format(w.concat((fp8, fp8))) == stored_format(w.rows(fp8, 0, 2))
    assert len({stored_format(x) for x in (
        fp8, bf16, w.cast(bf16, DType.F32), w.source("f", DType.F32, (4, 8)),
        w.decode_fp8(codes, w.source("s", DType.F32, (1, 1)), (128, 128)),
    )}) == 5  # fmt: skip


# ------------------------------------------------------------------------------- meaning, by hand


def value(case: Case, **inputs: object) -> dict[str, Any]:
    return case.meaning({k: np.asarray(v) for k, v in inputs.items()})


def test_meaning_of_columns_and_routes() -> None:
    c = Case()
    c.multi("split_columns", c.f32("x", B, T, 4), outs=("a", "b"), widths=(1, 3))
    c.multi("add_route", c.i32("ids", B, T, 2), c.f32("g", B, T, 2), outs=("ids", "g"), expert=7)
    found = value(c, x=[[[1.0, 2.0, 3.0, 4.0]]], ids=[[[3, 0]]], g=[[[0.5, 0.25]]])
    assert found["a"].tolist() == [[[1.0]]] and found["b"].tolist() == [[[2.0, 3.0, 4.0]]]
    assert found["ids"].tolist() == [[[3, 0, 7]]] and found["g"].tolist() == [[[0.5, 0.25, 1.0]]]


def test_meaning_of_norm_rotary() -> None:
    """A quarter turn of the last pair of (3, 0, 4, 0), whose mean square is 25 / 4."""
    c = Case()
    angles = c.f32("cos", B, T, 1), c.f32("sin", B, T, 1)
    c.op("norm_rotary", c.f32("x", B, T, 4), *angles, c.weight_of("w", np.array([1, 1, 2, 5], np.float32)),
         eps=0.0)  # fmt: skip
    found = value(c, x=[[[3.0, 0.0, 4.0, 0.0]]], cos=[[[0.0]]], sin=[[[1.0]]])
    np.testing.assert_allclose(found["norm_rotary"], [[[1.2, 0.0, 0.0, 3.2]]], rtol=1e-12)


def test_meaning_of_entries_close() -> None:
    """One group of two closes at slot 1: equal gates pool to (3, 0), and eps = 11.5 divides it by 4."""
    c = Case()
    kv, ring = c.f32("kv", B, T, 2), c.f32("ring", B, 2, 2)
    angles = [c.f32(a, B, closed_groups(T, 2), 1) for a in ("cos", "sin")]
    c.op("entries_close", c.state("entries", B, CTX // 4, 2), kv, c.b.op("scale", kv, factor=0.0), ring, ring,
         c.weight_of("w", np.array([1, 1], np.float32)), *angles, c.i32("pos", B), c.i32("n", B), ratio=2,
         overlap=False, eps=11.5, out="entries")  # fmt: skip
    found = value(c, kv=[[[2.0, 1.0], [4.0, -1.0], [9.0, 9.0]]], ring=np.zeros((1, 2, 2)), pos=[2], n=[3],
                  cos=[[[0.0], [0.0]]], sin=[[[1.0], [1.0]]], entries=[[[7.0, 7.0]] * 4])  # fmt: skip
    np.testing.assert_allclose(found["entries"], [[[7, 7], [0, 0.75], [7, 7], [7, 7]]], atol=1e-12)


def test_meaning_of_borders() -> None:
    """A projection of zeros: pre = 1/2 + eps, post = 1, and comb, doubly stochastic, mixes evenly."""
    c = Case()
    zeros = [c.weight_of(n, np.zeros(s, np.float32)) for n, s in (("fn", (8, 4)), ("base", 8), ("scale", 3))]
    attrs = {"eps": 0.0, "norm_eps": 1.0, "iters": 2, "out_eps": 0.0}
    x, y = c.f32("x", B, T, 2, 2), c.f32("y", B, T, 2)
    post, comb = c.f32("post", B, T, 2), c.f32("comb", B, T, 2, 2)
    w_ = c.weight_of("w", np.array([1, 10], np.float32))
    outs = ("z", "normed", "post", "comb")
    c.multi("hc_post_pre", x, y, post, comb, *zeros, w_, outs=outs, **attrs)
    found = value(c, x=[[[[1.0, 0.0], [0.0, 2.0]]]], y=[[[10.0, 20.0]]], post=[[[1.0, 0.5]]],
                  comb=[[[[1.0, 2.0], [3.0, 4.0]]]])  # fmt: skip
    z = [[10 + 1, 20 + 3 * 2], [5 + 2, 10 + 4 * 2]]
    np.testing.assert_allclose(found["z"], [[z]], rtol=1e-12)
    collapsed = (np.array(z[0]) + np.array(z[1])) / 2
    norm = collapsed / np.sqrt((collapsed**2).mean())
    np.testing.assert_allclose(found["normed"], [[norm * [1, 10]]], rtol=1e-12)
    np.testing.assert_allclose(found["post"], [[[1, 1]]], rtol=1e-12)
    np.testing.assert_allclose(found["comb"], [[[[0.5, 0.5], [0.5, 0.5]]]], rtol=1e-12)


def test_an_early_reader_keeps_the_border_apart() -> None:
    """The kernel of the whole would run only where the norm stood."""
    c = Case()
    x, w_ = c.f32("x", B, T, 2, 8), c.weight("w", 8)
    parameters = c.weight("fn", 8, 16), c.weight("base", 8), c.weight("scale", 3)
    mix = c.b.multi("hc_mix", x, *parameters, eps=1e-6, norm_eps=1e-6, iters=3)
    collapsed = c.b.op("hc_collapse", x, mix.results[0])
    c.b.loc = "reader"
    c.op("scale", mix.results[1], factor=2.0)
    c.b.loc = "norm"
    c.op("rms_norm", collapsed, w_, eps=1e-6)
    assert notes(c, "fuse_hyper")["kept"] == {"norm": "scale @reader reads a result before the norm"}


def test_the_shared_expert_comes_last_in_the_sum(tiny_model: Module) -> None:
    """Two calls give what they gave, also with experts and shared expert in formats of their own."""
    passes = "fuse_swiglu,fuse_expert_gemms"
    run_pipeline(tiny_model, parse_pipeline(passes))
    inputs = {"tokens": np.arange(12)[None], "n_valid": ints(12), "rows": np.arange(12)[None]}
    before = Evaluator(tiny_model)(inputs, Evaluator(tiny_model).fresh_state(B=1, ctx=16)).outputs
    (refused,) = run_pipeline(tiny_model, parse_pipeline("fold_shared_expert"))
    assert refused.changes == 0, "FP4 experts and an FP8 shared expert have no storage in common yet"
    records = run_pipeline(tiny_model, parse_pipeline("narrow_weights,fold_shared_expert"))
    assert records[-1].changes == 4
    after = Evaluator(tiny_model)(inputs, Evaluator(tiny_model).fresh_state(B=1, ctx=16)).outputs
    np.testing.assert_allclose(after["logits"], before["logits"], rtol=1e-5, atol=1e-5)
