"""DeepSeek-V4.1 through the passes that edit checkpoints, and back into files.

The judge of pruning is the unpruned graph with biases of -inf, as in `test_prune_experts`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_export import pruned, raw
from test_model_harness import TOLERANCE, Arr, within
from test_prune_experts import Edited

import dsv4c
from dsv4c import quality
from dsv4c.api import lower
from dsv4c.errors import PassError, UsageError
from dsv4c.frontend.checkpoint import open_checkpoint
from dsv4c.frontend.export import export_checkpoint
from dsv4c.frontend.generate import PRESETS, generate_checkpoint
from dsv4c.frontend.token_map import FILE, read_token_map
from dsv4c.ir.clone import clone
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.text import print_module
from dsv4c.ir.verify import verify
from dsv4c.ir.weights import values
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.passes.instrument import PREFIX
from dsv4c.passes.moe_layers import find_layers
from dsv4c.passes.prune_experts import PruneExperts

E, IMAGE = 8, 510
PROMPT = [5, 17, 99, IMAGE, IMAGE, IMAGE, 3, 44, 45, 46, 47, 7, 8, 9]
LAYER = "layers.2.ffn"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_checkpoint(tmp_path_factory.mktemp("export41") / "checkpoint", "tiny-v41", seed=4)


@pytest.fixture
def module(source: Path) -> Module:
    return dsv4c.load_checkpoint(source)


def logits(module: Module, precision: type = np.float64) -> Arr:
    """Of a text with three image rows, fed in two calls; one token chooses experts as an image does."""
    evaluator = Evaluator(module, precision=precision)
    state, out = evaluator.fresh_state(B=1, ctx=len(PROMPT)), []
    rows = np.random.default_rng(1).standard_normal((1, 3, 128))
    for low, high, first, last in ((0, 5, 0, 2), (5, 14, 2, 3)):
        done = evaluator(
            {"tokens": np.array([PROMPT[low:high]]), "n_valid": np.array([high - low]),
             "rows": np.arange(high - low)[None], "images": rows[:, first:last],
             "n_images": np.array([last - first])},
            state,
        )  # fmt: skip
        state = done.state
        out.append(done.outputs["logits"][0])
    return np.concatenate(out)


def edited(module: Module, tensors: dict[str, Arr]) -> Module:
    assert module.store is not None
    copy = clone(module)
    copy.store = Edited(module.store, tensors)
    return copy


def biases(module: Module, layer: str) -> dict[str, Arr]:
    assert module.store is not None
    names = (f"{layer}.gate.bias", f"{layer}.gate.bias_vl")
    return {name: np.array(module.store.read(name)) for name in names}


def texts(module: Module) -> list[str]:
    return [print_module(m) for m in (module, *module.parts.values())]


# ------------------------------------------------------------------------------------ round trip


def test_files_come_back_byte_for_byte(source: Path, tmp_path: Path) -> None:
    checkpoint, module = open_checkpoint(source), dsv4c.load_checkpoint(source)
    done = export_checkpoint(module, tmp_path / "out", checkpoint)
    found = open_checkpoint(tmp_path / "out")
    assert raw(found) == raw(checkpoint) and found.config == checkpoint.config
    assert found.config.raw == checkpoint.config.raw
    assert not (done.padded or done.widened or done.dropped)
    np.testing.assert_array_equal(read_token_map(tmp_path / "out"), checkpoint.token_map)
    again = dsv4c.load_checkpoint(tmp_path / "out")
    assert texts(again) == texts(module) and "vision" in again.parts
    np.testing.assert_array_equal(logits(again), logits(module))


def test_without_a_source_only_the_drafter_is_gone(source: Path, tmp_path: Path) -> None:
    module = dsv4c.load_checkpoint(source)
    done = export_checkpoint(module, tmp_path / "out")
    before, found = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert done.dropped == list(before.mtp) and not found.mtp and found.config.drafter is None
    assert raw(found).items() <= raw(before).items() and (tmp_path / "out" / FILE).is_file()
    assert found.config.raw["text_config"]["num_nextn_predict_layers"] == 0  # type: ignore[index]
    np.testing.assert_array_equal(logits(dsv4c.load_checkpoint(tmp_path / "out")), logits(module))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_plain_formats_and_the_text_part_alone(tmp_path: Path, dtype: str) -> None:
    """Tables without scales, no image encoder, no image bias in the choice of experts."""
    text = PRESETS["tiny-v41"]["text_config"]
    assert isinstance(text, dict)
    config = {**text, "model_type": "deepseek_v41_text"}
    root = generate_checkpoint(tmp_path / "source", config, dtype=dtype, mtp=0)
    export_checkpoint(dsv4c.load_checkpoint(root), tmp_path / "out")
    want = raw(open_checkpoint(root))
    for name in [n for n in want if n.endswith(".bias_vl")]:  # nothing reads it; the other stands in
        want[name] = want[name.removesuffix("_vl")]
    assert raw(open_checkpoint(tmp_path / "out")) == want
    assert len({len(op.operands) for op in dsv4c.load_checkpoint(root).ops if op.name == "route_topk"}) == 1


def test_a_module_without_its_image_encoder_is_no_checkpoint(module: Module, tmp_path: Path) -> None:
    module.parts.clear()
    with pytest.raises(UsageError, match=r"not those of the configuration: image_start is missing"):
        export_checkpoint(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_text_and_images_choose_as_if_the_others_were_ruled_out(module: Module, scope: str) -> None:
    small = clone(module)
    run_pipeline(small, (PruneExperts("random", keep=0.5, scope=scope, seed=3),))
    tensors = {}
    for note in small.notes["prune_experts"]["layers"]:
        stays = np.isin(np.arange(E), note["kept"])
        assert not stays.all() or scope == "global"
        for name, bias in biases(module, note["layer"]).items():
            tensors[name] = np.where(stays, bias, -np.inf)
    assert len(tensors) == 16 and not small.notes["prune_experts"]["skipped"]
    within(logits(small), logits(edited(module, tensors)), 1e-12)
    assert np.abs(logits(small) - logits(module)).max() > 1e-3


def test_the_bias_of_images_goes_with_its_experts(module: Module) -> None:
    run_pipeline(module, (PruneExperts("random", keep=0.5, seed=3),))
    for layer, note in zip(find_layers(module)[0], module.notes["prune_experts"]["layers"], strict=True):
        text, image = (values(bias, module.store) for bias in layer.biases)  # type: ignore[arg-type]
        want = [b[note["kept"]] for b in biases(module, layer.loc).values()]
        assert np.array_equal([text, image], want) and not np.array_equal(text, image)
        assert [v.producer.loc for v in layer.route.operands if v.producer and v.producer.weight] == [
            f"{layer.loc}.gate.bias", f"{layer.loc}.gate.bias_vl",
        ]  # fmt: skip


def test_an_expert_is_unreachable_when_neither_bias_lets_it(module: Module) -> None:
    both = biases(module, LAYER)
    (text, image) = both
    both[text][[1, 5]], both[image][[1, 6]] = -np.inf, -np.inf
    ruled_out = edited(module, both)
    small = clone(ruled_out)
    run_pipeline(small, (PruneExperts(),))
    kept = {n["layer"]: n["kept"] for n in small.notes["prune_experts"]["layers"]}
    assert kept.pop(LAYER) == [0, 2, 3, 4, 5, 6, 7] and all(ids == list(range(E)) for ids in kept.values())
    within(logits(small), logits(ruled_out), 1e-12)


def test_images_need_experts_too(module: Module) -> None:
    """All that is kept is finite for text, and one of it for images."""
    run_pipeline(clone(module), (PruneExperts("random", keep=0.25, seed=3, layers=LAYER),))
    probe = clone(module)
    run_pipeline(probe, (PruneExperts("random", keep=0.25, seed=3, layers=LAYER),))
    (note,) = probe.notes["prune_experts"]["layers"]
    both = biases(module, LAYER)
    both[f"{LAYER}.gate.bias_vl"][note["kept"][0]] = -np.inf
    with pytest.raises(PassError, match=r"1 experts of layers\.2\.ffn would remain that a bias does"):
        run_pipeline(edited(module, both), (PruneExperts("random", keep=0.25, seed=3, layers=LAYER),))


def test_a_pruned_model_is_a_checkpoint(source: Path, tmp_path: Path) -> None:
    """Layers of different size are padded in both biases; drafter, tables and image encoder stay."""
    module, checkpoint = pruned(dsv4c.load_checkpoint(source)), open_checkpoint(source)
    counts = {layer.loc: layer.count for layer in find_layers(module)[0]}
    done = export_checkpoint(module, tmp_path / "out", checkpoint)
    found = open_checkpoint(tmp_path / "out")
    most = max(counts.values())
    assert done.padded == {loc: most - n for loc, n in counts.items() if n < most} and done.padded
    assert not done.dropped and list(found.mtp) == list(checkpoint.mtp)
    for loc in done.padded:
        for bias in ("bias", "bias_vl"):
            stored = values(found.weight(f"{loc}.gate.{bias}"), found.files)
            assert np.isfinite(stored).tolist() == [e < counts[loc] for e in range(most)]
    text = json.loads((source / "config.json").read_text())
    text["text_config"]["n_routed_experts"] = most
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == text
    before, after = raw(checkpoint), raw(found)
    edited_parts = (".ffn.experts.", ".ffn.gate.")
    untouched = [n for n in before if n.startswith("mtp.") or not any(part in n for part in edited_parts)]
    assert len(untouched) > 200 and all(before[n] == after[n] for n in untouched)
    loaded = dsv4c.load_checkpoint(tmp_path / "out")
    within(logits(loaded), logits(module), 1e-12)
    run_pipeline(loaded, (PruneExperts(),))
    assert {layer.loc: layer.count for layer in find_layers(loaded)[0]} == counts


# ---------------------------------------------------------------------------------- other passes


def test_requantise_takes_the_projection_of_engram_and_leaves_tables(module: Module, tmp_path: Path) -> None:
    before = logits(module)
    run_pipeline(module, parse_pipeline('requantise{experts="int8", linears="int8", shared="int8"}'))
    kv = [op.weight for op in module.weights() if op.loc.endswith(".engram.kv")]
    tables = [op.weight for op in module.weights() if op.loc.endswith(".engram.embed")]
    assert len(kv) == len(tables) == 2 and all(x and x.op == "source" for x in tables)
    stored = {s.dtype for x in kv if x for s in x.sources()}
    assert DType.F8E4M3 in stored and all(x and x.op not in ("decode_fp8", "source") for x in kv)
    classes = {c["class"]: c for c in module.notes["requantise"]["classes"]}
    assert classes["engram"]["format_after"] == "int8" and classes["engram"]["tensors"] == 2
    after = logits(module)
    assert 0 < np.abs(after - before).max() < 0.2 * np.ptp(before)
    done = export_checkpoint(module, tmp_path / "out")
    assert "layers.1.engram.wkv.weight" in done.widened
    within(logits(dsv4c.load_checkpoint(tmp_path / "out"), np.float64), after, 1e-6)
    same = open_checkpoint(tmp_path / "out")
    assert same.stored_dtype("layers.1.engram.embed.weight") is DType.F8E4M3


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of BF16, so that the shared expert is stored as the others are."""
    root = tmp_path_factory.mktemp("plain41") / "checkpoint"
    return generate_checkpoint(root, "tiny-v41", seed=4, dtype="bf16")


