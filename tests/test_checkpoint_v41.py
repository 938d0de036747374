"""Checkpoints of DeepSeek-V4.1: what opens, what the tensors mean, and which damage is refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from broken_checkpoints import INDEX, SINGLE, Case, Tensors, drop, poke, put, read, tensors, write
from test_model_harness import stored

from dsv4c.errors import CheckpointError, ConfigError, Dsv4cError
from dsv4c.frontend.architecture import Generation
from dsv4c.frontend.checkpoint import Checkpoint, open_checkpoint
from dsv4c.frontend.naming import resolve
from dsv4c.frontend.table import Role, expected_tensors, ledger
from dsv4c.frontend.token_map import FILE
from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.weights import materialise, values

GOLDEN = Path(__file__).parent / "data" / "golden" / "v41"
ROWS = "layers.1.engram.embed.weight"


@pytest.fixture(scope="module")
def golden() -> Checkpoint:
    return open_checkpoint(GOLDEN)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in one file, without an index; read only."""
    root = tmp_path_factory.mktemp("v41") / "single"
    root.mkdir()
    content: Tensors = {}
    for shard in sorted(GOLDEN.glob("model-*.safetensors")):
        content |= read(shard)
    write(root / SINGLE, content)
    for name in ("config.json", FILE):
        shutil.copy(GOLDEN / name, root)
    return root


@pytest.fixture
def copied(single: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(single, tmp_path / "checkpoint"))


def edit(root: Path, change: Callable[[Tensors], object]) -> Path:
    tensors(change)(root)
    return root


def rename(root: Path, spell: Callable[[str], str]) -> Path:
    content = {spell(name): tensor for name, tensor in read(root / SINGLE).items()}
    write(root / SINGLE, content)
    return root


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert a.specs == b.specs
    for name in a.specs:
        x, y = (values(c.weight(name), c.files) for c in (a, b))
        assert x.dtype == y.dtype and np.array_equal(x, y), name


# ---------------------------------------------------------------------------------- accepted


def test_every_tensor_is_accounted_for(golden: Checkpoint) -> None:
    """The table, its scales and the files name the same tensors, of the same size."""
    index = json.loads((GOLDEN / INDEX).read_text())["weight_map"]
    assert {origin.name for origin in golden.origins.values()} == set(index)
    tensors_, size = ledger(golden.config)
    assert tensors_ == len(index) == len(golden.files.tensors)
    assert size == sum(raw.nbytes for raw in golden.files.tensors.values())
    for name, spec in golden.specs.items():
        found = materialise(golden.weight(name), golden.files)
        assert found.shape == spec.shape, name


def test_one_file_holds_the_same(golden: Checkpoint, single: Path) -> None:
    assert_same(open_checkpoint(single), golden)


def test_tiles_are_32_wide(golden: Checkpoint) -> None:
    name = "layers.0.attn.wq_b.weight"
    x = golden.weight(name)
    assert x.op == "decode_fp8" and golden.stored_dtype(name) is DType.F8E4M3
    codes, scale = (golden.files.read(n) for n in (name, "layers.0.attn.wq_b.scale"))
    assert codes.shape == (256, 64) and scale.shape == (8, 2)
    tile = np.repeat(np.repeat(decode(scale, DType.F8E8M0), 32, 0), 32, 1)
    assert np.array_equal(values(x, golden.files), decode(codes, DType.F8E4M3) * tile)


def test_engram_rows_stay_codes(golden: Checkpoint) -> None:
    table, scale = golden.weight(ROWS), golden.scale(ROWS)
    assert table.op == "source" and (table.dtype, table.shape) == (DType.F8E4M3, (6126, 32))
    assert scale is not None and scale.op == "source"
    assert (scale.dtype, scale.shape) == (DType.F8E8M0, (6126, 1))
    assert golden.scale("embed.weight") is None
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.0\.engram\.embed\.weight'"):
        golden.scale("layers.0.engram.embed.weight")


def test_engram_weights(golden: Checkpoint) -> None:
    w = golden.engram_weights(3)
    assert w.table.shape == (6332, 32) and w.scales is not None and w.scales.shape == (6332, 1)
    assert np.array_equal(
        values(w.kv, golden.files), values(golden.weight("layers.3.engram.wkv.weight"), golden.files)
    )
    assert w.kv.shape == (640, 192) and w.q_norm.shape == w.k_norm.shape == (4, 128)
    assert (w.bias, w.conv, w.conv_norm) == (None,) * 3
    assert not np.array_equal(values(w.q_norm, golden.files), values(w.k_norm, golden.files))
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.2\.engram\.wkv\.weight'"):
        golden.engram_weights(2)


