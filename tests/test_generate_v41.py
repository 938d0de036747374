"""Generated DeepSeek-V4.1 checkpoints: complete, readable, repeatable, in every form of configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_config_v41 import flat
from test_model_harness import ROOT, Arr

import dsv4c
from dsv4c.errors import ConfigError, UsageError
from dsv4c.frontend.architecture import LayerKind
from dsv4c.frontend.checkpoint import Checkpoint, open_checkpoint
from dsv4c.frontend.config import parse_config
from dsv4c.frontend.generate import PRESETS, generate_checkpoint, main
from dsv4c.frontend.generate_config import is_v41, published_config
from dsv4c.frontend.table import Role, expected_tensors, ledger, published_dtype, scale_name
from dsv4c.frontend.token_map import FILE, read_token_map, token_map
from dsv4c.ir.dtypes import DType, decode

TINY = PRESETS["tiny-v41"]
KJV = ROOT / "examples" / "kjv" / "checkpoint" / "tokenizer.json"
FLASH = Path(__file__).parent / "data" / "configs" / "v41-flash" / "config.json"
ROWS = "layers.1.engram.embed.weight"
Make = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Generated tiny checkpoints, each written once; read only."""
    root, known = tmp_path_factory.mktemp("v41"), dict[str, Checkpoint]()

    def make(**arguments: Any) -> Checkpoint:
        key = repr(sorted(arguments.items()))
        if key not in known:
            directory = root / str(len(known))
            known[key] = open_checkpoint(generate_checkpoint(directory, **{"config": "tiny-v41"} | arguments))
        return known[key]

    return make


def text(**changes: object) -> dict[str, Any]:
    """The tiny configuration with other keys of the text part."""
    part = TINY["text_config"]
    assert isinstance(part, dict)
    return {**TINY, "text_config": {**part, **changes}}


def raw(c: Checkpoint) -> dict[str, bytes]:
    return {name: c.files.read(name).tobytes() for name in c.files.tensors}


def logits(root: Path, tokens: list[int]) -> Arr:
    """By the evaluator, of a text without images."""
    return dsv4c.evaluate(dsv4c.load_checkpoint(root), tokens)


# ------------------------------------------------------------------------------------- complete


def test_every_tensor_is_there_in_its_published_format(made: Make) -> None:
    c = made()
    files = c.files.tensors
    assert set(c.specs) == set(expected_tensors(c.config))
    assert ledger(c.config) == (len(files), sum(t.nbytes for t in files.values()))
    for name, spec in c.specs.items():
        dtype = published_dtype(name, spec, c.config)
        assert c.stored_dtype(name) is dtype, name
        assert (scale_name(name) in files) == (dtype in (DType.F8E4M3, DType.F4E2M1X2)), name
    assert {spec.role for spec in c.specs.values()} == set(Role) - {Role.TABLE}
    for part in ("mtp.1.markov_head.head.weight", "vision.blocks.1.mlp.w2.weight", "aligner.w2.bias",
                 "image_newline", "layers.3.ffn.gate.bias_vl", "mtp.0.ffn.gate.bias_vl", ROWS):  # fmt: skip
        assert part in c.specs


def test_the_preset_has_every_feature(made: Make) -> None:
    c = made().config
    assert set(c.layer_kinds) == {LayerKind.SLIDING, LayerKind.SHARED} and set(c.compress_ratios) == {0, 1, 2}
    assert c.engram and c.vision and c.drafter and c.yarn and c.shared
    assert c.shared.candidate_source in c.shared.index_sources[:-1], "later sources choose among candidates"
    assert c.shared.candidate_blocks * c.shared.candidate_size >= c.index_topk + c.shared.candidate_size
    assert c.weight_block_size == (32, 32) and c.expert_dtype == "fp4"
    file = json.loads((made().path / "config.json").read_text())
    assert file["quantization_config"]["weight_block_size"] == [32, 32]
    assert "weight_block_size" not in file["text_config"] and "vocab_size" not in file
    assert file["text_config"]["engram_num_embeddings"] == [6126, 6332]  # specification of V4.1, section 11


def test_the_small_preset_stays_small() -> None:
    config = published_config(PRESETS["small-v41"], "published", True, None, 0)
    model = parse_config(config)
    assert 200e6 < ledger(model)[1] < 400e6 and model.engram and model.vision and model.drafter


