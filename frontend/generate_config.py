"""Configurations of random checkpoints: presets, defaults, formats, the first layers of a larger model.

Gives published keys, complete, and for V4 those of transformers. Knows no tensors and no files.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.errors import UsageError

from .architecture import Generation, LayerKind, ModelConfig
from .config import parse_config
from .config_v41 import MODEL_TYPES, edit_text, is_flat
from .engram_hash import layer_hashes

Raw = dict[str, object]

BASE: Raw = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4",
    "bos_token_id": 0, "eos_token_id": 1,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "n_shared_experts": 1, "num_key_value_heads": 1, "scoring_func": "sqrtsoftplus", "norm_topk_prob": True,
    "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip
"""What every V4 model has; a configuration stands on top of it."""

_V41: Raw = {"architectures": ["DeepseekV41ForCausalLM"], "model_type": Generation.V41.value}
_V41_TEXT: Raw = {
    **{key: value for key, value in BASE.items() if key != "architectures"},
    "model_type": f"{Generation.V41.value}_text", "rms_norm_eps": 1e-20, "topk_method": "noaux_tc",
    "engram_pad_token_id": 2,
}  # fmt: skip
_V41_VISION: Raw = {
    "model_type": f"{Generation.V41.value}_vision", "patch_size": 14, "rope_theta": 10000.0,
    "downsample_ratio": 3, "max_wh_ratio": None,
}  # fmt: skip

PRESETS: dict[str, Raw] = {
    "tiny": dict(
        vocab_size=61, hidden_size=96, num_hidden_layers=4, compress_ratios=[0, 4, 16, 4], num_hash_layers=1,
        num_attention_heads=3, head_dim=40, qk_rope_head_dim=16, q_lora_rank=48, o_groups=3, o_lora_rank=24,
        sliding_window=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=56,
        index_n_heads=2, index_head_dim=32, index_topk=3, max_position_embeddings=512,
        rope_scaling={
            "type": "yarn", "factor": 4, "original_max_position_embeddings": 64,
            "beta_fast": 32, "beta_slow": 1,
        },
    ),
    "small": dict(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=12, compress_ratios=[0, 0, *[4, 128] * 5],
        num_hash_layers=3, num_attention_heads=16, head_dim=128, qk_rope_head_dim=16, q_lora_rank=384,
        o_groups=4, o_lora_rank=256, sliding_window=128, n_routed_experts=64, num_experts_per_tok=6,
        moe_intermediate_size=512, index_n_heads=8, index_head_dim=64, index_topk=128,
        max_position_embeddings=8192,
    ),
    "tiny-v41": dict(
        model_type=Generation.V41.value, image_token_id=510,
        text_config=dict(
            vocab_size=512, hidden_size=128, num_hidden_layers=8, num_nextn_predict_layers=2,
            num_attention_heads=4, head_dim=64, qk_rope_head_dim=16, q_lora_rank=64, o_groups=2,
            o_lora_rank=32, sliding_window=8, n_routed_experts=8, num_experts_per_tok=2,
            moe_intermediate_size=64, compress_ratios=[0, 0, 2, 2, 1, 1, 1, 1, 0, 0],
            kv_source_layer_ids=[2, 4], index_source_layer_ids=[2, 4, 6], index_n_heads=4, index_head_dim=32,
            index_topk=8, candidate_source_layer_id=4, candidate_topk_blocks=5, candidate_block_size=4,
            max_position_embeddings=4096,
            rope_scaling={
                "type": "yarn", "factor": 4, "original_max_position_embeddings": 64,
                "beta_fast": 32, "beta_slow": 1,
            },
            engram_layer_ids=[1, 3], engram_max_ngram_size=4, engram_vocab_size=1009, engram_n_heads=2,
            engram_head_dim=32, engram_compressed_vocab_size=400,
            dspark_block_size=5, dspark_noise_token_id=511, dspark_target_layer_ids=[6, 7],
            dspark_markov_rank=16, dspark_n_routed_experts=4, dspark_num_experts_per_tok=2,
        ),
        vision_config=dict(
            num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=96,
            max_image_tokens=64, min_pixels=7056,
        ),
    ),
    "small-v41": dict(
        model_type=Generation.V41.value, image_token_id=16382,
        text_config=dict(
            vocab_size=16384, hidden_size=1024, num_hidden_layers=12, num_nextn_predict_layers=2,
            num_attention_heads=16, head_dim=128, qk_rope_head_dim=32, q_lora_rank=384, o_groups=4,
            o_lora_rank=256, sliding_window=128, n_routed_experts=16, num_experts_per_tok=4,
            moe_intermediate_size=320, compress_ratios=[0, 0, *[2] * 4, *[1] * 6, 0, 0],
            kv_source_layer_ids=[2, 4, 6], index_source_layer_ids=[2, 4, 6, 8, 10], index_n_heads=8,
            index_head_dim=64, index_topk=128, candidate_source_layer_id=6, candidate_topk_blocks=64,
            candidate_block_size=8, max_position_embeddings=8192,
            rope_scaling={
                "type": "yarn", "factor": 4, "original_max_position_embeddings": 2048,
                "beta_fast": 32, "beta_slow": 1,
            },
            engram_layer_ids=[1, 4], engram_max_ngram_size=4, engram_vocab_size=10000, engram_n_heads=4,
            engram_head_dim=256, engram_compressed_vocab_size=12500,
            dspark_block_size=5, dspark_noise_token_id=16383, dspark_target_layer_ids=[9, 10, 11],
            dspark_markov_rank=64, dspark_n_routed_experts=8, dspark_num_experts_per_tok=3,
        ),
        vision_config=dict(
            num_hidden_layers=6, hidden_size=256, num_attention_heads=4, intermediate_size=704,
            max_image_tokens=256, min_pixels=112896,
        ),
    ),
}  # fmt: skip
"""Published keys on top of the defaults. "tiny…" have every feature, "small…" are for benchmarks."""

FLOATS = {"published": "bfloat16", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""Number format of a checkpoint -> what `torch_dtype` says."""


