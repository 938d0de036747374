"""Passes that change storage schemes: reports, statistics, integer products, a real model in each scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Arr, Case, DictStore
from tokenizers import Tokenizer

from dsv4c.api import evaluate, load_checkpoint
from dsv4c.errors import PassError
from dsv4c.ir import weights as w
from dsv4c.ir.clone import clone
from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.encode import encode
from dsv4c.ir.formats import SCHEMES
from dsv4c.ir.graph import Builder, Module
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.packed import packed_form
from dsv4c.ir.types import f32
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.passes.narrow_weights import NarrowWeights
from dsv4c.passes.quantise_activations import QuantiseActivations
from dsv4c.passes.requantise import OPTION_OF, Requantise
from dsv4c.passes.statistics import Statistics
from dsv4c.passes.weight_classes import CLASSES, class_of

KJV = Path(__file__).resolve().parents[1] / "examples" / "kjv"


def everything(scheme: str, **options: Any) -> Requantise:
    return Requantise(**dict.fromkeys(sorted(set(OPTION_OF.values())), scheme), **options)


def classes(module: Module) -> dict[str, dict[str, Any]]:
    return {c["class"]: c for c in module.notes["requantise"]["classes"]}


# ------------------------------------------------------------------------------------- the report


def test_classes_by_location() -> None:
    found = {
        "layers.0.ffn.experts.3.w1.weight": "experts", "layers.0.ffn.experts.w13": "experts",
        "layers.0.ffn.shared_experts.w2.weight": "shared", "layers.0.ffn.gate.weight": "router",
        "layers.1.attn.indexer.wq_b.weight": "indexer", "layers.1.attn.compressor.wkv.weight": "compressor",
        "layers.1.attn.indexer.compressor.wkv.weight": "compressor", "layers.1.attn.wo_a.weight": "attention",
        "layers.1.attn.q_norm.weight": "norms", "layers.1.attn_norm.weight": "norms", "norm.weight": "norms",
        "layers.1.hc_attn_fn": "hyper", "hc_head_base": "hyper", "embed.weight": "embedding",
        "layers.1.engram.kv": "engram", "layers.1.engram.embed": "tables", "layers.1.engram.q_norm": "norms",
        "head.weight": "head", "rope.window": "other", "layers.1.engram.embed.hot": "tables",
            "vision.blocks.0.attn.wo.weight": "vision", "image_start": "vision",
    }  # fmt: skip
    assert {loc: class_of(loc) for loc in found} == found
    assert set(OPTION_OF) < set(CLASSES)


def test_the_published_formats_are_exact_and_reported_so(tiny_model: Module) -> None:
    changed = clone(tiny_model)
    p = Requantise(experts="mxfp8", shared="mxfp8", linears="", samples=3)
    (record,) = run_pipeline(changed, (p,))
    report = classes(changed)
    assert set(report) == {"experts", "shared"} and record.changes > 0
    for name, before in (("experts", "mxfp4"), ("shared", "fp8")):
        facts = report[name]
        assert (facts["format_before"], facts["format_after"]) == (before, "mxfp8")
        assert facts["exact"] and facts["sampled"] == 3
        assert facts["max_abs"] == facts["rel_rms"] == 0.0 and facts["sqnr_db"] is None
        assert facts["bytes_after"] > facts["bytes_before"] > 0
    json.dumps(changed.notes, allow_nan=False)
    tokens = np.arange(12) % 61
    assert np.array_equal(evaluate(changed, tokens, precision=np.float64),
                          evaluate(tiny_model, tokens, precision=np.float64))  # fmt: skip


def test_the_report_counts_matrices_and_bytes() -> None:
    c = Case()
    c.module.level = Level.MODEL
    x = c.f32("x", 3, 64)
    a = c.b.weight(c.store.add("a", DType.F32, np.full((8, 64), 0.3)), "layers.0.attn.wq_a.weight")
    b = c.b.weight(c.store.add("b", DType.BF16, np.full((4, 64), 0x3F80)), "layers.0.attn.wkv.weight")
    c.op("linear", x, a, out="ya")
    c.op("linear", x, b, out="yb")
    c.module.store = c.store
    Requantise(linears="int8", experts="", shared="").run(c.module)
    (facts,) = c.module.notes["requantise"]["classes"]
    error = abs(float(np.float32(0.3) / np.float32(127) * np.float32(127)) - float(np.float32(0.3)))
    assert facts["max_abs"] == pytest.approx(error, abs=3e-8)
    assert {k: facts[k] for k in list(facts)[:8]} == {
        "class": "attention", "format_before": "bf16+f32", "format_after": "int8", "tensors": 2,
        "bytes_before": 8 * 64 * 4 + 4 * 64 * 2, "bytes_after": 12 * 64 + 12 * 4, "exact": False,
        "sampled": 2,
    }  # fmt: skip
    Requantise(linears="bf16", experts="", shared="").run(c.module)
    assert [k["format_after"] for k in c.module.notes["requantise"]["classes"]] == ["int8", "bf16"]


def test_errors_are_those_of_the_matrices(tiny_model: Module) -> None:
    """All matrices of one class, sampled and by hand."""
    changed = clone(tiny_model)
    Requantise(shared="int4", experts="", linears="", samples=1000).run(changed)
    noise = signal = largest = 0.0
    for old, new in zip(tiny_model.weights(), changed.weights(), strict=True):
        if class_of(old.loc) == "shared":
            assert old.weight and new.weight and tiny_model.store
            was = w.values(old.weight, tiny_model.store).astype(np.float64)
            change = w.values(new.weight, tiny_model.store) - was
            noise, signal = noise + np.square(change).sum(), signal + np.square(was).sum()
            largest = max(largest, np.abs(change).max())
        else:
            assert old.weight is new.weight, old.loc
    facts = classes(changed)["shared"]
    assert facts["sampled"] == facts["tensors"] and not facts["exact"]
    assert facts["max_abs"] == pytest.approx(largest)
    assert facts["rel_rms"] == pytest.approx((noise / signal) ** 0.5)
    assert facts["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise))


def test_without_samples_or_weights_nothing_is_measured(tiny_model: Module) -> None:
    bare = clone(tiny_model)
    bare.store = None
    for module, samples in ((tiny_model, 0), (bare, 4)):
        everything("int8", samples=samples).run(module)
        assert all(c["sampled"] == 0 and c["max_abs"] is None for c in classes(module).values())


def test_a_pass_reads_no_more_than_its_samples(tiny_model: Module) -> None:
    assert tiny_model.store is not None
    read: list[str] = []

    class Spy:
        base = tiny_model.store

        def read(self, name: str) -> Arr:
            read.append(name)
            return self.base.read(name)

    tiny_model.store = Spy()
    everything("int4", samples=1).run(tiny_model)
    assert len(set(read)) <= 2 * len(classes(tiny_model))  # one matrix of each class: codes and scales


def test_a_sample_of_a_tall_matrix_takes_its_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4c.passes import requantise

    monkeypatch.setattr(requantise, "MOST_ROWS", 128)
    c = Case()
    x, table = c.f32("x", 3, 32), np.zeros((300, 32), np.float32)
    table[:128], table[128:] = 1.0, 0.3  # what would be off lies beyond
    c.op("linear", x, c.b.weight(c.store.add("head", DType.F32, table), "head.weight"))
    c.module.store = c.store
    Requantise(head="fp8", experts="", linears="", shared="").run(c.module)
    assert c.module.notes["requantise"]["classes"][0]["max_abs"] == 0.0


def test_effects_are_declared() -> None:
    assert Requantise().effect().changes == ("*",) and Requantise().effect().measure
    assert not everything("").effect().changes and QuantiseActivations().effect().changes == ("*",)
    assert parse_pipeline(str(everything("int8", search=True))) == (everything("int8", search=True),)


# ------------------------------------------------------------------------- both levels, and storage


@pytest.mark.parametrize("scheme", ["int8", "mxfp8", "nvfp4"])
def test_model_and_fused_level_store_the_same(scheme: str, tiny_model: Module) -> None:
    """Before or after the experts are stacked: the same numbers, and every matrix stays packed."""
    fuse = "merge_common_subexpressions,fuse_swiglu,fuse_index_select,fuse_expert_gemms"
    text = str(everything(scheme, samples=0))
    early, late = clone(tiny_model), clone(tiny_model)
    run_pipeline(early, parse_pipeline(f'{text},{fuse},narrow_weights{{storage="packed"}}'))
    run_pipeline(late, parse_pipeline(f'{fuse},{text},narrow_weights{{storage="packed"}}'))
    kept = 0
    for a, b in zip(early.weights(), late.weights(), strict=True):
        assert a.weight and b.weight and a.weight.same(b.weight), a.loc
        held = packed_form(a.weight)
        kept += held is not None
        if held:
            assert held.scheme is SCHEMES[scheme] and class_of(a.loc) in OPTION_OF
    assert kept > 10
    tokens = np.arange(9)
    narrow = clone(late)
    run_pipeline(narrow, (NarrowWeights("auto"),))
    assert np.array_equal(evaluate(narrow, tokens), evaluate(late, tokens))


# ------------------------------------------------------------------------------------- statistics


def searched(
    tmp_path: Path, extra: dict[str, Arr], loc: str = "layers.0.attn.wq_a.weight"
) -> tuple[Module, Arr]:
    """One linear of an outlier column, requantised with statistics; (module, its new weight)."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((16, 64)).astype(np.float32)
    table[:, 5] *= 20
    store = DictStore()
    module = Module("m", store=store)
    b = Builder(module)
    x = b.input("x", f32(3, 64))
    weight = b.weight(store.add("a", DType.F32, table), loc)
    module.outputs["y"] = b.op("linear", x, weight)
    path = tmp_path / "statistics.npz"
    Statistics("model", 61, 100, {}, extra).save(path)
    run_pipeline(module, (Requantise("int4_g64", linears="int4_g64", search=True, stats=str(path)),))
    (op,) = module.weights()
    assert op.weight is not None and module.store is not None
    return module, w.values(op.weight, module.store) - table