def test_engram_rows_are_codes_with_a_scale_for_each_32(made: Make) -> None:
    c, plain = made(), made(dtype="f32")
    codes, scale = c.files.read(ROWS), c.files.read(scale_name(ROWS))
    assert codes.shape == (6126, 32) and scale.shape == (6126, 1)
    assert c.files.tensors[scale_name(ROWS)].dtype is DType.F8E8M0
    found = decode(codes, DType.F8E4M3) * decode(scale, DType.F8E8M0)
    want = plain.files.read(ROWS)
    assert np.abs(found - want).max() <= np.abs(want).max() / 16 and 0.9 < want.std() < 1.1
    assert len(np.unique(scale)) > 1, "rows have scales of their own"


def test_scales_of_rows_are_powers_of_two_whatever_the_others(made: Make) -> None:
    c = made(scale_dtype="f32")
    assert c.files.tensors[scale_name(ROWS)].dtype is DType.F8E8M0
    assert c.files.tensors["layers.0.attn.wq_a.scale"].dtype is DType.F32
    assert c.files.read(ROWS).tobytes() == made().files.read(ROWS).tobytes()


def test_float_formats_hold_the_same(made: Make) -> None:
    a = made(dtype="f32")
    for other in ("bf16", "f16"):
        b = made(dtype=other)
        for name in a.specs:
            x, y = (decode(c.files.read(name), c.stored_dtype(name)) for c in (a, b))
            assert np.array_equal(x, y), name


# ----------------------------------------------------------------------------------- repeatable


def test_a_seed_is_a_model(made: Make, tmp_path: Path) -> None:
    again = open_checkpoint(generate_checkpoint(tmp_path / "again", "tiny-v41"))
    assert raw(again) == raw(made())
    a, b = (made(seed=seed) for seed in (0, 1))
    same = [n for n in a.specs if a.files.read(n).size > 200 and raw(a)[n] == raw(b)[n]]
    assert not same


def test_it_runs_and_its_seed_counts(made: Make) -> None:
    """Two texts of one end differ by what stood before: every layer that looks back is alive."""
    tokens = [5, 17, 99, 3, 4, 410, 6, 7, 8, 9, 2, 3, 40, 41, 42, 43, 44]
    found = logits(made().path, tokens)
    assert found.shape == (17, 512) and np.isfinite(found).all() and found.std() > 0.1
    other = logits(made(seed=1).path, tokens)
    assert np.abs(found - other).max() > 0.1
    changed = logits(made().path, [6, *tokens[1:]])
    assert np.abs(found[-1] - changed[-1]).max() > 1e-4, "token 0 is out of every window"


@pytest.mark.parametrize("keep", [1, 2, 4, 5, 7])
def test_the_first_layers_are_those_of_the_whole_model(made: Make, keep: int) -> None:
    whole, part = made(), made(layers=keep)
    assert {n.split(".")[1] for n in part.specs if n.startswith("layers.")} == set(map(str, range(keep)))
    a, b = raw(whole), raw(part)
    assert all(b[n] == a[n] for n in b if not n.startswith("mtp.0.main_proj"))
    c = part.config
    assert c.drafter and len(c.drafter.targets) == min(keep, 2) and c.drafter.targets[-1] == keep - 1
    assert (c.engram is None) == (keep == 1) and (part.path / FILE).exists() == (keep > 1)
    assert np.isfinite(logits(part.path, [4, 5, 6])).all()


def test_draft_layers_can_be_left_out(made: Make) -> None:
    c = made(mtp=0)
    assert not c.mtp and c.config.drafter is None and len(made().mtp) == 74
    assert c.config.compress_ratios == made().config.compress_ratios


# ------------------------------------------------------------------------- forms, and the released one


def test_the_forms_of_a_configuration_give_one_model(made: Make) -> None:
    nested = json.loads((made().path / "config.json").read_text())
    spelt, alone = made(config=flat(nested)), made(config={**nested["text_config"]})
    assert is_v41(spelt.config.raw) and "kv_source_layers" in spelt.config.raw
    assert raw(spelt) == raw(made())
    assert alone.config.vision is None and raw(alone).items() <= raw(made()).items()
    cut = made(config=flat(nested), layers=4)
    assert cut.config.raw["kv_source_layers"] == [2] and cut.config.raw["n_layers"] == 4
    assert cut.config.shared == made(layers=4).config.shared


