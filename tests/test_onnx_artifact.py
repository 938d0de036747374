"""A whole small model through emit, ArtifactWriter, Artifact.open and OnnxBackend, against the evaluator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_onnx_harness import Arr, Case, DictStore, T, ints, numbers

from dsv4c.errors import ArtifactError, SessionError, ToolchainError
from dsv4c.frontend.architecture import ModelConfig
from dsv4c.frontend.config import parse_config
from dsv4c.frontend.model import build_model
from dsv4c.frontend.table import Role, expected_tensors
from dsv4c.ir.dims import sym
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.weights import WeightExpr, source
from dsv4c.passes.fuse_elementwise import FuseIndexSelect, FuseSwiglu
from dsv4c.passes.fuse_expert_gemms import FuseExpertGemms
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.onnx_backend import OnnxBackend
from dsv4c.targets.onnx.emit import emit_onnx

VOCAB, CONTEXT = 37, 64
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4,
    "num_hash_layers": 1, "num_attention_heads": 2, "head_dim": 24, "qk_rope_head_dim": 8, "q_lora_rank": 16,
    "o_groups": 2, "o_lora_rank": 12, "sliding_window": 5, "compress_ratios": [0, 4, 16, 4],
    "moe_intermediate_size": 16, "n_routed_experts": 6, "num_experts_per_tok": 2, "rope_theta": 10000,
    "swiglu_limit": 2.0, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 3, "hc_mult": 4,
    "hc_sinkhorn_iters": 5, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "compress_rope_theta": 160000,
    "routed_scaling_factor": 1.5, "max_position_embeddings": CONTEXT, "num_nextn_predict_layers": 0,
    "n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "hidden_act": "silu", "norm_topk_prob": True,
    "topk_method": "noaux_tc", "tie_word_embeddings": False, "num_key_value_heads": 1,
    "attention_bias": False,
}  # fmt: skip


def random_weights(config: ModelConfig) -> dict[str, Arr]:
    """float32 tensors of a size that keeps activations near 1, and int32 hash tables of distinct experts."""
    rng, out = np.random.default_rng(5), {}
    for name, spec in expected_tensors(config).items():
        if spec.role is Role.TABLE:
            rows = [rng.permutation(config.n_routed_experts)[: spec.shape[1]] for _ in range(spec.shape[0])]
            out[name] = np.array(rows, np.int32)
        else:
            spread = spec.shape[-1] ** -0.5 if len(spec.shape) == 2 else 1.0
            offset = 1.0 if "norm" in name else 0.0
            spread = 0.1 if offset else spread
            out[name] = (offset + spread * rng.standard_normal(spec.shape)).astype(np.float32)
    return out


def model(config: ModelConfig, tensors: dict[str, Arr]) -> Module:
    def weight_of(name: str) -> WeightExpr:
        array = tensors[name]
        return source(name, DType.F32 if array.dtype == np.float32 else DType.I32, array.shape)

    return build_model(config, weight_of)


class Built:
    """The artifact of the small model and the judge of what it computes."""

    def __init__(self, directory: Path) -> None:
        config = parse_config(dict(CONFIG))
        tensors = random_weights(config)
        self.store, self.path = DictStore(tensors), directory / "m.dsv4"
        self.judge = Evaluator(model(config, tensors), self.store, np.float64)
        lowered = model(config, tensors)
        lowered.level = Level.FUSED
        for one in (FuseSwiglu(), FuseIndexSelect(), FuseExpertGemms()):
            assert one.run(lowered)
        lowered.level = Level.TARGET
        self.progress: list[tuple[str, int, int]] = []
        with ArtifactWriter(self.path) as writer:
            emit_onnx(lowered, self.store, writer, lambda *now: self.progress.append(now))
        self.states = {name: value.type for name, value in lowered.states.items()}

    def fresh(self, batch: int, context: int = CONTEXT) -> dict[str, Arr]:
        env = {"B": batch, "ctx": context}
        return {name: np.zeros(t.concrete(env), t.dtype.storage) for name, t in self.states.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def backend(built: Built) -> OnnxBackend:
    return OnnxBackend(Artifact.open(built.path), threads=1)


def calls(chunks: list[tuple[int, ...]], seed: int = 0) -> Iterator[tuple[Arr, Arr, Arr]]:
    """tokens, n_valid, rows of one call per tuple of row lengths; padding holds other tokens."""
    rng = np.random.default_rng(seed)
    for chunk in chunks:
        n_valid = ints(*chunk)
        tokens = rng.integers(0, VOCAB, (len(chunk), max(1, *chunk))).astype(np.int32)
        yield tokens, n_valid, np.stack([np.maximum(n_valid - 1, 0), n_valid // 2], axis=1).astype(np.int32)


CHUNKS = {
    "one row": [(1,), (1,), (1,), (9,), (1,), (1,), (1,), (1,), (20,), (1,)],
    "three rows": [(5, 3, 1), (1, 1, 1), (0, 16, 7), (1, 0, 1), (17, 2, 3), (1, 1, 1), (1, 1, 1), (4, 0, 12)],
}


@pytest.mark.parametrize("name", CHUNKS)
def test_steps_agree_with_the_meaning(built: Built, backend: OnnxBackend, name: str) -> None:
    batch = len(CHUNKS[name][0])
    state, judged = built.fresh(batch), {k: v.astype(np.float64) for k, v in built.fresh(batch).items()}
    for tokens, n_valid, rows in calls(CHUNKS[name]):
        logits = backend.step(tokens, n_valid, rows, state)
        step = built.judge({"tokens": tokens, "n_valid": n_valid, "rows": rows}, judged)
        judged, expected = step.state, step.outputs["logits"]
        assert logits.shape == expected.shape and logits.dtype == np.float32
        real = n_valid > 0
        assert np.abs(logits - expected)[real].max() < 3e-5 * np.abs(expected[real]).max()
        for key, value in judged.items():
            assert np.abs(state[key] - value).max() < 3e-5 * max(1.0, np.abs(value).max()), key


def test_how_the_text_is_cut_changes_nothing(built: Built, backend: OnnxBackend) -> None:
    tokens = np.random.default_rng(3).integers(0, VOCAB, (1, 41)).astype(np.int32)
    whole = built.fresh(1)
    expected = backend.step(tokens, ints(41), np.arange(41, dtype=np.int32)[None], whole)[0]
    for size in (1, 7, 16):
        state, found = built.fresh(1), []
        for start in range(0, 41, size):
            part = tokens[:, start : start + size]
            found.append(backend.step(part, ints(part.shape[1]), np.arange(part.shape[1])[None], state)[0])
        assert np.abs(np.concatenate(found) - expected).max() < 3e-5 * np.abs(expected).max()
        for key in state:
            top = max(1.0, float(np.abs(whole[key]).max()))
            assert np.abs(state[key] - whole[key]).max() < 3e-5 * top, key


def test_rows_without_tokens_keep_their_state(built: Built, backend: OnnxBackend) -> None:
    state = built.fresh(2)
    for tokens, n_valid, rows in calls([(9, 6)]):
        backend.step(tokens, n_valid, rows, state)
    before = {name: array.copy() for name, array in state.items()}
    backend.step(ints([1, 2, 3], [4, 5, 6]), ints(0, 3), ints([0], [0]), state)
    for name, array in state.items():
        assert np.array_equal(array[0], before[name][0]), name
        assert not name.endswith("window") or not np.array_equal(array[1], before[name][1])


def test_no_logits_may_be_asked_for(built: Built, backend: OnnxBackend) -> None:
    logits = backend.step(ints([1, 2]), ints(2), np.zeros((1, 0), np.int32), built.fresh(1))
    assert logits.shape == (1, 0, VOCAB)


def test_a_context_too_short_for_entries_needs_none(built: Built, backend: OnnxBackend) -> None:
    """Three positions close no group, so entries of capacity 0 are enough."""
    short, usual = built.fresh(2, context=3), built.fresh(2)
    for tokens, n_valid, rows in calls([(2, 1), (1, 1)]):
        expected = backend.step(tokens, n_valid, rows, usual)
        assert np.array_equal(backend.step(tokens, n_valid, rows, short), expected)


def test_only_the_used_part_of_entries_goes_in(built: Built, backend: OnnxBackend) -> None:
    """What lies beyond in a buffer may be anything, even not a number."""
    state, clean = built.fresh(1), built.fresh(1)
    for name, how in Artifact.open(built.path).meta["onnx"]["states"].items():
        if "ratio" in how:
            state[name][:] = np.nan
            state[name][:, 0] = 0
    for tokens, n_valid, rows in calls([(21,), (1,), (30,)]):
        expected = backend.step(tokens, n_valid, rows, clean)
        assert np.array_equal(backend.step(tokens, n_valid, rows, state), expected)


# --------------------------------------------------------------------------------------------- errors


def test_a_full_context_is_refused_before_the_state_changes(built: Built, backend: OnnxBackend) -> None:
    state = built.fresh(1, context=16)
    backend.step(np.ones((1, 15), np.int32), ints(15), ints([0]), state)
    before = {name: array.copy() for name, array in state.items()}
    with pytest.raises(SessionError, match="the context is full"):
        backend.step(np.ones((1, 17), np.int32), ints(17), ints([0]), state)
    assert all(np.array_equal(before[name], array) for name, array in state.items())


@pytest.mark.parametrize(
    ("tokens", "n_valid"), [(np.zeros((1, 0)), ints(0)), (ints([1, 2]), ints(3)), (ints([1]), ints(-1))]
)
def test_sizes_that_do_not_fit_are_refused(
    built: Built, backend: OnnxBackend, tokens: Arr, n_valid: Arr
) -> None:
    with pytest.raises(SessionError, match="allowed"):
        backend.step(tokens, n_valid, ints([0]), built.fresh(1))


def test_a_token_outside_the_vocabulary_is_a_session_error(built: Built, backend: OnnxBackend) -> None:
    state = built.fresh(1)
    with pytest.raises(SessionError, match="refuses the step"):
        backend.step(ints([VOCAB]), ints(1), ints([0]), state)
    assert not state["pos"].any()


def test_without_onnxruntime_the_error_names_it(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ToolchainError, match="pip install onnxruntime"):
        OnnxBackend(Artifact.open(built.path))


def test_an_artifact_without_a_model_is_refused(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "empty.dsv4"):
        pass
    with pytest.raises(ArtifactError, match="holds no ONNX model"):
        OnnxBackend(Artifact.open(tmp_path / "empty.dsv4"))


# --------------------------------------------------------------------------------- the file, its weights


@pytest.mark.parametrize("name", ["x", "spaces and \N{GREEK SMALL LETTER PI}.dsv4", "n" * 255])
def test_an_artifact_may_be_renamed_and_linked(built: Built, tmp_path: Path, name: str) -> None:
    moved, link = tmp_path / "there" / name, tmp_path / "link.dsv4"
    moved.parent.mkdir()
    moved.write_bytes(built.path.read_bytes())
    link.symlink_to(moved)
    for tokens, n_valid, rows in calls([(6,)]):
        expected = OnnxBackend(Artifact.open(built.path), 1).step(tokens, n_valid, rows, built.fresh(1))
        for path in (moved, link, Path(os.path.relpath(moved))):
            found = OnnxBackend(Artifact.open(path), 1).step(tokens, n_valid, rows, built.fresh(1))
            assert np.array_equal(found, expected)


def test_weights_are_stored_once_decoded_and_reported(built: Built) -> None:
    artifact = Artifact.open(built.path, check="full")
    assert {t.dtype for t in artifact.tensors.values()} == {"f32", "i32"}
    assert np.array_equal(artifact.array("embed.weight"), built.store.tensors["embed.weight"])
    w13 = artifact.array("layers.1.ffn.experts.w13")
    assert w13.shape == (6, 32, 32)
    assert np.array_equal(w13[4, :16], built.store.tensors["layers.1.ffn.experts.4.w1.weight"])
    assert built.progress[-1][1:] == (artifact.weight_bytes, artifact.weight_bytes)
    assert [name for name, _, _ in built.progress] == list(artifact.tensors)
    assert len(artifact.section("onnx")) < 2_000_000


def test_the_meta_data_says_how_states_come_back(built: Built) -> None:
    states = Artifact.open(built.path).meta["onnx"]["states"]
    assert set(states) == set(built.states)
    assert states["pos"] == {"output": "pos.after"}
    assert states["layers.1.entries"] == {"output": "layers.1.entries.after", "ratio": 4, "read": "some"}
    assert states["layers.1.index.entries"]["read"] == "all"
    assert states["layers.2.entries"] == {"output": "layers.2.entries.after", "ratio": 16, "read": "all"}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux memory accounts")
def test_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """A session over 64 MiB of weights takes far less memory of its own."""
    case, shape = Case(tmp_path), (4096, 4096)
    store = DictStore({"w": numbers(0, *shape)})
    weight = case.b.weight(source("w", DType.F32, shape), "w")
    case.output(case.b.op("linear", case.f32("x", sym("B"), T, shape[1]), weight))
    x = numbers(1, 1, 1, shape[1])
    expected = x @ store.tensors["w"].T
    before = own_memory()
    case.build(store)
    found = case.onnx({"x": x})["out0"]
    assert own_memory() - before < 24
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def own_memory() -> int:
    """MiB of this process that no file backs."""
    accounts = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in accounts if line.startswith("Anonymous:")) // 1024


def test_the_backend_imports_neither_compiler_nor_onnx() -> None:
    """Nor onnxruntime, before it is needed."""
    code = "import sys, dsv4c.runtime.onnx_backend; print(' '.join(sys.modules))"
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    loaded = set(done.stdout.split())
    assert "dsv4c.runtime.onnx_backend" in loaded
    assert not {m for m in loaded if m.split(".")[0] in ("onnx", "onnx_ir", "onnxruntime", "google")}
    assert not {m for m in loaded if m.startswith(("dsv4c.ir", "dsv4c.targets", "dsv4c.frontend"))}