def test_hash_is_the_golden_one(golden: Checkpoint) -> None:
    """With the constants that evaluators of their own have found (spec_v41, section 11)."""
    expected = stored("golden/v41/golden.npz")
    for row, layer in enumerate(golden.engram.layers):
        found = golden.engram.hashes[layer]
        assert found.multipliers == tuple(expected["engram.multipliers"][row])
        assert found.primes == tuple(expected["engram.primes"][row].reshape(-1))


def test_mixed_formats(copied: Path, golden: Checkpoint) -> None:
    """A plain table of Engram, plain experts, and E8M0 scales in a U8 container."""

    def change(t: Tensors) -> None:
        for name in (ROWS, "mtp.0.ffn.experts.1.w2.weight"):
            x = values(golden.weight(name), golden.files).astype(np.float32)
            t[name] = ("F32", list(x.shape), x.tobytes())
            del t[name.replace(".weight", ".scale")]
        for name, (dtype, shape, blob) in list(t.items()):
            if dtype == "F8_E8M0":
                t[name] = ("U8", shape, blob)

    c = open_checkpoint(edit(copied, change))
    assert c.weight(ROWS).dtype is DType.F32 and c.engram_weights(1).scales is None
    scale = c.scale("layers.3.engram.embed.weight")
    assert scale is not None and scale.dtype is DType.F8E8M0
    other = "layers.5.attn.wo_b.weight"
    assert np.array_equal(values(c.weight(other), c.files), values(golden.weight(other), golden.files))


def test_drafter_is_optional_as_a_whole(copied: Path, golden: Checkpoint) -> None:
    assert len(golden.mtp) == 74 and golden.mtp["mtp.0.main_proj.weight"].shape == (128, 256)
    names = [name for name in read(copied / SINGLE) if name.startswith("mtp.")]
    drop(*names)(copied)
    assert open_checkpoint(copied).mtp == {}


def test_without_vision(copied: Path) -> None:
    raw = json.loads((copied / "config.json").read_text())
    text = {**raw["text_config"], "quantization_config": raw["quantization_config"]}
    (copied / "config.json").write_text(json.dumps(text))
    names = [n for n in read(copied / SINGLE) if n.startswith(("vision.", "aligner.", "image_"))]
    assert len(names) == 26
    drop(*names)(copied)
    assert open_checkpoint(copied).engram.dead_token == -1


# ------------------------------------------------------------------------------------- names


def module_names(name: str) -> str:
    """What the conversion script takes: modules of a framework, and its names of scales and biases."""
    if not name.startswith("vision."):
        name = name.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
    name = name.replace(".scale", ".weight_scale_inv")
    if name.endswith("gate.bias"):
        name = name.removesuffix("bias") + "e_score_correction_bias"
    return f"model.{name}"


@pytest.mark.parametrize("spell", [module_names, lambda name: f"model.{name}"], ids=["modules", "model"])
def test_other_spellings(copied: Path, golden: Checkpoint, spell: Callable[[str], str]) -> None:
    assert_same(open_checkpoint(rename(copied, spell)), golden)


def test_copies_of_the_embedding_in_the_drafter_are_ignored(copied: Path, golden: Checkpoint) -> None:
    def change(t: Tensors) -> None:
        t["mtp.0.embed.weight"], t["mtp.1.head.weight"] = t["embed.weight"], t["head.weight"]

    assert open_checkpoint(edit(copied, change)).specs == golden.specs


def test_published_names_resolve_to_themselves(golden: Checkpoint) -> None:
    names = list(expected_tensors(golden.config))
    found, unknown = resolve(names, 8, Generation.V41)
    assert list(found) == names and not unknown


@pytest.mark.parametrize(
    "name",
    [
        "image_start", "vision.norm.weight", "vision.blocks.0.attn.wo.bias", "aligner.w1.weight",
        "layers.1.engram.embed.weight", "layers.2.attn.indexer.wk.weight", "layers.0.ffn.gate.bias_vl",
        "mtp.0.main_proj.weight", "mtp.2.markov_head.embed.weight",
    ],
)  # fmt: skip
def test_names_only_v41_knows(name: str) -> None:
    assert resolve([name], 8) == ({}, [name])
    found, unknown = resolve([name], 8, Generation.V41)
    assert list(found) == [name] and not unknown