def published_config(config: Mapping[str, object], dtype: str, e8m0: bool, mtp: int | None, keep: int) -> Raw:
    """Every key of a checkpoint's configuration, in the form of `config`.

    Args:
        config: on top of the defaults; a V4.1 one is nested, the text part alone, or flat. Without
            `engram_num_embeddings` it gets those that its hash asks for.
        dtype: a key of `FLOATS`; "published" writes `quantization_config` if there is none.
        e8m0: whether scales of FP8 are powers of two.
        mtp: number of MTP blocks (V4.1: draft layers); None is none, for V4.1 as many as `config` says.
        keep: how many of the first layers; 0 is all.

    Raises:
        ConfigError: the result is no valid configuration.
        UsageError: the model has not so many layers.
    """
    if is_v41(config):
        return _v41_config(config, dtype, e8m0, mtp, keep)
    mtp = mtp or 0
    out = {**BASE, **config, "num_nextn_predict_layers": mtp, "torch_dtype": FLOATS[dtype]}
    ratios, layers = out.get("compress_ratios"), out.get("num_hidden_layers")
    if keep and isinstance(layers, int):
        _check_layers(keep, layers)
        hashed, layers = out.get("num_hash_layers", 0), keep
        out["num_hidden_layers"] = keep
        out["num_hash_layers"] = min(hashed, keep) if isinstance(hashed, int) else hashed
    if isinstance(ratios, list) and isinstance(layers, int):
        out["compress_ratios"] = [*ratios[:layers], *[0] * mtp]
    if dtype == "published":
        out.setdefault("quantization_config", {**_quantization(e8m0, 128), "fmt": "e4m3"})
        out.setdefault("expert_dtype", "fp4")
    return out


