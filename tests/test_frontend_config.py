"""config.json: both spellings, the released models, and what is refused with which words."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from dsv4c.errors import ConfigError
from dsv4c.frontend.architecture import LayerKind, ModelConfig, Yarn
from dsv4c.frontend.config import load_config, parse_config
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.frontend.table import expected_tensors, ledger

CONFIGS = Path(__file__).parent / "data" / "configs"
S, C, H = (k.value for k in (LayerKind.SLIDING, LayerKind.CSA, LayerKind.HCA))

TRANSFORMERS: dict[str, object] = {
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "compress_rates": {C: 4, H: 16}, "compress_rope_theta": 160000.0, "dtype": "bfloat16",
    "eos_token_id": [1, 2], "hc_eps": 1e-06, "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 40,
    "hidden_act": "silu", "hidden_size": 96, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 3,
    "initializer_range": 0.02, "layer_types": [S, C, H, C], "max_position_embeddings": 512, "mlp_bias": False,
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "model_type": "deepseek_v4",
    "moe_intermediate_size": 56, "n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 3, "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1, "o_groups": 3, "o_lora_rank": 24, "output_router_logits": False,
    "pad_token_id": None, "partial_rotary_factor": 0.4, "q_lora_rank": 48, "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "compress": {
            "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "factor": 4.0,
            "original_max_position_embeddings": 64, "partial_rotary_factor": 0.4, "rope_theta": 160000.0,
            "rope_type": "yarn",
        },
        "main": {"partial_rotary_factor": 0.4, "rope_theta": 10000.0, "rope_type": "default"},
    },
    "rope_theta": 10000.0, "routed_scaling_factor": 1.5, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "scoring_func": "sqrtsoftplus", "sliding_window": 8, "swiglu_limit": 10.0,
    "tie_word_embeddings": False, "transformers_version": "5.23.0", "use_cache": True, "vocab_size": 64,
}  # fmt: skip
"""What `save_pretrained` of transformers 5.23.0 writes for a small model with YaRN."""


def published() -> dict[str, object]:
    return json.loads((CONFIGS / "v4-flash" / "config.json").read_text())


# ---------------------------------------------------------------------------------- accepted


@pytest.mark.parametrize(
    "model, tensors, size", [("v4-pro", 145_116, 864_704_792_696), ("v4-flash", 69_187, 159_609_485_896)]
)
def test_released_models_have_the_published_ledger(model: str, tensors: int, size: int) -> None:
    assert ledger(load_config(CONFIGS / model)) == (tensors, size)


def test_flash_values() -> None:
    c = load_config(CONFIGS / "v4-flash")
    assert (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.heads, c.head_dim) == (
        129280,
        4096,
        43,
        64,
        512,
    )
    assert (c.rope_dim, c.o_groups, c.experts_per_token, c.index_topk, c.n_mtp_layers) == (64, 8, 6, 512, 1)
    assert c.layer_kinds[:4] == (LayerKind.SLIDING, LayerKind.SLIDING, LayerKind.CSA, LayerKind.HCA)
    assert c.compress_ratios[:4] == (0, 0, 4, 128) and len(c.compress_ratios) == 43
    assert c.hash_layers == (True,) * 3 + (False,) * 40
    assert c.yarn == Yarn(16.0, 65536, 32.0, 1.0)
    assert (c.bos_token_id, c.eos_token_ids, c.expert_dtype, c.weight_block_size) == (
        0,
        (1,),
        "fp4",
        (128, 128),
    )
    assert c.raw["architectures"] == ["DeepseekV4ForCausalLM"]


def test_transformers_spelling() -> None:
    c = parse_config(TRANSFORMERS)
    assert c.layer_kinds == tuple(map(LayerKind, (S, C, H, C))) and c.compress_ratios == (0, 4, 16, 4)
    assert c.hash_layers == (True, False, False, False)
    assert (c.rope_dim, c.rope_theta, c.compress_rope_theta) == (16, 10000.0, 160000.0)
    assert c.yarn == Yarn(4.0, 64, 32.0, 1.0) and c.eos_token_ids == (1, 2) and c.expert_dtype is None


def test_both_spellings_mean_the_same(tmp_path: Path) -> None:
    a = load_config(generate_checkpoint(tmp_path / "a", "tiny", dtype="bf16"))
    b = load_config(generate_checkpoint(tmp_path / "b", "tiny", dtype="bf16", style="saved"))
    assert a == b and a.raw != b.raw


def changed(base: dict[str, object], **changes: object) -> dict[str, object]:
    """`base` with keys replaced; `...` removes one."""
    out = {**copy.deepcopy(base), **changes}
    return {key: value for key, value in out.items() if value is not ...}


def accepted(**changes: object) -> ModelConfig:
    return parse_config(changed(TRANSFORMERS, **changes))


def test_rates_other_than_the_released_ones_are_kept_per_kind() -> None:
    c = accepted(compress_rates={C: 8, H: 4})
    assert c.compress_ratios == (0, 8, 4, 8) and c.layer_kinds[2] is LayerKind.HCA
    specs = expected_tensors(c)
    assert specs["layers.1.attn.compressor.ape"].shape == (8, 80)
    assert specs["layers.2.attn.compressor.ape"].shape == (4, 40)
    assert "layers.2.attn.indexer.wq_b.weight" not in specs


def test_flat_rope_parameters_scale_the_compressed_layers() -> None:
    yarn = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 32}
    c = accepted(rope_parameters=yarn)
    assert c.yarn == Yarn(2.0, 32, 32.0, 1.0) and (c.rope_theta, c.compress_rope_theta) == (1e4, 1.6e5)


def test_thetas_of_nested_rope_parameters_win() -> None:
    nested = copy.deepcopy(TRANSFORMERS["rope_parameters"])
    nested["main"]["rope_theta"], nested["compress"]["rope_theta"] = 5000, 7000
    c = accepted(rope_parameters=nested)
    assert (c.rope_theta, c.compress_rope_theta) == (5000.0, 7000.0)


def test_no_scaling_at_all() -> None:
    assert accepted(rope_parameters=...).yarn is None
    assert accepted(rope_parameters=None).yarn is None


def test_layers_may_all_be_sliding() -> None:
    assert set(accepted(layer_types=[S] * 4, compress_rates=...).compress_ratios) == {0}


def test_rope_dim_follows_from_the_factor_alone() -> None:
    assert accepted(qk_rope_head_dim=...).rope_dim == 16


def test_no_special_tokens() -> None:
    c = accepted(bos_token_id=None, eos_token_id=None)
    assert c.bos_token_id is None and c.eos_token_ids == ()


def test_published_ratios_without_mtp_entries() -> None:
    raw = published()
    raw["compress_ratios"] = raw["compress_ratios"][:43]
    assert parse_config(raw) == load_config(CONFIGS / "v4-flash")


def test_expert_dtype_may_stand_in_the_quantization_config() -> None:
    raw = changed(published(), expert_dtype=...)
    raw["quantization_config"]["expert_dtype"] = "fp4"
    assert parse_config(raw) == load_config(CONFIGS / "v4-flash")


# ----------------------------------------------------------------------------------- refused

PUBLISHED_ERRORS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "ratios too short": ({"compress_ratios": [0, 4]}, ("a list of 2", "43 entries", "44")),
    "ratios missing": ({"compress_ratios": ...}, ("compress_ratios", "layer_types")),
    "ratio negative": ({"compress_ratios": [-4] * 43}, ("compress_ratios[0]", "-4")),
    "ratio one": ({"compress_ratios": [1] * 43}, ("compress_ratios", "1", "at least 2")),
    "ratio of an mtp block": ({"compress_ratios": [0] * 43 + [4]}, ("[4] for the MTP blocks",)),
    "ratios contradict types": ({"layer_types": [S] * 43}, ("layer_types", "contradiction")),
    "too many hash layers": ({"num_hash_layers": 44}, ("num_hash_layers", "44", "0 to 43")),
    "hash layers missing": ({"num_hash_layers": ...}, ("num_hash_layers", "mlp_layer_types")),
    "hash layers contradict": ({"mlp_layer_types": ["moe"] * 43}, ("mlp_layer_types", "contradiction")),
    "rope_dim missing": ({"qk_rope_head_dim": ...}, ("'qk_rope_head_dim' is missing", "integer")),
    "rope_dim odd": ({"qk_rope_head_dim": 63}, ("qk_rope_head_dim", "63", "even")),
    "rope_dim too large": ({"qk_rope_head_dim": 514}, ("qk_rope_head_dim", "at most head_dim, 512")),
    "index heads too small": ({"index_head_dim": 32}, ("index_head_dim", "at least qk_rope_head_dim, 64")),
    "scaling unknown": ({"rope_scaling": {"type": "linear", "factor": 2}}, ("rope_scaling", "'linear'")),
    "yarn without factor": (
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 9}}, ("'factor'",),
    ),
    "yarn with mscale": (
        {"rope_scaling": {"type": "yarn", "mscale": 1.0}}, ("rope_scaling", "unknown key 'mscale'"),
    ),
    "quant method": ({"quantization_config": {"quant_method": "gptq"}}, ("quant_method", "'gptq'", "fp8")),
    "block of three": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 2, 3]}},
        ("weight_block_size", "two numbers"),
    ),
    "expert dtype": ({"expert_dtype": "int4"}, ("expert_dtype", "'int4'", "fp4, fp8")),
    "dspark": ({"dspark_markov_rank": 256}, ("dspark_markov_rank", "DSpark", "not supported yet")),
    "vision": ({"vision_config": {}}, ("vision_config", "image input", "not supported yet")),
}  # fmt: skip

TRANSFORMERS_ERRORS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "type missing": ({"model_type": ...}, ("'model_type' is missing", "deepseek_v4")),
    "type unknown": ({"model_type": "llama"}, ("'llama'", "unknown", "deepseek_v4")),
    "type not yet": ({"model_type": "deepseek_v32"}, ("'deepseek_v32'", "V3.2", "not supported yet")),
    "type of v4.1": ({"model_type": "deepseek_v41"}, ("unknown key 'attention_bias'",)),
    "unknown key": ({"hidden_sise": 96}, ("unknown key 'hidden_sise'", "'hidden_size'")),
    "unknown key far": ({"zzz": 1}, ("unknown key 'zzz'",)),
    "shared experts": ({"n_shared_experts": 2}, ("n_shared_experts", "2", "allowed: 1")),
    "scoring": ({"scoring_func": "softmax"}, ("scoring_func", "'softmax'", "sqrtsoftplus")),
    "norm_topk_prob": ({"norm_topk_prob": False}, ("norm_topk_prob", "False", "True")),
    "norm_topk_prob 1": ({"norm_topk_prob": 1}, ("norm_topk_prob", "True")),
    "attention_bias": ({"attention_bias": True}, ("attention_bias", "True", "False")),
    "mlp_bias": ({"mlp_bias": True}, ("mlp_bias", "False")),
    "kv heads": ({"num_key_value_heads": 3}, ("num_key_value_heads", "3", "allowed: 1")),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "silu")),
    "tied": ({"tie_word_embeddings": True}, ("tie_word_embeddings", "False")),
    "top-k": ({"topk_method": "greedy"}, ("topk_method", "noaux_tc")),
    "top_k above experts": ({"num_experts_per_tok": 5}, ("num_experts_per_tok", "5", "n_routed_experts, 4")),
    "groups": ({"o_groups": 2}, ("o_groups", "2", "divisor of num_attention_heads, 3")),
    "missing size": ({"hidden_size": ...}, ("'hidden_size' is missing", "integer")),
    "null size": ({"hidden_size": None}, ("'hidden_size' is missing",)),
    "size zero": ({"vocab_size": 0}, ("vocab_size", "0", "at least 1")),
    "size float": ({"head_dim": 40.0}, ("head_dim", "40.0", "integer")),
    "size bool": ({"hc_mult": True}, ("hc_mult", "True", "integer")),
    "size text": ({"q_lora_rank": "48"}, ("q_lora_rank", "'48'", "integer")),
    "number text": ({"swiglu_limit": "10"}, ("swiglu_limit", "'10'", "number")),
    "number negative": ({"rms_norm_eps": -1e-6}, ("rms_norm_eps", "above 0")),
    "theta zero": ({"rope_theta": 0, "rope_parameters": None}, ("rope_theta", "0", "above 0")),
    "layer type": ({"layer_types": [S, C, H, "full"]}, ("layer_types[3]", "'full'", S)),
    "layer types short": ({"layer_types": [S]}, ("layer_types", "a list of 1", "4 entries")),
    "layer types text": ({"layer_types": S}, ("layer_types", "a list of 4")),
    "mlp type": ({"mlp_layer_types": ["dense"] * 4}, ("mlp_layer_types[0]", "'dense'", "hash_moe, moe")),
    "rates missing": ({"compress_rates": ...}, ("'compress_rates' is missing",)),
    "rate missing": ({"compress_rates": {C: 4}}, ("compress_rates", f"{H!r} is missing")),
    "rate one": ({"compress_rates": {C: 4, H: 1}}, ("compress_rates", H, "at least 2")),
    "rate unknown": ({"compress_rates": {C: 4, H: 16, S: 2}}, ("compress_rates", S)),
    "rates list": ({"compress_rates": [4, 16]}, ("compress_rates", "an object")),
    "factor contradicts": ({"qk_rope_head_dim": 20}, ("qk_rope_head_dim", "20", "= 16")),
    "eos text": ({"eos_token_id": "</s>"}, ("eos_token_id", "'</s>'", "integer")),
    "eos list": ({"eos_token_id": [1, -1]}, ("eos_token_id[1]", "-1")),
    "eos outside": ({"eos_token_id": [1, 64]}, ("eos_token_id", "64", "below vocab_size, 64")),
    "bos outside": ({"bos_token_id": 64}, ("bos_token_id", "64", "below vocab_size")),
    "yarn on main": (
        {"rope_parameters": {"main": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8,
                                      "rope_theta": 1e4}, "compress": {"rope_theta": 1e4}}},
        ("rope_parameters: main", "yarn", "default"),
    ),
    "attention factor": (
        {"rope_parameters": {"rope_type": "yarn", "attention_factor": 1.2}},
        ("attention_factor", "1.2", "1.0"),
    ),
    "half nested": ({"rope_parameters": {"main": {"rope_theta": 1e4}}}, ("'compress' is missing",)),
    "betas": (
        {"rope_parameters": {"rope_type": "yarn", "beta_fast": 1, "beta_slow": 2}},
        ("beta_fast", "beta_slow, 2.0"),
    ),
    "both scalings": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "default"}},
        ("rope_parameters", "beside rope_scaling"),
    ),
}  # fmt: skip


def refused(raw: dict[str, object], parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.json"))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("case", PUBLISHED_ERRORS)
def test_published_error(case: str, tmp_path: Path) -> None:
    changes, parts = PUBLISHED_ERRORS[case]
    refused(changed(published(), **changes), parts, tmp_path)


@pytest.mark.parametrize("case", TRANSFORMERS_ERRORS)
def test_transformers_error(case: str, tmp_path: Path) -> None:
    changes, parts = TRANSFORMERS_ERRORS[case]
    refused(changed(TRANSFORMERS, **changes), parts, tmp_path)


TEXTS = {
    "not json": ("{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "a list": ("[]", "holds a list"),
    "a key twice": (
        '{"model_type": "deepseek_v4", "model_type": "deepseek_v4"}',
        "'model_type' appears twice",
    ),
    "nan": ('{"model_type": "deepseek_v4", "hc_eps": NaN}', "NaN is not JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_no_config(case: str, tmp_path: Path) -> None:
    text, part = TEXTS[case]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_config(tmp_path)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 400])
def test_numbers_no_float_can_hold(number: str, tmp_path: Path) -> None:
    text = json.dumps(changed(TRANSFORMERS, hc_eps=12345)).replace("12345", number)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="'hc_eps'"):
        load_config(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path)