@pytest.mark.parametrize(
    "name",
    [
        "vision.blocks.0.ffn.w1.weight", "vision.blocks.0.self_attn.wo.weight",
        "vision.blocks.0.norm3.weight", "layers.0.attn.norm.weight",
        "layers.0.self_attn.q_a_proj.weight", "image_middle",
        "layers.0.mlp.experts.gate_up_proj", "layers.00.attn_norm.weight", "aligner.w3.bias",
    ],
)  # fmt: skip
def test_names_v41_does_not_know(name: str) -> None:
    assert resolve([name], 8, Generation.V41) == ({}, [name])


# --------------------------------------------------------------------------------- token map


def test_token_map_from_its_file(golden: Checkpoint) -> None:
    assert golden.token_map.dtype == np.int32
    assert np.array_equal(golden.token_map, np.arange(512) % 400)
    assert np.array_equal(values(golden.token_map_weight, golden.store), golden.token_map)
    assert np.array_equal(golden.store.read("norm.weight"), golden.files.read("norm.weight"))
    assert (golden.engram.pad, golden.engram.vocab, golden.engram.dead_token) == (2, 512, 510)


def test_pad_becomes_a_class(copied: Path) -> None:
    table = (np.arange(512) + 100) % 400
    write(copied / FILE, {"map": ("I64", [512], table.astype(np.int64).tobytes())})
    assert open_checkpoint(copied).engram.pad == 102


def test_token_map_is_read_when_it_is_needed(copied: Path) -> None:
    (copied / FILE).unlink()
    c = open_checkpoint(copied)
    for need in ("token_map", "engram", "store", "token_map_weight"):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json or engram_token_map"):
            getattr(c, need)


def test_token_map_of_another_tokenizer(copied: Path) -> None:
    write(copied / FILE, {"map": ("I64", [512], (np.arange(512) % 399).astype(np.int64).tobytes())})
    with pytest.raises(ConfigError, match=r"399 classes.*allowed: 400"):
        _ = open_checkpoint(copied).store


def test_a_model_without_engram_needs_no_map(tiny_directory: Path) -> None:
    c = open_checkpoint(tiny_directory)
    assert c.store is c.files
    with pytest.raises(ConfigError, match="no Engram"):
        _ = c.token_map


# ----------------------------------------------------------------------------------- refused

SCALE, WKV = "layers.1.engram.embed.scale", "layers.3.engram.wkv.weight"
VL, DRAFT = "layers.4.ffn.gate.bias_vl", "mtp.1.ffn.gate.bias"
NAN, F32 = np.uint16(0x7FC0), np.float32


def _all_vision(t: Tensors) -> None:
    for name in [n for n in t if n.startswith(("vision.", "aligner."))]:
        del t[name]


def _last(name: str, byte: int) -> Callable[[Path], None]:
    """Overwrite the last byte of a tensor."""

    def damage(root: Path) -> None:
        size = len(read(root / SINGLE)[name][2])
        poke(name, np.uint8(byte), size - 1)(root)  # type: ignore[arg-type]

    return damage