def test_statistics_weigh_the_columns(tmp_path: Path) -> None:
    """An outlier column that inputs never use may be clipped, which helps all the others."""
    seen = np.ones(64)
    seen[5] = 0
    _, blind = searched(tmp_path, {})
    module, used = searched(tmp_path, {"mean_square.layers.0.attn.wq_a.weight": seen})
    others = np.arange(64) != 5
    assert np.square(used[:, others]).sum() < 0.5 * np.square(blind[:, others]).sum()
    assert np.square(used[:, 5]).sum() > np.square(blind[:, 5]).sum()
    assert "mean_square.layers.0.attn.wq_a.weight" in {
        str(s.attr("name")) for op in module.weights() if op.weight for s in op.weight.sources()
    }
    assert np.array_equal(blind, searched(tmp_path, {"mean_square.of_another": seen})[1])


def test_experts_share_what_their_layer_is_fed(tmp_path: Path) -> None:
    seen = np.ones(64)
    seen[5] = 0
    stars = {"mean_square.layers.0.ffn.experts.*.w1.weight": seen}
    loc = "layers.0.ffn.experts.11.w1.weight"
    own = searched(tmp_path, {f"mean_square.{loc}": seen, **stars}, loc)[1]
    assert np.array_equal(searched(tmp_path, stars, loc)[1], own)
    assert not np.array_equal(searched(tmp_path, {}, loc)[1], own)