@pytest.mark.parametrize("without", ["", "fold_shared_expert", "merge_projections", "layout_engram"])
def test_fused_graphs_mean_the_same(plain: Path, without: str) -> None:
    """Also for image tokens; a table laid out for the disk is evaluated from its weight."""
    module = dsv4c.load_checkpoint(plain)
    lowered = lower(module, passes=f"without({without})" if without else None).module
    within(logits(lowered), logits(module), TOLERANCE)
    names = [op.name for op in lowered.ops]
    assert ("add_route" in names) == (without != "fold_shared_expert")
    assert ("engram_fetch" in names) == (without != "layout_engram")
    merged = [op.loc for op in lowered.ops if op.loc.endswith("merged") and op.name == "linear"]
    assert bool(merged) == (without != "merge_projections")


def test_counters_go_with_the_layers_that_they_count(module: Module) -> None:
    """The encoder half of an instrumented model has no counter of a layer that it leaves out."""
    lowered = lower(module, passes=quality.PASSES).module
    encoder = lowered.parts["encoder"]
    verify(encoder, None)
    counted = {name for name in lowered.states if name.startswith(PREFIX)}
    assert counted == {f"{PREFIX}layers.{i}.ffn" for i in range(8)}
    assert {name for name in encoder.states if name.startswith(PREFIX)} == {
        f"{PREFIX}layers.{i}.ffn" for i in range(4)
    }
    made = {v for op in encoder.ops for v in op.results} | set(encoder.arguments().values())
    assert all(v in made for op in encoder.ops for v in op.operands), "nothing reads a state that is gone"


def test_text_alone_can_be_evaluated_and_measured(module: Module) -> None:
    tokens = [t for t in PROMPT if t != IMAGE]
    found = dsv4c.evaluate(module, [tokens, tokens[::-1]], precision=np.float64)
    assert found.shape == (2, 11, 512) and np.isfinite(found).all()
    small = clone(module)
    run_pipeline(small, (PruneExperts("random", keep=0.5, seed=3, layers=LAYER),))
    errors = {e["layer"]: e["max"] for e in quality.error_by_layer(module, small, np.array(tokens))}
    assert len(errors) == 9 and all(v == 0 for v in list(errors.values())[:2]) and errors["logits"] > 0
