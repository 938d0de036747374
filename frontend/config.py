"""Reads config.json into a validated `ModelConfig`.

Owns the two spellings of a DeepSeek-V4 configuration: the published one (`compress_ratios`,
`num_hash_layers`, `rope_scaling`) and the one transformers 5 writes (`layer_types`, `compress_rates`,
`mlp_layer_types`, `rope_parameters`). Knows nothing of tensors. Source: model specification, section 1.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from dsv4c.errors import ConfigError

from .keys import Keys
from .safetensors import parse_json


class LayerKind(enum.Enum):
    """How a layer attends beyond its sliding window. The value is the name transformers uses."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"  # overlapping compressor and an indexer that picks entries
    HCA = "heavily_compressed_attention"  # plain compressor, every complete entry is visible


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies of compressed layers (specification, section 3.6)."""

    factor: float
    original: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one DeepSeek-V4 checkpoint.

    Attributes:
        rope_dim: rotated channels; they are the LAST `rope_dim` of `head_dim`.
        layer_kinds, compress_ratios, hash_layers: one entry per layer; the ratio is 0 exactly for SLIDING.
        yarn: applies to compressed layers only, with `compress_rope_theta`; None without scaling.
        n_mtp_layers: MTP blocks the checkpoint may carry after the last layer.
        bos_token_id: None when the file names none.
        eos_token_ids: every id that ends a text; may be empty.
        expert_dtype: "fp4", "fp8" or None as the file says; the stored tensors decide what is read.
        weight_block_size: rows and columns that share one FP8 scale.
        raw: the parsed file.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    layer_kinds: tuple[LayerKind, ...]
    compress_ratios: tuple[int, ...]
    hash_layers: tuple[bool, ...]
    n_routed_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    n_mtp_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    expert_dtype: str | None
    weight_block_size: tuple[int, int]
    raw: dict[str, object] = field(repr=False, compare=False, hash=False)


def load_config(directory: str | Path) -> ModelConfig:
    """Read `directory`/config.json.

    Raises:
        ConfigError: the file is missing or not JSON, describes another kind of model, or has a key that
            is unknown, missing, of the wrong type or of an impossible value. Says what is allowed.
    """
    path = Path(directory) / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "no such file", where=str(path), hint="a checkpoint directory holds config.json and *.safetensors"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None
    return parse_config(parse_json(text, str(path), ConfigError), str(path))


def parse_config(raw: dict[str, object], where: str = "config.json") -> ModelConfig:
    """Build a `ModelConfig` from the parsed file; `where` names it in errors.

    Raises:
        ConfigError: see `load_config`.
    """
    _check_model_type(raw, where)
    _check_keys(raw, where)
    keys = Keys(raw, where)
    _check_fixed(keys)
    layers = keys.integer("num_hidden_layers")
    n_mtp = keys.integer("num_nextn_predict_layers", 0, at_least=0)
    kinds, ratios = _layer_kinds(keys, layers, n_mtp)
    head_dim = keys.integer("head_dim")
    rope_theta, compress_theta, yarn = _rope(keys)
    expert_dtype, block = _quantization(keys)
    config = ModelConfig(
        **{name: keys.integer(key) for name, key in _SIZES.items()},
        routed_scaling_factor=keys.number("routed_scaling_factor"),
        swiglu_limit=keys.number("swiglu_limit"),
        hc_eps=keys.number("hc_eps"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        num_hidden_layers=layers,
        head_dim=head_dim,
        rope_dim=_rope_dim(keys, head_dim),
        layer_kinds=kinds,
        compress_ratios=ratios,
        hash_layers=_hash_layers(keys, layers),
        rope_theta=rope_theta,
        compress_rope_theta=compress_theta,
        yarn=yarn,
        n_mtp_layers=n_mtp,
        bos_token_id=keys.token("bos_token_id"),
        eos_token_ids=_eos(keys),
        expert_dtype=expert_dtype,
        weight_block_size=block,
        raw=raw,
    )
    _check_relations(config, where)
    return config


# ------------------------------------------------------------------------------------ the keys

_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank", "o_groups": "o_groups", "o_lora_rank": "o_lora_rank",
    "sliding_window": "sliding_window", "n_routed_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok", "moe_intermediate_size": "moe_intermediate_size",
    "index_n_heads": "index_n_heads", "index_head_dim": "index_head_dim", "index_topk": "index_topk",
    "hc_mult": "hc_mult", "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
"""Attribute -> key of every plain positive integer."""

_HARMLESS = frozenset({
    # who wrote the file, and in which number format its tensors are (the tensors say that themselves)
    "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map",
    # training
    "initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "aux_loss_alpha", "seq_aux", "pretraining_tp",
    # how a framework calls the model
    "use_cache", "pad_token_id", "return_dict", "output_attentions", "output_hidden_states",
    "is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "ep_size",
    "_attn_implementation", "_experts_implementation", "attn_implementation", "experts_implementation",
})  # fmt: skip
"""Keys that do not change what the model computes."""

_UNSUPPORTED = {
    "dspark": "the DSpark drafter", "vision": "image input", "image": "image input",
    "engram": "Engram memory", "text_config": "a model with several parts",
}  # fmt: skip
"""Beginning of a key -> the feature behind it."""

_ONE_OF_TWO = "one of the two, or equal meaning"
_UNSUPPORTED_TYPES = {
    "deepseek_v41": "DeepSeek-V4.1 (Engram, shared compressed attention, vision)",
    "deepseek_v41_text": "the text part of DeepSeek-V4.1",
    "deepseek_v4_vl": "DeepSeek-V4 with vision",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v32": "DeepSeek-V3.2",
}

_FIXED: dict[str, object] = {
    "n_shared_experts": 1,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
}
"""Keys that describe a choice every DeepSeek-V4 model makes the same way; absent means that choice."""

_SPECIAL = frozenset({
    "model_type", "num_hidden_layers", "num_nextn_predict_layers", "head_dim", "qk_rope_head_dim",
    "partial_rotary_factor", "compress_ratios", "layer_types", "compress_rates", "num_hash_layers",
    "mlp_layer_types", "rope_theta", "compress_rope_theta", "rope_scaling", "rope_parameters", "bos_token_id",
    "eos_token_id", "expert_dtype", "quantization_config", "routed_scaling_factor", "swiglu_limit", "hc_eps",
    "rms_norm_eps",
})  # fmt: skip
"""Keys that are read by name."""

_KNOWN = _SPECIAL | _HARMLESS | set(_FIXED) | set(_SIZES.values())


def _check_keys(raw: dict[str, object], where: str) -> None:
    for key in sorted(raw.keys() - _KNOWN):
        for start, feature in _UNSUPPORTED.items():
            if key.startswith(start):
                raise ConfigError(f"key {key!r}: {feature} is not supported yet", where=where)
        raise Keys(raw, where).unknown(key, _KNOWN)


def _check_model_type(raw: dict[str, object], where: str) -> None:
    kind = raw.get("model_type")
    if kind == "deepseek_v4":
        return
    if kind is None:
        raise ConfigError("key 'model_type' is missing", where=where, allowed='"deepseek_v4"')
    if isinstance(kind, str) and kind in _UNSUPPORTED_TYPES:
        raise ConfigError(
            f"model_type {kind!r} ({_UNSUPPORTED_TYPES[kind]}) is not supported yet", where=where,
            allowed='"deepseek_v4"',
        )  # fmt: skip
    raise ConfigError(f"model_type {kind!r} is unknown", where=where, allowed='"deepseek_v4"')


def _check_fixed(keys: Keys) -> None:
    for key, allowed in _FIXED.items():
        value = keys.raw.get(key, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise keys.error(key, repr(value), repr(allowed))


def _layer_kinds(keys: Keys, layers: int, n_mtp: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Kind and ratio of every layer, from either spelling; both spellings must agree when both are there."""
    published = _from_ratios(keys, layers, n_mtp) if "compress_ratios" in keys.raw else None
    typed = _from_types(keys, layers) if "layer_types" in keys.raw else None
    if published and typed and published != typed:
        raise keys.error("layer_types", "a contradiction to compress_ratios", _ONE_OF_TWO)
    found = published or typed
    if found is None:
        raise keys.missing("compress_ratios", "compress_ratios, or layer_types with compress_rates")
    return found