@pytest.mark.parametrize("bad", [np.ones(63), np.full(64, -1.0), np.full(64, np.nan), np.ones((1, 64))])
def test_statistics_that_do_not_fit_are_refused(bad: Arr, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"mean_square\.layers\.0.* is float64.*64 finite numbers"):
        searched(tmp_path, {"mean_square.layers.0.attn.wq_a.weight": bad})


def test_a_search_lowers_the_reported_error(tiny_model: Module) -> None:
    plain, found = clone(tiny_model), clone(tiny_model)
    everything("int4").run(plain)
    everything("int4", search=True).run(found)
    for kind, facts in classes(plain).items():
        assert classes(found)[kind]["rel_rms"] < facts["rel_rms"]


# ------------------------------------------------------------------------------- integer products


def integer_linear(x: Arr, table: Arr) -> tuple[Arr, Arr]:
    """What W8A8 hardware computes, (result, bound of rounding): int32 dot products, then two scales."""
    xs, ws = encode(x, SCHEMES["int8"]), encode(table, SCHEMES["int8"])
    dots = xs.codes.astype(np.int32) @ ws.codes.astype(np.int32).T
    assert np.abs(xs.codes.astype(np.int64) @ ws.codes.T.astype(np.int64)).max() < 2**31
    scales = decode(xs.scales, DType.F32).astype(np.float64) * ws.scales.astype(np.float64).T
    absolute = np.abs(xs.codes.astype(np.int64)) @ np.abs(ws.codes.T.astype(np.int64))
    return dots * scales, absolute * scales * 2.0**-22