def test_a_sparse_checkpoint_has_the_tensors_of_a_full_one(made: Make) -> None:
    full, sparse = made(), made(sparse=True)
    assert [(t.name, t.dtype, t.shape) for t in full.files.tensors.values()] == [
        (t.name, t.dtype, t.shape) for t in sparse.files.tensors.values()
    ]
    assert not any(sparse.files.read(name).any() for name in sparse.files.tensors)
    assert np.array_equal(sparse.token_map, full.token_map)


def test_the_released_model_takes_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of it, one with an Engram table of 384 million rows, of which nothing is read."""
    arguments = [str(tmp_path / "c"), "--config", str(FLASH), "--layers", "2", "--sparse", "--mtp", "0"]
    assert main(arguments) == 0
    c = open_checkpoint(tmp_path / "c", scan=False)
    file = json.loads(FLASH.read_text())
    assert c.files.tensors[ROWS].shape == (384006168, 256)
    assert c.files.tensors[scale_name(ROWS)].shape == (384006168, 8)
    assert c.config.engram and c.config.engram.layers == (1,) and c.config.n_mtp_layers == 0
    assert (
        json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
        == file["quantization_config"]
    )
    assert len(c.token_map) == 129280 and c.token_map.max() == 99091
    taken = sum(512 * f.stat().st_blocks for f in (tmp_path / "c").iterdir())
    apparent = sum(f.stat().st_size for f in (tmp_path / "c").iterdir())
    assert apparent > 100e9
    if taken < apparent / 2:
        assert taken < 20e6


@pytest.mark.parametrize("style", ["transformers", "saved"])
def test_no_other_style(tmp_path: Path, style: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=f"style of deepseek_v41: '{style}'; allowed: published"):
        generate_checkpoint(tmp_path / "c", "tiny-v41", style=style)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "c"), "--preset", "tiny-v41", "--style", style])
    assert "allowed: published" in capsys.readouterr().err and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (text(engram_num_embeddings=[6126, 6333]), "engram_num_embeddings"),
        (text(engram_vocab_size="many"), "engram_num_embeddings"),
        (text(kv_source_layer_ids=[4]), "kv_source_layer_ids"),
        ({**TINY, "image_token_id": 512}, "image_token_id"),
        ({**TINY, "text_config": None}, "text_config"),
        (text(dspark_block=3), "dspark_block"),
    ],
)
def test_impossible_configurations(tmp_path: Path, config: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        generate_checkpoint(tmp_path / "c", config)
    with pytest.raises(UsageError, match="9 layers; allowed: 1 to 8"):
        generate_checkpoint(tmp_path / "c", "tiny-v41", layers=9)
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------ tokenizer


def test_a_tokenizer_decides_vocabulary_and_classes(made: Make) -> None:
    c = made(tokenizer=KJV)
    known = token_map(KJV.read_bytes())
    assert len(known) == 2048 and c.config.vocab_size == 2050
    assert c.config.vision and c.config.vision.image_token == 2048
    assert c.config.drafter and c.config.drafter.noise_token == 2049
    assert (c.path / "tokenizer.json").read_bytes() == KJV.read_bytes()
    found = read_token_map(c.path)
    assert np.array_equal(found[:2048], known) and known.max() < 2047, "some tokens are one class"
    assert found[2048:].tolist() == [known.max() + 1, known.max() + 2]
    assert c.config.engram and c.config.engram.compressed_vocab == known.max() + 3
    assert np.isfinite(logits(c.path, [3, 500, 2000, 7])).all()


def test_a_vocabulary_with_room_stays(tmp_path: Path) -> None:
    c = open_checkpoint(generate_checkpoint(tmp_path / "a", text(vocab_size=2100), tokenizer=KJV))
    assert c.config.vocab_size == len(c.token_map) == 2100
    assert c.config.vision and c.config.vision.image_token == 510
    assert len(set(c.token_map[2048:])) == 52, "each of the others is a class of its own"
    v4 = open_checkpoint(generate_checkpoint(tmp_path / "b", "tiny", tokenizer=KJV))
    assert v4.config.vocab_size == 2048 and v4.tokenizer_path and not (v4.path / FILE).exists()


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"cannot be read: .*; allowed: a tokenizer\.json"):
        generate_checkpoint(tmp_path / "c", "tiny-v41", tokenizer=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "c"), "--preset", "tiny-v41", "--tokenizer", str(tmp_path / "bad.json")])
    assert "the tokenizer does not load" in capsys.readouterr().err and not (tmp_path / "c").exists()