def _from_ratios(keys: Keys, layers: int, n_mtp: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    ratios = keys.integers("compress_ratios", at_least=0)
    if len(ratios) not in (layers, layers + n_mtp):
        allowed = f"{layers} entries (num_hidden_layers), or {layers + n_mtp} with the MTP blocks"
        raise keys.error("compress_ratios", f"a list of {len(ratios)}", allowed)
    if any(ratios[layers:]):
        raise keys.error("compress_ratios", f"{list(ratios[layers:])} for the MTP blocks", "0 for each")
    if 1 in ratios:
        raise keys.error("compress_ratios", "an entry 1", "0 for no compression, or at least 2")
    kinds = {0: LayerKind.SLIDING, 4: LayerKind.CSA}
    return tuple(kinds.get(r, LayerKind.HCA) for r in ratios[:layers]), ratios[:layers]


def _from_types(keys: Keys, layers: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    names = keys.choices("layer_types", tuple(k.value for k in LayerKind), layers)
    kinds = tuple(LayerKind(name) for name in names)
    rates = keys.nested("compress_rates", required=any(k is not LayerKind.SLIDING for k in kinds))
    known = (LayerKind.CSA.value, LayerKind.HCA.value)
    for extra in rates.raw.keys() - set(known):
        raise keys.error("compress_rates", f"a key {extra!r}", " and ".join(known))
    rate = {LayerKind.SLIDING: 0}
    for kind in set(kinds) - {LayerKind.SLIDING}:
        rate[kind] = rates.integer(kind.value, at_least=2)
    return kinds, tuple(rate[k] for k in kinds)


def _hash_layers(keys: Keys, layers: int) -> tuple[bool, ...]:
    by_count = by_type = None
    if "num_hash_layers" in keys.raw:
        count = keys.integer("num_hash_layers", at_least=0)
        if count > layers:
            raise keys.error("num_hash_layers", str(count), f"0 to {layers} (num_hidden_layers)")
        by_count = tuple(i < count for i in range(layers))
    if "mlp_layer_types" in keys.raw:
        by_type = tuple(t == "hash_moe" for t in keys.choices("mlp_layer_types", ("hash_moe", "moe"), layers))
    if by_count and by_type and by_count != by_type:
        raise keys.error("mlp_layer_types", "a contradiction to num_hash_layers", _ONE_OF_TWO)
    found = by_count or by_type
    if found is None:
        raise keys.missing("num_hash_layers", "num_hash_layers or mlp_layer_types")
    return found


def _rope_dim(keys: Keys, head_dim: int) -> int:
    """`qk_rope_head_dim`, or the part of the head that transformers' `partial_rotary_factor` selects."""
    if "partial_rotary_factor" not in keys.raw or keys.raw["partial_rotary_factor"] is None:
        return keys.integer("qk_rope_head_dim")
    exact = head_dim * keys.number("partial_rotary_factor")
    dim = keys.integer("qk_rope_head_dim", int(exact + 1e-6))
    if abs(dim - exact) >= 1:
        raise keys.error("qk_rope_head_dim", str(dim), f"head_dim * partial_rotary_factor = {exact:g}")
    return dim


def _rope(keys: Keys) -> tuple[float, float, Yarn | None]:
    """(theta of sliding layers, theta of compressed layers, YaRN)."""
    flat = keys.nested("rope_scaling")
    parameters = keys.nested("rope_parameters")
    if not (parameters.raw.keys() & {"main", "compress"}):
        if flat.raw and parameters.raw:
            raise keys.error("rope_parameters", "given beside rope_scaling", "one of the two")
        thetas = (keys.number("rope_theta"), keys.number("compress_rope_theta"))
        return *thetas, _yarn(parameters if parameters.raw else flat)
    main, compress = parameters.nested("main", required=True), parameters.nested("compress", required=True)
    if _yarn(main) is not None:
        raise main.error("rope_type", "'yarn'", "'default': sliding layers are not scaled")
    yarn = _yarn(compress)
    if flat.raw and _yarn(flat) != yarn:
        raise keys.error("rope_scaling", "a contradiction to rope_parameters", _ONE_OF_TWO)
    return main.number("rope_theta"), compress.number("rope_theta"), yarn


_ROPE_KEYS = {
    "type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "rope_theta",
    "partial_rotary_factor", "attention_factor", "truncate",
}  # fmt: skip


def _yarn(keys: Keys) -> Yarn | None:
    """The scaling one rotary dictionary describes; an empty one describes none."""
    for extra in keys.raw.keys() - _ROPE_KEYS:
        raise keys.unknown(extra, _ROPE_KEYS)
    kind = keys.choice("rope_type" if "rope_type" in keys.raw else "type", ("default", "yarn"), "default")
    if kind != "yarn":
        return None
    if keys.raw.get("attention_factor", 1.0) not in (1, None):
        raise keys.error("attention_factor", repr(keys.raw["attention_factor"]), "1.0")
    if keys.raw.get("truncate", True) is not True:
        raise keys.error("truncate", repr(keys.raw["truncate"]), "true")
    fast, slow = keys.number("beta_fast", 32.0), keys.number("beta_slow", 1.0)
    if fast <= slow:
        raise keys.error("beta_fast", repr(fast), f"more than beta_slow, {slow!r}")
    return Yarn(
        keys.number("factor", at_least=1.0), keys.integer("original_max_position_embeddings"), fast, slow
    )


def _eos(keys: Keys) -> tuple[int, ...]:
    if isinstance(keys.raw.get("eos_token_id"), list):
        return keys.integers("eos_token_id")
    one = keys.token("eos_token_id")
    return () if one is None else (one,)


def _quantization(keys: Keys) -> tuple[str | None, tuple[int, int]]:
    """(expert dtype, block of one FP8 scale); the block is 128 x 128 when nothing is said."""
    quant = keys.nested("quantization_config")
    if quant.raw:
        quant.choice("quant_method", ("fp8",))
        quant.choice("fmt", ("e4m3",), "e4m3")
        quant.choice("scale_fmt", ("ue8m0", "float"), "float")
        quant.choice("activation_scheme", ("dynamic",), "dynamic")
    block = quant.integers("weight_block_size", (128, 128), at_least=1)
    if len(block) != 2:
        raise quant.error("weight_block_size", str(list(block)), "two numbers: rows and columns")
    inner = quant.choice("expert_dtype", ("fp4", "fp8"), None)
    return keys.choice("expert_dtype", ("fp4", "fp8"), inner), (block[0], block[1])


def _check_relations(c: ModelConfig, where: str) -> None:
    """What must hold between keys."""
    indexed = LayerKind.CSA in c.layer_kinds
    rules = (
        (c.experts_per_token <= c.n_routed_experts, "num_experts_per_tok", c.experts_per_token,
         f"at most n_routed_experts, {c.n_routed_experts}"),
        (c.heads % c.o_groups == 0, "o_groups", c.o_groups, f"a divisor of num_attention_heads, {c.heads}"),
        (c.rope_dim % 2 == 0, "qk_rope_head_dim", c.rope_dim, "an even number"),
        (c.rope_dim <= c.head_dim, "qk_rope_head_dim", c.rope_dim, f"at most head_dim, {c.head_dim}"),
        (not indexed or c.rope_dim <= c.index_head_dim, "index_head_dim", c.index_head_dim,
         f"at least qk_rope_head_dim, {c.rope_dim}"),
        (c.bos_token_id is None or c.bos_token_id < c.vocab_size, "bos_token_id", c.bos_token_id,
         f"below vocab_size, {c.vocab_size}"),
        (all(t < c.vocab_size for t in c.eos_token_ids), "eos_token_id", list(c.eos_token_ids),
         f"below vocab_size, {c.vocab_size}"),
    )  # fmt: skip
    for ok, key, value, allowed in rules:
        if not ok:
            raise ConfigError(f"key {key!r} is {value}", where=where, allowed=allowed)
