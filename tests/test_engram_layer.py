"""A whole Engram layer of each variant: compiled, against the formulas, however the tokens are cut."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Arr, normal

from dsv4c import api
from dsv4c.errors import ArtifactError, CheckpointError, ConfigError, SessionError, UsageError
from dsv4c.frontend.engram import EngramConfig, Variant
from dsv4c.frontend.engram_generate import PRESETS, generate_engram_layer, main
from dsv4c.frontend.engram_layer import load_engram_layer
from dsv4c.frontend.safetensors import TensorFiles
from dsv4c.frontend.token_map import Overlay
from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator
from dsv4c.runtime.layer import LayerSession

CASES = [("demo", "f32"), ("tk", "bf16"), ("prod", "fp8"), ("prod", "bf16")]
DEAD = 510
"""The image token of the reduced model."""


class Layer:
    """A generated layer: its numbers, its module, its artifact."""

    def __init__(self, root: Path, preset: str, table: str) -> None:
        self.config, self.layer = PRESETS[preset]
        self.directory = generate_engram_layer(root / "layer", self.config, self.layer, seed=3, table=table)
        self.module = load_engram_layer(self.directory)
        self.artifact = api.compile(self.module, output=root / "layer.dsv4", golden=False)
        files = TensorFiles.open(self.directory)
        self.numbers = {
            name: decode(files.read(name), t.dtype).astype(np.float64) for name, t in files.tensors.items()
        }

    def tokens(self, rng: np.random.Generator, *shape: int) -> Arr:
        vocab = self.config.vocab or self.config.compressed_vocab
        found: Arr = rng.integers(0, vocab, shape).astype(np.int32)
        return found

    def streams(self, rng: np.random.Generator, *shape: int) -> Arr:
        return normal(rng, *shape, self.config.streams, self.config.hidden)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    @functools.cache
    def make(preset: str, table: str) -> Layer:
        return Layer(tmp_path_factory.mktemp("engram"), preset, table)

    yield make


# ------------------------------------------------------------------------- the formulas, once more


def formulas(layer: Layer, tokens: Arr, x: Arr) -> Arr:
    """One sequence [T], streams [T,n,d], in float64: sections 4 to 6 over all positions at once."""
    c, w = layer.config, layer.numbers
    prod, demo = c.variant is Variant.PROD, c.variant is Variant.DEMO
    ids = np.array([int(t) if c.vocab == 0 else int(t) % c.compressed_vocab for t in tokens])
    if prod:
        ids = np.where(tokens == DEAD, -1, ids)
    rows, names = [], ("multi_head_embedding.embedding.weight" if demo else "embed.weight", "embed.scale")
    for t in range(len(ids)):
        u = [int(ids[t - i]) if t >= i else c.pad for i in range(c.max_ngram)]
        if prod and -1 in u:
            u = [v if i < u.index(-1) else c.pad for i, v in enumerate(u)]
        h, found = 0, []
        for i, m in enumerate(c.hashes[layer.layer].multipliers):
            h ^= u[i] * m
            found += [h] * (c.heads if i else 0)
        rows.append([h % p + o for h, p, o in zip(found, primes(layer), offsets(layer), strict=True)])
    e = w[names[0]][np.array(rows)]
    if names[1] in w:
        e = e * np.repeat(w[names[1]][np.array(rows)], 32, axis=-1)
    e = e.reshape(len(ids), -1)
    key, value = (demo_projections if demo else projections)(layer, e)
    n, d = x.shape[1:]
    if demo:
        q, k = (np.stack([w[f"{m}.{j}.weight"] for j in range(n)]) for m in ("norm2", "norm1"))
    else:
        q, k = w["q_weight"], w["k_weight"]
    eps = float(np.finfo(np.float32).eps) if demo else 1e-20
    delta = (rms(x, q, eps) * rms(key, k, eps)).sum(-1) / np.sqrt(d)
    root = np.sqrt(np.maximum(np.abs(delta), 1e-6))
    gamma = 1 / (1 + np.exp(-np.where(delta < 0, -root, root)))
    v = np.where((ids < 0)[:, None] & prod, 0, gamma)[..., None] * value[:, None]
    return x + v + (short_conv(layer, v) if demo else 0)


def primes(layer: Layer) -> tuple[int, ...]:
    return layer.config.hashes[layer.layer].primes


def offsets(layer: Layer) -> list[int]:
    return [sum(primes(layer)[:k]) for k in range(len(primes(layer)))]


def rms(a: Arr, w: Arr, eps: float) -> Arr:
    out: Arr = a / np.sqrt((a**2).mean(-1, keepdims=True) + eps) * w
    return out


def projections(layer: Layer, e: Arr) -> tuple[Arr, Arr]:
    w, n, d = layer.numbers["wkv.weight"], layer.config.streams, layer.config.hidden
    if "wkv.scale" in layer.numbers:
        w = w * np.kron(layer.numbers["wkv.scale"], np.ones((32, 32)))
    kv = e @ w.T
    return kv[:, : n * d].reshape(-1, n, d), kv[:, n * d :]


def demo_projections(layer: Layer, e: Arr) -> tuple[Arr, Arr]:
    w, streams = layer.numbers, range(layer.config.streams)
    key = [e @ w[f"key_projs.{j}.weight"].T + w[f"key_projs.{j}.bias"] for j in streams]
    return np.stack(key, axis=1), e @ w["value_proj.weight"].T + w["value_proj.bias"]


def short_conv(layer: Layer, v: Arr) -> Arr:
    w, (_, n, d) = layer.numbers, v.shape
    z = np.concatenate([rms(v[:, j], w[f"short_conv.norms.{j}.weight"], 1e-5) for j in range(n)], axis=1)
    padded = np.concatenate([np.zeros((9, n * d)), z])
    taps = w["short_conv.conv.weight"][:, 0]
    y = sum(taps[:, i] * padded[3 * i : 3 * i + len(z)] for i in range(4))
    out: Arr = (y / (1 + np.exp(-y))).reshape(v.shape)
    return out


def close(found: Arr, want: Arr) -> None:
    worst = np.abs(found - want).max() / np.abs(want).max()
    assert worst <= 2e-6, f"off by {worst:.3g} of the range"


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("preset", "table"), CASES)
def test_the_compiled_layer_is_the_formulas(layers: Any, preset: str, table: str) -> None:
    layer: Layer = layers(preset, table)
    rng = np.random.default_rng(0)
    tokens, x = layer.tokens(rng, 30), layer.streams(rng, 30)
    tokens[11:15] = DEAD if preset == "prod" else tokens[11:15]
    want = formulas(layer, tokens, x.astype(np.float64))
    session = LayerSession(layer.artifact)
    found = session.step(tokens=tokens[None], n_valid=[30], streams=x[None])["streams"]
    close(found[0], want)
    state = Evaluator(layer.module, precision=np.float64).fresh_state(B=1)
    step = Evaluator(layer.module, precision=np.float64)(
        {"tokens": tokens[None], "n_valid": np.array([30]), "streams": x[None]}, state
    )
    np.testing.assert_allclose(step.outputs["streams"][0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("preset", "table"), CASES)
def test_no_cut_changes_a_bit(layers: Any, preset: str, table: str) -> None:
    layer: Layer = layers(preset, table)
    rng = np.random.default_rng(1)
    tokens, x = layer.tokens(rng, 25), layer.streams(rng, 25)
    tokens[9] = DEAD if preset == "prod" else tokens[9]
    session = LayerSession(layer.artifact)
    whole = session.step(tokens=tokens[None], n_valid=[25], streams=x[None])["streams"]
    last = {name: array.copy() for name, array in session.state.items()}
    for cuts in ([1] * 25, [2, 3, 1, 19], [24, 1], [8, 2, 2, 13]):
        session.reset()
        at, pieces = 0, []
        for count in cuts:
            part = slice(at, at + count)
            step = session.step(tokens=tokens[None, part], n_valid=[count], streams=x[None, part])
            pieces.append(step["streams"])
            at += count
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole, err_msg=str(cuts))
        for name, array in last.items():
            np.testing.assert_array_equal(session.state[name], array, err_msg=f"{name} {cuts}")


@pytest.mark.parametrize(("preset", "table"), CASES[:3])
def test_rows_of_a_batch_do_not_see_each_other(layers: Any, preset: str, table: str) -> None:
    """Rows of different lengths, with padding that is no number; a row with nothing new stays as it was."""
    layer: Layer = layers(preset, table)
    rng = np.random.default_rng(2)
    batch, alone = LayerSession(layer.artifact, batch=3), [LayerSession(layer.artifact) for _ in range(3)]
    for counts in ([4, 0, 7], [1, 7, 0], [3, 2, 7]):
        tokens, x = layer.tokens(rng, 3, 7), layer.streams(rng, 3, 7)
        for b, count in enumerate(counts):
            x[b, count:] = np.nan
        found = batch.step(tokens=tokens, n_valid=counts, streams=x)["streams"]
        for b, count in enumerate(counts):
            if count:
                part = {"tokens": tokens[b : b + 1, :count], "streams": x[b : b + 1, :count]}
                want = alone[b].step(n_valid=[count], **part)["streams"]
                np.testing.assert_array_equal(found[b, :count], want[0])
            for name, array in alone[b].state.items():
                np.testing.assert_array_equal(batch.state[name][b], array[0], err_msg=name)


@pytest.mark.parametrize("at", [0, 1, 5, 8])
def test_an_image_span_is_left_alone_and_blocks_the_view(layers: Any, at: int) -> None:
    """Its streams stay bit for bit, and what follows it sees what a start of sequence sees."""
    layer: Layer = layers("prod", "fp8")
    rng = np.random.default_rng(4)
    tokens, x = layer.tokens(rng, 12), layer.streams(rng, 12)
    tokens[tokens == DEAD] = 0
    tokens[at : at + 3] = DEAD
    session = LayerSession(layer.artifact)
    found = session.step(tokens=tokens[None], n_valid=[12], streams=x[None])["streams"][0]
    np.testing.assert_array_equal(found[at : at + 3], x[at : at + 3])
    session.reset()
    after = session.step(tokens=tokens[None, at + 3 :], n_valid=[9 - at], streams=x[None, at + 3 :])
    np.testing.assert_array_equal(found[at + 3 :], after["streams"][0])
    assert (np.abs(found[:at] - x[:at]).max(initial=1) > 1e-3) and (found[at + 3 :] != x[at + 3 :]).any()


def test_a_negative_token_is_dead_as_well(layers: Any) -> None:
    layer: Layer = layers("prod", "fp8")
    rng = np.random.default_rng(5)
    tokens, x = layer.tokens(rng, 1, 6), layer.streams(rng, 1, 6)
    session = LayerSession(layer.artifact)
    found = []
    for mark in (DEAD, -1, -100):
        tokens[0, 2] = mark
        session.reset()
        found.append(session.step(tokens=tokens, n_valid=[6], streams=x)["streams"])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(("preset", "table"), CASES[:3])
def test_every_pass_keeps_the_meaning(layers: Any, preset: str, table: str) -> None:
    module = layers(preset, table).module
    for passes, lookup in ((None, "engram_fetch"), ("without(layout_engram)", "engram_rows")):
        lowered = api.lower(module, passes=passes, verify_passes=True)
        assert {lookup, "engram_gate", "ngram_rows"} <= {op.name for op in lowered.module.ops}


def test_the_table_is_stored_as_it_came(layers: Any, tmp_path: Path) -> None:
    """FP8 rows and their scales, byte for byte; nothing decodes a whole table."""
    layer: Layer = layers("prod", "fp8")
    path = api.compile(layer.module, output=tmp_path / "plain.dsv4", passes="without(layout_engram)")
    artifact = LayerSession(path).artifact
    files = TensorFiles.open(layer.directory)
    for end in ("", ".scale"):
        found = artifact.array(f"layers.3.engram.embed{end}")
        np.testing.assert_array_equal(found, files.read(f"embed{end or '.weight'}"))
    assert artifact.tensors["layers.3.engram.embed"].dtype == "f8e4m3"


# ------------------------------------------------------------------------------------------- errors


def test_a_session_refuses_what_does_not_fit(layers: Any) -> None:
    layer: Layer = layers("tk", "bf16")
    session = LayerSession(layer.artifact, batch=2)
    rng = np.random.default_rng(6)
    good = {"tokens": layer.tokens(rng, 2, 3), "n_valid": [3, 1], "streams": layer.streams(rng, 2, 3)}
    for change, what in (
        ({"streams": layer.streams(rng, 2, 4)}, "streams.*allowed: float32.B, T, 4, 48. with B = 2, T = 3"),
        ({"tokens": np.zeros((2, 3))}, "tokens.*float64"), ({"tokens": np.zeros(3, int)}, "tokens.*int"),
        ({"n_valid": [4, 0]}, "n_valid = .4, 0."), ({"n_valid": [-1, 0]}, "n_valid"), ({"rows": 0}, "rows"),
    ):  # fmt: skip
        with pytest.raises(SessionError, match=what):
            session.step(**{**good, **change})
    with pytest.raises(SessionError, match="'streams' is missing"):
        session.step(tokens=good["tokens"], n_valid=[3, 1])
    assert not any(array.any() for array in session.state.values())
    session.step(**good)
    with pytest.raises(UsageError, match="batch = 0"):
        LayerSession(layer.artifact, batch=0)


def test_a_session_needs_the_names_of_inputs(layers: Any, tmp_path: Path) -> None:
    from dsv4c.runtime.container import ArtifactWriter

    with ArtifactWriter(tmp_path / "x.dsv4") as writer:
        writer.set_meta("tvm", {"weights": []})
    with pytest.raises(ArtifactError, match="does not name its inputs"):
        LayerSession(tmp_path / "x.dsv4")


def written(tmp_path: Path, **change: object) -> Path:
    """A generated TK layer whose config.json was edited; None removes a key."""
    root = tmp_path / "layer"
    generate_engram_layer(root, *PRESETS["tk"], table="f32")
    keys = json.loads((root / "config.json").read_text()) | change
    (root / "config.json").write_text(json.dumps({k: v for k, v in keys.items() if v is not None}))
    return root


@pytest.mark.parametrize(("change", "what"), [
    ({"model_type": "gpt"}, "not an Engram layer"), ({"variant": "v5"}, "variant 'v5'.*demo, tk, prod"),
    ({"heads": None}, "key 'heads' is missing"), ({"colour": 1}, "key 'colour' is unknown"),
    ({"width": "wide"}, "width = 'wide'"), ({"layers": []}, "layers = "), ({"layer": 7}, "layer 7"),
    ({"streams": 0}, "streams = 0"), ({"pad": 100}, "pad class 100"),
])  # fmt: skip
def test_a_configuration_that_is_wrong(tmp_path: Path, change: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_engram_layer(written(tmp_path, **change))


def test_a_table_of_another_hash_is_refused(tmp_path: Path) -> None:
    """A row id beyond the table would read foreign memory."""
    with pytest.raises(CheckpointError, match=r"layers.2.engram: the table is \[8214, 16\]"):
        load_engram_layer(written(tmp_path, table_sizes=[1009, 1100]))


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    config, layer = PRESETS["prod"]
    root = generate_engram_layer(tmp_path / "layer", config, layer)
    keys = json.loads((root / "config.json").read_text()) | {"compressed_vocab": 401}
    (root / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match=r"400 classes of tokens.*401"):
        load_engram_layer(root)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    root = generate_engram_layer(tmp_path / "layer", *PRESETS["prod"])
    keys = json.loads((root / "config.json").read_text()) | {"variant": "demo"}
    (root / "config.json").write_text(json.dumps(keys))
    with pytest.raises(CheckpointError, match=r"Engram demo: no tensor 'short_conv.conv.weight'"):
        load_engram_layer(root)
    (root / "engram_token_map.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_engram_layer(root)


def test_the_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "a"), "--preset", "demo"]) == 0
    assert isinstance(load_engram_layer(tmp_path / "a"), Module)
    config, layer = PRESETS["demo"]
    with pytest.raises(UsageError, match="holds weights already"):
        generate_engram_layer(tmp_path / "a", config, layer, table="f32")
    with pytest.raises(UsageError, match="table 'fp8'"):
        generate_engram_layer(tmp_path / "b", config, layer)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "c"), "--preset", "tk", "--table", "fp8"])
    assert "error: " in capsys.readouterr().err


class RowsOnly:
    """A table that gives rows and nothing else: it would not fit memory."""

    def __init__(self, array: Arr) -> None:
        self.array, self.given = array, 0

    def __getitem__(self, rows: Arr) -> Arr:
        self.given += len(rows)
        found: Arr = self.array[rows]
        return found


def test_the_evaluator_reads_only_the_rows_asked_for(layers: Any) -> None:
    layer: Layer = layers("prod", "fp8")
    assert layer.module.store is not None
    store = Overlay(layer.module.store, {})
    tables = {name: RowsOnly(store.read(name)) for name in ("embed.weight", "embed.scale")}
    store.arrays.update(tables)  # type: ignore[arg-type]
    rng = np.random.default_rng(8)
    inputs = {
        "tokens": layer.tokens(rng, 1, 5),
        "n_valid": np.array([4]),
        "streams": layer.streams(rng, 1, 5),
    }
    found = []
    for given in (layer.module.store, store):
        evaluator = Evaluator(layer.module, given)
        found.append(evaluator(inputs, evaluator.fresh_state(B=1)).outputs["streams"][0, :4])
    np.testing.assert_array_equal(found[0], found[1])
    assert {t.given for t in tables.values()} == {4 * layer.config.columns + 1}  # one more for padding


def test_released_sizes_need_no_table_in_memory() -> None:
    """The configuration of a released model is built in a moment; its types fit int32 rows."""
    config = EngramConfig(Variant.PROD, (1, 14), (16_000_000,) * 3, 8, 256, 5120, 4, 99_092, 2, 129_280)
    assert config.columns == 24 and config.max_ngram == 4 and config.hashes[14].rows < 2**31
    assert DType.F8E4M3.itemsize * config.hashes[1].rows * 256 == 98_305_579_008
