"""Export: what is written loads again as the same model, byte for byte where nothing was cut."""

from __future__ import annotations

import json
import tracemalloc
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_model_harness import ROOT, TINY, Arr, within

import dsv4c
from dsv4c.errors import UsageError
from dsv4c.frontend.checkpoint import Checkpoint, open_checkpoint
from dsv4c.frontend.export import Exported, export_checkpoint
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.frontend.safetensors import INDEX
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module
from dsv4c.ir.weights import TensorStore, values
from dsv4c.passes import run_pipeline
from dsv4c.passes.moe_layers import find_layers
from dsv4c.passes.prune_experts import PruneExperts

KJV = ROOT / "examples" / "kjv" / "checkpoint"
CONFIG = TINY | {"n_routed_experts": 8}
SOURCES: dict[str, dict[str, Any]] = {
    "published": {},
    "published, f32 scales, FP8 experts": {"scale_dtype": "f32", "config": {"moe_intermediate_size": 33}},
    "stacked experts, bf16": {"style": "transformers", "dtype": "bf16"},
    "saved, f16": {"style": "saved", "dtype": "f16"},
    "f32": {"dtype": "f32"},
}


@pytest.fixture(scope="session", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated(tmp_path_factory.mktemp("source"), **SOURCES[request.param])


def generated(root: Path, **options: Any) -> Path:
    config = CONFIG | options.pop("config", {})
    return generate_checkpoint(root / "checkpoint", config, seed=4, **options)


def pruned(module: Module, seed: int = 2) -> Module:
    """Layers of different size."""
    run_pipeline(module, (PruneExperts("random", keep=0.6, scope="global", seed=seed),))
    assert len({layer.count for layer in find_layers(module)[0]}) > 1
    return module


def logits(module: Module) -> Arr:
    vocab = int(module.meta["vocab_size"])  # type: ignore[call-overload]
    return dsv4c.evaluate(module, np.random.default_rng(3).integers(2, vocab, 50), precision=np.float64)


def raw(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    files = checkpoint.files
    return {n: (t.stored, t.shape, files.read(n).tobytes()) for n, t in files.tensors.items()}


# ----------------------------------------------------------------------------------------- the whole model


def test_what_no_pass_touched_comes_back_as_it_was(source: Path, tmp_path: Path) -> None:
    """Every logical value and stored format; published files byte for byte."""
    done = export_checkpoint(dsv4c.load_checkpoint(source), tmp_path / "out")
    a, b = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert a.specs.keys() == b.specs.keys()
    for name in a.specs:
        assert a.stored_dtype(name) is b.stored_dtype(name), name
        np.testing.assert_array_equal(values(a.weight(name), a.files), values(b.weight(name), b.files), name)
    if not any(o.stacked or o.name != name for name, o in a.origins.items()):
        assert raw(a) == raw(b)
    assert a.config.raw == b.config.raw and a.config.raw is not b.config.raw
    assert done.experts == 8 and not (done.padded or done.widened or done.dropped)
    assert done.bytes == sum(t.nbytes for t in b.files.tensors.values())
    assert done.tensors == len(b.files.tensors) and done.shards == 1


def test_the_note_is_json(tmp_path: Path, source: Path) -> None:
    done = export_checkpoint(pruned(dsv4c.load_checkpoint(source)), tmp_path / "out")
    assert json.loads(json.dumps(done.as_json())) == done.as_json()
    assert done.as_json()["directory"] == str(tmp_path / "out") and isinstance(done, Exported)


# -------------------------------------------------------------------------------------------- fewer experts


def test_a_pruned_model_loads_as_what_it_was(source: Path, tmp_path: Path) -> None:
    module = pruned(dsv4c.load_checkpoint(source))
    counts = {layer.loc: layer.count for layer in find_layers(module)[0]}
    most = max(counts.values())
    done = export_checkpoint(module, tmp_path / "out")
    assert done.experts == most < 8 or most == 8
    assert done.padded == {loc: most - n for loc, n in counts.items() if n < most} and done.padded
    loaded = dsv4c.load_checkpoint(tmp_path / "out")
    assert {layer.count for layer in find_layers(loaded)[0]} == {most}
    within(logits(loaded), logits(module), 1e-12)
    run_pipeline(loaded, (PruneExperts(),))  # takes out what no token can choose: the padding
    assert {layer.loc: layer.count for layer in find_layers(loaded)[0]} == counts
    within(logits(loaded), logits(module), 1e-12)


def test_kept_experts_keep_their_bytes(tmp_path: Path) -> None:
    root = generated(tmp_path / "source")
    module = pruned(dsv4c.load_checkpoint(root))
    export_checkpoint(module, tmp_path / "out")
    before, after = (raw(open_checkpoint(p)) for p in (root, tmp_path / "out"))
    for note in module.notes["prune_experts"]["layers"]:
        for new, old in enumerate(note["kept"]):
            for part in ("w1.weight", "w1.scale", "w2.weight", "w2.scale", "w3.weight", "w3.scale"):
                name = f"{note['layer']}.experts.{{}}.{part}"
                assert before[name.format(old)] == after[name.format(new)], name
    assert all(after[n] == t for n, t in before.items() if ".ffn.gate." not in n and ".experts." not in n)


def test_padding_is_zero_and_cannot_be_chosen(source: Path, tmp_path: Path) -> None:
    done = export_checkpoint(pruned(dsv4c.load_checkpoint(source)), tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    for layer, count in done.padded.items():
        real = done.experts - count
        for expert, matrix in product(range(real, done.experts), ("w1", "w2", "w3")):
            name, like = (f"{layer}.experts.{e}.{matrix}.weight" for e in (expert, 0))
            assert not values(found.weight(name), found.files).any()
            assert found.stored_dtype(name) is found.stored_dtype(like)
        assert not values(found.weight(f"{layer}.gate.weight"), found.files)[real:].any()
        if f"{layer}.gate.bias" in found.specs:
            bias = values(found.weight(f"{layer}.gate.bias"), found.files)
            assert (bias[real:] == -np.inf).all() and np.isfinite(bias[:real]).all()
        else:
            assert values(found.weight(f"{layer}.gate.tid2eid"), found.files).max() < real


def test_only_the_number_of_experts_changes_in_the_configuration(tmp_path: Path) -> None:
    module = dsv4c.load_checkpoint(KJV)
    run_pipeline(module, (PruneExperts("random", keep=0.75),))
    done = export_checkpoint(module, tmp_path / "out")
    before, after = (json.loads((p / "config.json").read_text()) for p in (KJV, tmp_path / "out"))
    assert after == before | {"n_routed_experts": 6} and not done.padded
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (KJV / "tokenizer.json").read_bytes()


def test_tables_keep_their_integers(tmp_path: Path) -> None:
    from broken_checkpoints import SINGLE, read, write

    root, name = generated(tmp_path / "source"), "layers.0.ffn.gate.tid2eid"
    content = read(root / SINGLE)
    _, shape, blob = content[name]
    narrow = np.frombuffer(blob, np.int64).astype(np.int32).tobytes()
    for kind, data in (("I64", blob), ("I32", narrow)):
        write(root / SINGLE, content | {name: (kind, shape, data)})
        out = tmp_path / kind
        export_checkpoint(pruned(dsv4c.load_checkpoint(root)), out)
        assert open_checkpoint(out).files.tensors[name].stored == kind


# --------------------------------------------------------------------------------------------------- MTP


def test_mtp_blocks_stay_while_their_experts_fit(tmp_path: Path) -> None:
    root = generated(tmp_path / "source", mtp=1)
    checkpoint, module = open_checkpoint(root), dsv4c.load_checkpoint(root)
    assert not export_checkpoint(module, tmp_path / "same", checkpoint).dropped
    assert raw(open_checkpoint(tmp_path / "same")) == raw(checkpoint)
    run_pipeline(module, (PruneExperts("random", keep=0.5),))
    for case, given in (("fewer experts", checkpoint), ("no source", None)):
        done = export_checkpoint(module, tmp_path / case, given)
        assert done.dropped == list(checkpoint.mtp)
        found = open_checkpoint(tmp_path / case)
        assert not found.mtp and found.config.n_mtp_layers == 0
        assert found.config.compress_ratios == checkpoint.config.compress_ratios
    whole = export_checkpoint(dsv4c.load_checkpoint(root), tmp_path / "without a source")
    assert whole.dropped == list(checkpoint.mtp)


def test_small_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    root = generated(tmp_path / "source")
    (root / "tokenizer_config.json").write_text("{}")
    export_checkpoint(dsv4c.load_checkpoint(root), tmp_path / "out", open_checkpoint(root))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", INDEX, "model-00001-of-00001.safetensors", "tokenizer_config.json",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- files


def test_shards_are_cut_by_size(tmp_path: Path) -> None:
    root = generated(tmp_path / "source")
    done = export_checkpoint(dsv4c.load_checkpoint(root), tmp_path / "out", max_shard=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert done.shards == len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(f.stat().st_size < 100_000 + 20_000 for f in files)
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == done.bytes
    assert raw(open_checkpoint(tmp_path / "out")) == raw(open_checkpoint(root))
    huge = export_checkpoint(dsv4c.load_checkpoint(root), tmp_path / "each", max_shard=1)
    assert huge.shards == huge.tensors, "a tensor that is larger than a file gets its own"


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    module = pruned(dsv4c.load_checkpoint(KJV))
    largest = max(t.nbytes for t in open_checkpoint(KJV).files.tensors.values())
    tracemalloc.start()
    try:
        done = export_checkpoint(module, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * largest < done.bytes / 2, (peak, largest)


def test_an_empty_directory_is_used_a_full_one_refused(tmp_path: Path) -> None:
    module = dsv4c.load_checkpoint(generated(tmp_path / "source"))
    (tmp_path / "out").mkdir()
    export_checkpoint(module, tmp_path / "out")
    for occupied in (tmp_path / "out", tmp_path / "out" / "config.json"):
        before = sorted(p.name for p in tmp_path.rglob("*"))
        with pytest.raises(UsageError, match="exists and is not empty; allowed: a new or an empty directory"):
            export_checkpoint(module, occupied)
        assert sorted(p.name for p in tmp_path.rglob("*")) == before


class Failing:
    """A store that breaks in the middle."""

    def __init__(self, store: TensorStore) -> None:
        self.store = store

    def read(self, name: str) -> Arr:
        if name.startswith("layers.2.attn"):
            raise OSError("the disk is gone")
        return self.store.read(name)


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    module = dsv4c.load_checkpoint(generated(tmp_path / "source"))
    assert module.store is not None
    module.store = Failing(module.store)
    with pytest.raises(UsageError, match="out: cannot be written: the disk is gone"):
        export_checkpoint(module, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# ---------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def module(tmp_path: Path) -> Module:
    return dsv4c.load_checkpoint(generated(tmp_path / "source"))


def refused(module: Module, tmp_path: Path, what: str, source: Checkpoint | None = None) -> None:
    with pytest.raises(UsageError, match=what):
        export_checkpoint(module, tmp_path / "out", source)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_modules_that_are_no_checkpoint(module: Module, tmp_path: Path) -> None:
    store, config = module.store, module.assets["config"]
    module.store = None
    refused(module, tmp_path, "a module with no weights cannot be exported; allowed: level MODEL")
    module.store = store
    del module.assets["config"]
    refused(module, tmp_path, "the module has no configuration; allowed: an asset `config`, or the source")
    module.assets["config"] = config.replace(b'"vocab_size": 61', b'"vocab_size": 60')
    refused(module, tmp_path, r"embed\.weight is \[61, 96\], not \[60, 96\]; .*; head\.weight is \[61, 96\]")
    module.assets["config"] = b"{"
    refused(module, tmp_path, "asset config: not valid JSON")
    run_pipeline(module, dsv4c_passes("fuse_swiglu"))
    refused(module, tmp_path, "a module with level FUSED cannot be exported")


def dsv4c_passes(text: str) -> Any:
    from dsv4c.passes import parse_pipeline

    return parse_pipeline(text)


def test_weights_of_another_configuration(module: Module, tmp_path: Path) -> None:
    other = open_checkpoint(generated(tmp_path / "other", config={"num_hash_layers": 0}))
    what = r"layers\.0\.ffn\.gate\.bias is missing; layers\.0\.ffn\.gate\.tid2eid is no tensor"
    refused(module, tmp_path, what, other)


def test_a_weight_that_a_pass_decoded_is_written_as_float32(module: Module, tmp_path: Path) -> None:
    (weight,) = (op for op in module.weights() if op.loc == "layers.1.attn.wq_a.weight")
    assert weight.weight
    rows = weight.weight.shape[0]
    weight.weight = w.concat((w.rows(weight.weight, 0, 5), w.rows(weight.weight, 5, rows)))
    done = export_checkpoint(module, tmp_path / "out")
    assert done.widened == ["layers.1.attn.wq_a.weight"]
    found = open_checkpoint(tmp_path / "out")
    assert found.stored_dtype("layers.1.attn.wq_a.weight") is DType.F32
    within(logits(dsv4c.load_checkpoint(tmp_path / "out")), logits(module), 1e-12)


def test_a_format_that_no_file_has_is_refused(module: Module, tmp_path: Path) -> None:
    (weight,) = (op for op in module.weights() if op.loc == "norm.weight")
    weight.weight = w.source("norm.weight", DType.F8E4M3FNUZ, (96,))
    refused(module, tmp_path, r"norm\.weight is f8e4m3fnuz; allowed: F32, BF16")