BROKEN: dict[str, Case] = {
    "vision missing": Case(drop("vision.norm.weight"), ("vision.norm.weight is missing", "[64]")),
    "all of vision missing": Case(tensors(_all_vision), ("23 tensors", "vision.patch_embed", "missing")),
    "image row missing": Case(drop("image_end"), ("image_end is missing", "[128]")),
    "bias_vl missing": Case(drop(VL), (f"{VL} is missing", "[8]")),
    "table missing": Case(drop(ROWS), (f"{ROWS} is missing", "[6126, 32]")),
    "table scale missing": Case(drop(SCALE), (f"{SCALE} is missing", "f8e8m0 [6126, 1]")),
    "drafter in part": Case(drop("mtp.1.norm.weight"), ("mtp.1.norm.weight is missing",)),
    "main_proj missing": Case(drop("mtp.0.main_proj.weight"), ("main_proj.weight is missing", "[128, 256]")),
    "index key missing": Case(drop("layers.4.attn.indexer.wk.weight"), ("indexer.wk.weight is missing",)),
    "unknown": Case(put("layers.0.attn.foo", "F32", [1], 4), ("foo is not a name of a DeepSeek-V4.1",)),
    "ape of v4": Case(put("layers.2.attn.compressor.ape", "F32", [2, 64], 4), ("ape has no use",)),
    "head mixes of v4": Case(put("hc_head_fn", "F32", [4, 512], 4), ("hc_head_fn has no use",)),
    "gate of ratio 1": Case(
        put("layers.4.attn.compressor.wgate.weight", "BF16", [64, 128], 2), ("wgate.weight has no use",)
    ),
    "engram elsewhere": Case(put("layers.2.engram.q_weight", "BF16", [4, 128], 2), ("has no use",)),
    "vision block too many": Case(put("vision.blocks.2.norm1.weight", "BF16", [64], 2), ("has no use",)),
    "norm in the first draft layer": Case(put("mtp.0.norm.weight", "BF16", [128], 2), ("has no use",)),
    "table of other rows": Case(put(ROWS, "F8_E4M3", [6127, 32], 1), ("F8_E4M3[6127, 32]", "[6126, 32]")),
    "table in integers": Case(put(ROWS, "I8", [6126, 32], 1), (ROWS, "I8[6126, 32]", "f8e4m3")),
    "table scale in f32": Case(put(SCALE, "F32", [6126, 1], 4), (SCALE, "F32[6126, 1]", "f8e8m0 [")),
    "table scale misshaped": Case(put(SCALE, "F8_E8M0", [6126, 2], 1), ("[6126, 2]", "[6126, 1]")),
    "wkv of one key less": Case(put(WKV, "F8_E4M3", [512, 192], 1), ("[512, 192]", "[640, 192]")),
    "tiles of 128": Case(
        put("layers.3.engram.wkv.scale", "F8_E8M0", [5, 2], 1), ("wkv.scale", "[5, 2]", "[20, 6]")
    ),
    "vision in fp8": Case(
        put("vision.blocks.0.mlp.w1.weight", "F8_E4M3", [192, 64], 1), ("mlp.w1.weight is F8_E4M3", "bf16")
    ),
    "two spellings": Case(
        put("model.layers.0.mlp.gate.bias_vl", "F32", [8], 4), ("both are 'layers.0.ffn.gate.bias_vl'",)
    ),
    "table scale nan": Case(_last(SCALE, 255), (SCALE, "scale code 255")),
    "tile scale nan": Case(_last("mtp.0.main_proj.scale", 255), ("main_proj.scale", "255")),
    "stream norm nan": Case(poke("layers.1.engram.q_weight", NAN, 512), ("q_weight", "NaN or infinite")),
    "image row nan": Case(poke("image_newline", NAN, 4), ("image_newline", "NaN or infinite")),
    "vision bias nan": Case(poke("aligner.w2.bias", NAN), ("aligner.w2.bias", "NaN or infinite")),
    "confidence nan": Case(poke("mtp.1.confidence_head.proj.weight", NAN), ("confidence_head", "NaN")),
    "image bias nan": Case(poke(VL, F32(np.nan)), (VL, "NaN or infinite", "-inf for no choice")),
    "image bias leaves one": Case(poke(VL, np.full(7, -np.inf, F32)), (VL, "among 1 experts", "at least 2")),
    "draft bias leaves one": Case(
        poke(DRAFT, np.full(3, -np.inf, F32)), (DRAFT, "among 1 experts", "at least 2")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str, copied: Path) -> None:
    broken = BROKEN[case]
    broken.damage(copied)
    with pytest.raises(Dsv4cError) as caught:
        open_checkpoint(copied)
    message = str(caught.value)
    assert isinstance(caught.value, CheckpointError) and message.startswith(str(copied)), message
    assert all(part in message for part in broken.parts), message


def test_a_bias_may_take_experts_out(copied: Path) -> None:
    poke(VL, np.full(6, -np.inf, F32))(copied)
    assert open_checkpoint(copied)


def test_draft_layers_count_their_own_experts(copied: Path) -> None:
    raw = json.loads((copied / "config.json").read_text())
    raw["text_config"]["dspark_num_experts_per_tok"] = 3
    (copied / "config.json").write_text(json.dumps(raw))
    poke(DRAFT, np.full(2, -np.inf, F32))(copied)
    with pytest.raises(CheckpointError, match=r"mtp\.1.*among 2 experts.*at least 3"):
        open_checkpoint(copied)


def test_scales_are_looked_at_in_bands(
    copied: Path, monkeypatch: pytest.MonkeyPatch, golden: Checkpoint
) -> None:
    """A code in the last band counts, also when the bands do not divide the scale."""
    monkeypatch.setattr("dsv4c.frontend.scan._BAND", 100)
    assert open_checkpoint(copied).specs == golden.specs
    _last(SCALE, 255)(copied)
    with pytest.raises(CheckpointError, match=r"embed\.scale has a scale code 255"):
        open_checkpoint(copied)
    assert open_checkpoint(copied, scan=False).specs


def test_every_role_occurs(golden: Checkpoint) -> None:
    assert {spec.role for spec in golden.specs.values()} == set(Role) - {Role.TABLE}