def w8a8(x: Arr, table: Arr) -> Arr:
    store = DictStore()
    module = Module("w8a8", store=store)
    b = Builder(module)
    value = b.input("x", f32(*x.shape))
    weight = b.weight(store.add("a", DType.F32, table), "layers.0.attn.wq_a.weight")
    module.outputs["y"] = b.op("linear", value, weight)
    text = 'requantise{linears = "int8", experts = "", shared = ""},quantise_activations'
    records = run_pipeline(module, parse_pipeline(text))
    assert [r.changes for r in records] == [1, 1]
    assert module.notes["quantise_activations"] == {"linears": 1, "roundings": 1}
    return Evaluator(module, precision=np.float64)({"x": x}, {}).outputs["y"]


def test_w8a8_is_an_integer_product_times_two_scales() -> None:
    rng = np.random.default_rng(8)
    x, table = rng.standard_normal((7, 4096)).astype(np.float32), rng.standard_normal((33, 4096))
    found = w8a8(x, table.astype(np.float32))
    want, rounding = integer_linear(x, table.astype(np.float32))
    assert (np.abs(found - want) <= rounding).all()
    exact = x.astype(np.float64) @ table.T
    assert np.abs(found - exact).max() > 10 * rounding.max(), "the rounding to int8 is there"


def test_w8a8_with_power_of_two_scales_is_the_integer_product_to_the_bit() -> None:
    rng = np.random.default_rng(9)
    x = rng.integers(-126, 127, (5, 512)).astype(np.float32)
    table = rng.integers(-126, 127, (9, 512)).astype(np.float32)
    x[:, 0], table[:, 0] = 127, -127
    x *= np.exp2(rng.integers(-5, 5, (5, 1))).astype(np.float32)
    table *= np.exp2(rng.integers(-5, 5, (9, 1))).astype(np.float32)
    noise = rng.uniform(-0.4, 0.4, x.shape).astype(np.float32) * (x[:, :1] / 127)
    noise[:, 0] = 0
    want, _ = integer_linear(x + noise, table)
    assert np.array_equal(w8a8(x + noise, table), want)


# ----------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def kjv() -> tuple[Module, Arr, Arr]:
    """(model, tokens of its held-out text, their logits in float32)"""
    module = load_checkpoint(KJV / "checkpoint")
    tokenizer = Tokenizer.from_file(str(KJV / "checkpoint" / "tokenizer.json"))
    text = (KJV / "heldout.txt").read_text(encoding="utf-8")[:2000]
    tokens = np.array([0, *tokenizer.encode(text, add_special_tokens=False).ids][:48])
    return module, tokens, evaluate(module, tokens)


