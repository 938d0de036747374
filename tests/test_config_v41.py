"""config.json of DeepSeek-V4.1: its three forms, the released model, and what is refused with which words."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4c.errors import ConfigError
from dsv4c.frontend.architecture import (
    Drafter,
    EngramTables,
    Generation,
    LayerKind,
    ModelConfig,
    SharedAttention,
    VisionTower,
    Yarn,
)
from dsv4c.frontend.config import load_config, parse_config
from dsv4c.frontend.engram import Variant, engram_config
from dsv4c.frontend.table import Role, expected_tensors, ledger
from dsv4c.ir.dtypes import DType

DATA = Path(__file__).parent / "data"
RELEASED = DATA / "configs" / "v41-flash"
SMALL: dict[str, Any] = json.loads((DATA / "golden" / "v41" / "config.json").read_text())
Raw = dict[str, Any]


def released() -> Raw:
    found: Raw = json.loads((RELEASED / "config.json").read_text())
    return found


RENAMED = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "moe_intermediate_size": "moe_inter_dim", "num_nextn_predict_layers": "n_mtp_layers",
    "num_experts_per_tok": "n_activated_experts", "routed_scaling_factor": "route_scale",
    "scoring_func": "score_func", "qk_rope_head_dim": "rope_head_dim", "sliding_window": "window_size",
    "rms_norm_eps": "norm_eps", "kv_source_layer_ids": "kv_source_layers",
    "index_source_layer_ids": "index_source_layers", "candidate_source_layer_id": "candidate_source_layer",
    "engram_pad_token_id": "engram_pad_id", "dspark_num_experts_per_tok": "dspark_n_activated_experts",
}  # fmt: skip
RENAMED_VISION = {
    "num_hidden_layers": "vision_n_layers", "hidden_size": "vision_dim",
    "num_attention_heads": "vision_n_heads", "intermediate_size": "vision_inter_dim",
    "patch_size": "vision_patch_size", "rope_theta": "vision_rope_theta",
    "downsample_ratio": "vision_downsample_ratio", "max_image_tokens": "vision_max_n_token",
    "min_pixels": "vision_min_pixels", "max_wh_ratio": "vision_max_wh_ratio",
}  # fmt: skip
UNKNOWN_TO_FLAT = (
    "model_type", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act",
    "initializer_range", "num_key_value_heads", "max_position_embeddings", "norm_topk_prob", "topk_method",
    "rope_scaling", "tie_word_embeddings", "torch_dtype", "use_cache",
)  # fmt: skip


def flat(nested: Raw) -> Raw:
    """The same model as the reference code spells it."""
    text, yarn = nested["text_config"], nested["text_config"]["rope_scaling"]
    out = {RENAMED.get(key, key): value for key, value in text.items() if key not in UNKNOWN_TO_FLAT}
    out |= {new: nested["vision_config"][old] for old, new in RENAMED_VISION.items()}
    out |= {"rope_factor": yarn["factor"], "original_seq_len": yarn["original_max_position_embeddings"]}
    out |= {"beta_fast": 32, "beta_slow": 1, "gate_temp": 1.0, "dtype": "fp8", "expert_dtype": "fp4"}
    return {**out, "max_batch_size": 4, "image_token_id": nested["image_token_id"]}


def changed(base: Raw, text: Raw | None = None, vision: Raw | None = None, **top: object) -> Raw:
    """A copy of `base` with keys replaced; `...` removes one."""
    out = copy.deepcopy(base)
    for where, changes in ((out, top), (out.get("text_config"), text), (out.get("vision_config"), vision)):
        for key, value in (changes or {}).items():
            where[key] = value
            if value is ...:
                del where[key]
    return out


def small(text: Raw | None = None, vision: Raw | None = None, **top: object) -> ModelConfig:
    return parse_config(changed(SMALL, text, vision, **top))


# ---------------------------------------------------------------------------------- accepted


def test_released_values() -> None:
    c = load_config(RELEASED)
    assert c.generation is Generation.V41 and c.num_hidden_layers == 40 and c.n_mtp_layers == 3
    assert c.layer_kinds == (LayerKind.SLIDING,) * 2 + (LayerKind.SHARED,) * 38
    assert c.compress_ratios == (0,) * 2 + (2,) * 18 + (1,) * 20 and not any(c.hash_layers)
    assert c.rms_norm_eps == 1e-20 and c.weight_block_size == (32, 32) and c.expert_dtype == "fp4"
    assert (c.index_n_heads, c.index_head_dim, c.index_topk, c.gate_temperature) == (32, 128, 512, 1.0)
    assert (c.yarn, c.rope_theta, c.compress_rope_theta) == (Yarn(16.0, 65536, 32.0, 1.0), 1e4, 1.6e5)
    assert (c.bos_token_id, c.eos_token_ids, c.max_position_embeddings) == (0, (1,), 1 << 20)
    assert c.shared == SharedAttention((2, 8, 14, 20), (2, 8, 14, 20, 24, 28, 32, 36), 20, 2048, 8)
    assert c.engram == EngramTables((1, 14), (384006168, 384016682), 4, 16_000_000, 8, 256, 99092, 2)
    assert c.vision == VisionTower(32, 1024, 16, 2816, 14, 1e4, 3, 1024, 295936, None, 129264)
    assert c.drafter == Drafter(5, 128799, (37, 38, 39), 256, 128, 3)


def test_released_ledger() -> None:
    assert ledger(load_config(RELEASED)) == (96_085, 510_286_023_000)


@pytest.mark.parametrize("base", [released(), SMALL], ids=["released", "small"])
def test_flat_form_means_the_same(base: Raw) -> None:
    nested, c = parse_config(base), parse_config(flat(base))
    reach = int(nested.yarn.factor * nested.yarn.original) if nested.yarn else 0
    same = replace(nested, bos_token_id=None, eos_token_ids=(), max_position_embeddings=reach)
    assert c == same
    named = {**flat(base), "model_type": "deepseek_v41", "max_position_embeddings": 77}
    assert parse_config(named) == replace(same, max_position_embeddings=77)


def test_flat_form_without_the_optional_parts() -> None:
    keys: Raw = {"vision_n_layers": 0, "n_mtp_layers": 0, "engram_layer_ids": []}
    keys["candidate_source_layer"] = -1
    keys["compress_ratios"] = SMALL["text_config"]["compress_ratios"][:8]
    c = parse_config({**flat(SMALL), **keys, "original_seq_len": 0, "max_position_embeddings": 64})
    assert (c.vision, c.drafter, c.engram, c.yarn) == (None,) * 4 and c.shared.candidate_source is None


def test_text_part_alone() -> None:
    c = parse_config({**SMALL["text_config"], "quantization_config": SMALL["quantization_config"]})
    assert c == replace(small(), vision=None)
    assert not [name for name in expected_tensors(c) if name.startswith(("vision", "aligner", "image"))]


def test_optional_parts_of_the_nested_form() -> None:
    assert small(vision_config=...).vision is None and small(vision_config=None).vision is None
    assert small({"num_nextn_predict_layers": 0, "compress_ratios": [0, 0, 2, 2, 1, 1, 1, 1]}).drafter is None
    assert small({"engram_layer_ids": ...}).engram is None
    for off in (None, -1, ...):
        assert small({"candidate_source_layer_id": off}).shared.candidate_source is None
    without = {"candidate_source_layer_id": -1, "candidate_topk_blocks": ..., "candidate_block_size": ...}
    assert small(without).shared.candidate_blocks == 0
    assert small(vision={"max_wh_ratio": 8}).vision.max_wh_ratio == 8.0
    assert small({"gate_temp": 0.5}).gate_temperature == 0.5


def test_ratios_may_leave_out_the_draft_layers() -> None:
    assert small({"compress_ratios": [0, 0, 2, 2, 1, 1, 1, 1]}) == small()


def test_tile_is_32_unless_something_else_is_said() -> None:
    assert small(quantization_config=...).weight_block_size == (32, 32)
    quant = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    assert small(quantization_config=quant).weight_block_size == (64, 32)


def test_special_tokens_of_the_text_part_count() -> None:
    c = small({"eos_token_id": [1, 3]}, eos_token_id=..., bos_token_id=...)
    assert c.bos_token_id == 0 and c.eos_token_ids == (1, 3)


def test_engram_config() -> None:
    e = engram_config(small())
    assert (e.variant, e.layers, e.table_sizes) == (Variant.PROD, (1, 3), (1009,) * 3)
    assert (e.heads, e.width, e.hidden, e.streams, e.compressed_vocab) == (2, 32, 128, 4, 400)
    assert (e.pad, e.vocab, e.dead_token) == (2, 512, 510)
    assert [e.hashes[layer].rows for layer in e.layers] == [6126, 6332]
    assert engram_config(small(vision_config=...)).dead_token == -1
    with pytest.raises(ConfigError, match="no Engram"):
        engram_config(small({"engram_layer_ids": []}))


# ---------------------------------------------------------------------------------- the table


def test_where_sources_have_their_tensors() -> None:
    names = expected_tensors(small())

    def layers(part: str) -> list[int]:
        return [int(n.split(".")[1]) for n in names if n.endswith(part) and n.startswith("layers")]

    assert layers("attn.compressor.wkv.weight") == layers("attn.indexer.wk.weight") == [2, 4]
    assert layers("attn.compressor.wgate.weight") == [2]
    assert layers("attn.indexer.wq_b.weight") == layers("attn.indexer.weights_proj.weight") == [2, 4, 6]
    assert layers("engram.wkv.weight") == [1, 3] and layers("ffn.gate.bias_vl") == list(range(8))
    assert not [n for n in names if n.endswith((".ape", "tid2eid")) or "hc_head" in n]


def test_shapes_and_roles() -> None:
    specs = expected_tensors(load_config(RELEASED))
    shapes = {
        "layers.1.engram.embed.weight": (Role.ROWS, (384006168, 256)),
        "layers.14.engram.wkv.weight": (Role.LINEAR, (25600, 6144)),
        "layers.14.engram.k_weight": (Role.PLAIN, (4, 5120)),
        "layers.20.attn.indexer.wk.weight": (Role.PLAIN, (128, 512)),
        "layers.20.attn.indexer.wq_b.weight": (Role.LINEAR, (4096, 1280)),
        "mtp.0.main_proj.weight": (Role.LINEAR, (5120, 15360)),
        "mtp.1.ffn.experts.127.w2.weight": (Role.EXPERT, (5120, 2304)),
        "mtp.2.ffn.gate.bias_vl": (Role.PRECISE, (128,)),
        "mtp.2.markov_head.head.weight": (Role.PLAIN, (129280, 256)),
        "mtp.2.confidence_head.proj.weight": (Role.PLAIN, (1, 5376)),
        "vision.patch_embed.proj.weight": (Role.PLAIN, (1024, 588)),
        "vision.blocks.31.attn.wqkv.bias": (Role.PLAIN, (3072,)),
        "vision.blocks.0.mlp.w1.weight": (Role.PLAIN, (5632, 1024)),
        "aligner.w1.weight": (Role.PLAIN, (5120, 9216)),
        "image_newline": (Role.PLAIN, (5120,)),
    }
    assert {name: (specs[name].role, specs[name].shape) for name in shapes} == shapes
    last, first = ("mtp.2.norm.weight", "mtp.0.main_norm.weight")
    assert last in specs and first in specs
    assert "mtp.1.norm.weight" not in specs and "mtp.1.main_norm.weight" not in specs
    rows = specs["layers.1.engram.embed.weight"]
    assert rows.scale_shape(DType.F8E4M3, (32, 32)) == (384006168, 8)
    assert rows.scale_dtypes == (DType.F8E8M0,) and not rows.allows(DType.F4E2M1X2)
    assert not replace(rows, shape=(10, 48)).allows(DType.F8E4M3)
    assert len([name for name in specs if name.startswith(("vision", "aligner"))]) == 263


# ----------------------------------------------------------------------------------- refused

KV, INDEX, CANDIDATE = "kv_source_layer_ids", "index_source_layer_ids", "candidate_source_layer_id"
ROWS, RATIOS, TARGETS = "engram_num_embeddings", "compress_ratios", "dspark_target_layer_ids"

TEXT_ERRORS: dict[str, tuple[Raw, tuple[str, ...]]] = {
    "unknown key": ({"hidden_sise": 9}, ("unknown key 'hidden_sise'", "'hidden_size'")),
    "key of v4": ({"layer_types": []}, ("unknown key 'layer_types'",)),
    "type": ({"model_type": "deepseek_v4"}, ("model_type", "'deepseek_v4'", "deepseek_v41_text")),
    "missing size": ({"index_topk": ...}, ("'index_topk' is missing", "integer")),
    "missing sources": ({KV: ...}, (f"{KV!r} is missing", "a list")),
    "hash layers": ({"num_hash_layers": 3}, ("num_hash_layers", "3", "allowed: 0")),
    "shared experts": ({"n_shared_experts": 2}, ("n_shared_experts", "allowed: 1")),
    "norm eps": ({"rms_norm_eps": 0}, ("rms_norm_eps", "above 0")),
    "gate temperature": ({"gate_temp": 0}, ("gate_temp", "above 0")),
    "ratios short": ({RATIOS: [0, 0]}, (RATIOS, "a list of 2", "8 entries", "10")),
    "ratio of drafts": ({RATIOS: [0, 0, 2, 2, 1, 1, 1, 1, 0, 1]}, (RATIOS, "MTP blocks", "0 for each")),
    "ratio three": ({RATIOS: [0, 0, 3, 3, 1, 1, 1, 1]}, (RATIOS, "a list with 3", "0, 1 or 2")),
    "sources fall": ({KV: [4, 2]}, (KV, "[4, 2]", "rising layers of 0 to 7")),
    "source twice": ({INDEX: [2, 4, 4]}, (INDEX, "rising")),
    "source outside": ({INDEX: [2, 4, 8]}, (INDEX, "rising layers of 0 to 7")),
    "source is text": ({KV: ["2"]}, (f"{KV}[0]", "'2'")),
    "source slides": ({KV: [1, 2, 4]}, (KV, "above 0", "[1] have 0")),
    "no source": ({KV: []}, (KV, "at or before layer 2")),
    "source too late": ({KV: [3, 4]}, (KV, "[3, 4]", "at or before layer 2")),
    "index source too late": ({INDEX: [4, 6]}, (INDEX, "at or before layer 2")),
    "ratio of the source": ({KV: [2, 5]}, (KV, "layer 4 with ratio 1", "layer 2 with ratio 2")),
    "ratio of the index": ({INDEX: [2, 6]}, (INDEX, "layer 4 with ratio 1", "layer 2 with ratio 2")),
    "candidate no source": ({CANDIDATE: 5}, (CANDIDATE, "5", "[2, 4, 6]")),
    "candidate too early": ({CANDIDATE: 2}, (CANDIDATE, "2", "the last of kv_source_layer_ids on, 4")),
    "candidate text": ({CANDIDATE: "4"}, (CANDIDATE, "'4'", "-1 for none")),
    "candidate blocks": ({"candidate_topk_blocks": 0}, ("candidate_topk_blocks", "at least 1")),
    "candidate size": ({"candidate_block_size": ...}, ("'candidate_block_size' is missing",)),
    "index heads narrow": ({"index_head_dim": 8}, ("index_head_dim", "at least qk_rope_head_dim, 16")),
    "engram falls": ({"engram_layer_ids": [3, 1]}, ("engram_layer_ids", "rising")),
    "engram outside": ({"engram_layer_ids": [1, 8]}, ("engram_layer_ids", "rising layers of 0 to 7")),
    "engram first": ({"engram_layer_ids": [0, 3]}, ("[0, 3]", "from 1 on", "not supported")),
    "rows missing": ({ROWS: [6126]}, (ROWS, "a list of 1", "engram_layer_ids, 2")),
    "rows wrong": ({ROWS: [6126, 6333]}, (ROWS, "[6126, 6333]", "[6126, 6332]", "primes")),
    "rows swapped": ({ROWS: [6332, 6126]}, (ROWS, "[6126, 6332]")),
    "engram width": ({"engram_head_dim": 24}, ("engram_head_dim", "24", "multiple of 32, not 144")),
    "engram order": ({"engram_max_ngram_size": 1}, ("engram_max_ngram_size", "at least 2")),
    "engram classes": ({"engram_compressed_vocab_size": 513}, ("513", "at most vocab_size, 512")),
    "engram pad": ({"engram_pad_token_id": 400}, ("400", "below engram_compressed_vocab_size, 400")),
    "engram too large": ({"engram_vocab_size": 1 << 40}, ("engram_vocab_size", "int32")),
    "targets outside": ({TARGETS: [6, 8]}, (TARGETS, "[6, 8]", "rising layers of 0 to 7")),
    "no targets": ({TARGETS: []}, (TARGETS, "at least one")),
    "noise": ({"dspark_noise_token_id": 512}, ("dspark_noise_token_id", "below vocab_size, 512")),
    "draft experts": ({"dspark_num_experts_per_tok": 5}, ("dspark_num_experts_per_tok", "routed_experts, 4")),
    "drafter missing": ({"dspark_markov_rank": ...}, ("'dspark_markov_rank' is missing",)),
    "experts": ({"num_experts_per_tok": 9}, ("num_experts_per_tok", "n_routed_experts, 8")),
}  # fmt: skip
VISION_ERRORS: dict[str, tuple[Raw, tuple[str, ...]]] = {
    "unknown key": ({"depth": 2}, ("unknown key 'depth'",)),
    "type": ({"model_type": "clip"}, ("model_type", "'clip'", "deepseek_v41_vision")),
    "heads": ({"num_attention_heads": 3}, ("num_attention_heads", "divisor of hidden_size, 64")),
    "head dim": ({"num_attention_heads": 32}, ("num_attention_heads", "multiple of 4 channels, not 2")),
    "missing": ({"patch_size": ...}, ("'patch_size' is missing",)),
    "tokens": ({"max_image_tokens": 3}, ("max_image_tokens", "at least 4")),
    "ratio": ({"max_wh_ratio": 0}, ("max_wh_ratio", "above 0")),
}
TOP_ERRORS: dict[str, tuple[Raw, tuple[str, ...]]] = {
    "unknown key": ({"vision_tower": {}}, ("unknown key 'vision_tower'", "'vision_config'")),
    "no text": ({"text_config": ...}, ("'text_config' is missing", "an object")),
    "text no object": ({"text_config": 3}, ("text_config", "3", "an object")),
    "image token missing": ({"image_token_id": ...}, ("'image_token_id' is missing",)),
    "image token": ({"image_token_id": 512}, ("image_token_id", "512", "below vocab_size, 512")),
    "eos twice": ({"eos_token_id": 2}, ("eos_token_id", "2", "contradiction to that of text_config")),
    "tied": ({"tie_word_embeddings": True}, ("tie_word_embeddings", "False")),
    "quantisation": ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "'gptq'")),
}
FLAT_ERRORS: dict[str, tuple[Raw, tuple[str, ...]]] = {
    "unknown key": ({"n_layer": 2}, ("unknown key 'n_layer'", "'n_layers'")),
    "published key": ({"hidden_size": 128}, ("unknown key 'hidden_size'",)),
    "type": ({"model_type": "llama"}, ("model_type", "'llama'")),
    "size": ({"dim": 0}, ("'dim'", "at least 1")),
    "missing": ({"window_size": ...}, ("'window_size' is missing",)),
    "factor": ({"rope_factor": 0.5}, ("'rope_factor'", "0.5", "at least 1")),
    "sources": ({"kv_source_layers": [4, 2]}, ("'kv_source_layers'", "rising")),
    "vision": ({"vision_n_heads": 3}, ("'vision_n_heads'", "64")),
    "scoring": ({"score_func": "softmax"}, ("'score_func'", "sqrtsoftplus")),
    "reach": ({"original_seq_len": 0}, ("'max_position_embeddings' is missing",)),
}


def refused(raw: Raw, part: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "here.json")
    message = str(caught.value)
    assert message.startswith("here.json" + part) and all(word in message for word in words), message


@pytest.mark.parametrize("case", TEXT_ERRORS)
def test_error_in_the_text_part(case: str) -> None:
    changes, words = TEXT_ERRORS[case]
    refused(changed(SMALL, text=changes), ": text_config: ", words)


@pytest.mark.parametrize("case", VISION_ERRORS)
def test_error_in_the_vision_part(case: str) -> None:
    changes, words = VISION_ERRORS[case]
    refused(changed(SMALL, vision=changes), ": vision_config: ", words)


@pytest.mark.parametrize("case", TOP_ERRORS)
def test_error_beside_the_parts(case: str) -> None:
    changes, words = TOP_ERRORS[case]
    refused(changed(SMALL, **changes), ": ", words)


@pytest.mark.parametrize("case", FLAT_ERRORS)
def test_error_in_the_flat_form(case: str) -> None:
    changes, words = FLAT_ERRORS[case]
    refused(changed(flat(SMALL), **changes), ": ", words)