def text_of(config: Mapping[str, object]) -> Mapping[str, object]:
    """The keys of the text part, as they are spelt."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def with_room(config: Mapping[str, object], tokens: int) -> Raw:
    """`config` with a vocabulary of at least `tokens`.

    One that grows gets the tokenizer's size, in V4.1 two more: the token of images and the noise of drafts.
    """
    text = text_of(config)
    size = text.get("vocab_size")
    if isinstance(size, int) and size >= tokens:
        return dict(config)
    if not is_v41(config):
        return {**config, "vocab_size": tokens}
    places = {"vocab_size": tokens + 2, "dspark_noise_token_id": tokens + 1}
    raw = edit_text(config, {key: value for key, value in places.items() if key in text})
    return raw | ({"image_token_id": tokens} if "image_token_id" in raw else {})


def with_classes(config: Mapping[str, object], classes: int) -> Raw:
    """`config` whose Engram layers, if there are any, compress the vocabulary to so many classes."""
    key = "engram_compressed_vocab_size"
    return edit_text(config, {key: classes}) if key in text_of(config) else dict(config)


def _check_layers(keep: int, layers: int) -> None:
    if not 0 < keep <= layers:
        raise UsageError(f"{keep} layers", allowed=f"1 to {layers}, or 0 for all")


def _quantization(e8m0: bool, block: int) -> Raw:
    scales: Raw = {"scale_fmt": "ue8m0"} if e8m0 else {}
    common = {"quant_method": "fp8", "activation_scheme": "dynamic", **scales}
    return {**common, "weight_block_size": [block, block]}


# ---------------------------------------------------------------------------------------- V4.1


def is_v41(config: Mapping[str, object]) -> bool:
    """Whether these are keys of a V4.1 model, in any of its forms."""
    return config.get("model_type") in MODEL_TYPES or is_flat(config)


def _v41_config(config: Mapping[str, object], dtype: str, e8m0: bool, mtp: int | None, keep: int) -> Raw:
    raw = {**_completed(config), "torch_dtype": FLOATS[dtype]}
    if dtype == "published":
        raw.setdefault("quantization_config", {**_quantization(e8m0, 32), "expert_dtype": "fp4"})
    model = parse_config(raw, "config of the generator")
    if keep:
        _check_layers(keep, model.num_hidden_layers)
    n_mtp = model.n_mtp_layers if mtp is None else mtp
    return edit_text(raw, _first_layers(model, keep or model.num_hidden_layers, n_mtp))


def _completed(config: Mapping[str, object]) -> Raw:
    """With the defaults of its form, and with the rows of its Engram tables."""
    raw, vision = dict(config), config.get("vision_config")
    if isinstance(vision, dict):
        raw["vision_config"] = {**_V41_VISION, **vision}
    text = config.get("text_config")
    if isinstance(text, dict):
        raw = {**_V41, **raw, "text_config": _with_rows({**_V41_TEXT, **text})}
    elif config.get("model_type") in MODEL_TYPES[1:]:
        raw = _with_rows({**_V41_TEXT, **raw})
    return raw


def _with_rows(text: Raw) -> Raw:
    """`engram_num_embeddings` where it is missing and all that decides it is there."""
    names = ("engram_layer_ids", "engram_vocab_size", "engram_max_ngram_size", "engram_n_heads",
             "engram_compressed_vocab_size")  # fmt: skip
    layers, size, longest, heads, classes = (text.get(name) for name in names)
    counts = [n for n in (size, longest, heads, classes) if type(n) is int and n > 0]
    if "engram_num_embeddings" in text or not isinstance(layers, list) or not layers or len(counts) < 4:
        return text
    start, most, each, words = counts
    hashes = layer_hashes(layers, (start,) * (most - 1), each, words)
    return {**text, "engram_num_embeddings": [hashes[layer].rows for layer in layers]}


def _first_layers(c: ModelConfig, keep: int, mtp: int) -> Raw:
    """Published keys of the text part that say: the first `keep` layers, `mtp` draft layers behind them.

    Who publishes what stays, as do the rows of Engram tables: primes are handed out from the first layer on.
    Draft layers whose target layers are gone take the last ones there are.
    """
    shared, e, drafter = c.shared, c.engram, c.drafter
    assert shared is not None, "every V4.1 model has it"
    source = shared.candidate_source
    out: Raw = {
        "num_hidden_layers": keep, "num_nextn_predict_layers": mtp,
        "compress_ratios": [*c.compress_ratios[:keep], *[0] * mtp],
        "kv_source_layer_ids": [s for s in shared.kv_sources if s < keep],
        "index_source_layer_ids": [s for s in shared.index_sources if s < keep],
        "candidate_source_layer_id": -1 if source is None or source >= keep else source,
    }  # fmt: skip
    if e:
        left = [layer for layer in e.layers if layer < keep]
        out |= {"engram_layer_ids": left, "engram_num_embeddings": list(e.rows[: len(left)])}
    if drafter and drafter.targets[-1] >= keep:
        out["dspark_target_layer_ids"] = list(range(max(keep - len(drafter.targets), 0), keep))
    return out


# -------------------------------------------------------------------------------- transformers


def transformers_config(raw: Raw, c: ModelConfig) -> Raw:
    """The same V4 model with the keys `save_pretrained` of transformers 5.23 writes.

    Raises:
        UsageError: transformers has no such configuration.
    """
    if c.generation is not Generation.V4:
        what = f"the style of transformers for {c.generation.value}, which it does not have"
        raise UsageError(what, allowed="published")
    gone = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")
    out = {key: value for key, value in raw.items() if key not in gone}
    rates = {LayerKind.CSA.value: 4, LayerKind.HCA.value: 128}
    for kind in (LayerKind.CSA, LayerKind.HCA):
        found = {r for k, r in zip(c.layer_kinds, c.compress_ratios, strict=True) if k is kind}
        if len(found) > 1:
            raise UsageError(
                f"ratios {sorted(found)} of {kind.value}",
                allowed="one ratio per kind in transformers' configuration",
            )
        rates[kind.value] = found.pop() if found else rates[kind.value]
    factor = c.rope_dim / c.head_dim
    compress: Raw = {"rope_type": "default"}
    if c.yarn:
        compress = {
            "rope_type": "yarn", "factor": c.yarn.factor, "original_max_position_embeddings": c.yarn.original,
            "beta_fast": c.yarn.beta_fast, "beta_slow": c.yarn.beta_slow, "attention_factor": 1.0,
        }  # fmt: skip
    common = {"partial_rotary_factor": factor}
    return out | {
        "layer_types": [k.value for k in c.layer_kinds],
        "compress_rates": rates,
        "mlp_layer_types": ["hash_moe" if h else "moe" for h in c.hash_layers],
        "partial_rotary_factor": factor,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": c.rope_theta, **common},
            "compress": {**compress, "rope_theta": c.compress_rope_theta, **common},
        },
        "dtype": raw["torch_dtype"],
    }