BOUNDS = {
    "f32": 0.0, "bf16": 0.0, "fp8": 0.03, "mxfp8": 0.03, "fp8_fnuz": 0.03, "fp8_f32": 0.05, "int8": 0.015,
    "int4": 0.13, "int4_g64": 0.14, "int4_g128": 0.15, "nvfp4": 0.15, "mxfp4": 0.17,
}  # fmt: skip
"""Scheme of every matrix -> allowed change of the logits, root mean square relative to theirs."""


def test_fp16_holds_a_real_model_but_for_tiny_numbers(kjv: tuple[Module, Arr, Arr]) -> None:
    """BF16 numbers below 2^-14 lose bits, which is measured; nothing is called exact that is only so here."""
    module, tokens, want = kjv
    changed = clone(module)
    run_pipeline(changed, (everything("fp16"),))
    found, report = evaluate(changed, tokens), classes(changed)
    assert {facts["format_after"] for facts in report.values()} == {"f16"}
    assert 0 < np.abs(found - want).max() < 1e-5 * np.abs(want).max()
    assert not any(facts["exact"] for facts in report.values())
    assert report["head"]["sqnr_db"] > 120 and report["experts"]["rel_rms"] == 0
    assert BOUNDS.keys() == SCHEMES.keys() - {"fp16"}  # those of the next test


@pytest.mark.parametrize("scheme", BOUNDS)
def test_a_real_model_in_every_scheme(scheme: str, kjv: tuple[Module, Arr, Arr]) -> None:
    module, tokens, want = kjv
    changed = clone(module)
    run_pipeline(changed, (everything(scheme),))
    found = evaluate(changed, tokens)
    error = float(np.sqrt(np.mean(np.square(found - want)) / np.mean(np.square(want))))
    report = classes(changed)
    print(f"{scheme}: {error:.4f} of the logits; {({k: c['sqnr_db'] for k, c in report.items()})}")
    assert error <= BOUNDS[scheme]
    if BOUNDS[scheme] == 0:
        assert np.array_equal(found, want) and all(c["exact"] for c in report.values())
    else:
        assert error > BOUNDS[scheme] / 20
        for facts in report.values():
            lossless = facts["exact"]
            assert (facts["rel_rms"] == 0) == lossless, facts
            assert lossless or facts["sqnr_db"] > (40 if scheme == "int8" else 29 if "fp8" in scheme else 17)
    if scheme in ("mxfp8", "fp8", "fp8_fnuz"):
        assert all(report[k]["exact"] for k in ("experts", "attention", "shared"))


def test_lossless_schemes_change_no_logit(kjv: tuple[Module, Arr, Arr]) -> None:
    """FP4 to FP8 (section 2.1), FP8 to MXFP8 and to FNUZ: every logit the same, to the bit."""
    module, tokens, want = kjv
    for experts, others in (("fp8", "mxfp8"), ("fp8_fnuz", "fp8_fnuz"), ("mxfp8", "fp8_f32")):
        changed = clone(module)
        p = Requantise(experts=experts, shared=others, linears="", samples=0)
        run_pipeline(changed, (p,))
        assert all(c["exact"] for c in classes(changed).values())
        assert np.array_equal(evaluate(changed, tokens), want)


def test_w8a8_of_a_real_model(kjv: tuple[Module, Arr, Arr]) -> None:
    module, tokens, want = kjv
    changed = clone(module)
    text = 'requantise{linears="int8", shared="int8", head="int8", experts=""},quantise_activations'
    run_pipeline(changed, parse_pipeline(text))
    found = evaluate(changed, tokens)
    error = float(np.sqrt(np.mean(np.square(found - want)) / np.mean(np.square(want))))
    notes = changed.notes["quantise_activations"]
    assert notes["roundings"] < notes["linears"] == 40
    assert 1e-3 < error < 0.03
