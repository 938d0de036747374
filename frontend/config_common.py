"""What the configurations of DeepSeek-V4 and V4.1 have in common: keys, how they are read, what must hold.

Takes one flat JSON object in the published spelling. Knows neither generation's own keys nor files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from .architecture import ModelConfig, Yarn
from .keys import Keys

_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_hidden_layers",
    "heads": "num_attention_heads", "head_dim": "head_dim",
    "q_lora_rank": "q_lora_rank", "o_groups": "o_groups", "o_lora_rank": "o_lora_rank",
    "sliding_window": "sliding_window", "n_routed_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok", "moe_intermediate_size": "moe_intermediate_size",
    "index_n_heads": "index_n_heads", "index_head_dim": "index_head_dim", "index_topk": "index_topk",
    "hc_mult": "hc_mult", "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
"""Attribute -> key of every plain positive integer."""

_NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")

HARMLESS = frozenset({
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

FIXED: dict[str, object] = {
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
"""Keys that describe a choice every model makes the same way; absent means that choice."""

_SPECIAL = frozenset({
    "model_type", "num_nextn_predict_layers", "qk_rope_head_dim", "partial_rotary_factor", "compress_ratios",
    "rope_theta", "compress_rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id",
    "expert_dtype", "quantization_config",
})  # fmt: skip

COMMON = HARMLESS | _SPECIAL | set(FIXED) | set(_SIZES.values()) | set(_NUMBERS)
"""Every key that may stand in either generation's configuration."""

ONE_OF_TWO = "one of the two, or equal meaning"

Rule = tuple[bool, str, object, str]
"""What must hold between keys: whether it does, the key to blame, its value and what was allowed."""


def check_known(keys: Keys, known: Collection[str]) -> None:
    """Refuse the first key that is not known."""
    for key in sorted(keys.raw.keys() - set(known)):
        raise keys.unknown(key, known)


def check_fixed(keys: Keys, fixed: Mapping[str, object]) -> None:
    """Refuse another choice than the one every model makes."""
    for key, allowed in fixed.items():
        value = keys.raw.get(key, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise keys.error(key, repr(value), repr(allowed))


def check_rules(keys: Keys, rules: Iterable[Rule]) -> None:
    """Refuse the first rule that does not hold; later ones may rely on it."""
    for ok, key, value, allowed in rules:
        if not ok:
            raise keys.error(key, str(value), allowed)


def common_fields(keys: Keys, shared: Keys, block: int) -> dict[str, Any]:
    """The fields of `ModelConfig` that both generations read alike.

    Args:
        shared: where special tokens and quantisation stand.
        block: rows and columns of one FP8 scale when nothing is said.
    """
    head_dim = keys.integer("head_dim")
    rope_theta, compress_theta, yarn = _rope(keys)
    expert_dtype, tile = _quantization(shared, block)
    return {
        **{name: keys.integer(key) for name, key in _SIZES.items()},
        **{name: keys.number(name) for name in _NUMBERS},
        "rope_dim": _rope_dim(keys, head_dim),
        "rope_theta": rope_theta,
        "compress_rope_theta": compress_theta,
        "yarn": yarn,
        "n_mtp_layers": keys.integer("num_nextn_predict_layers", 0, at_least=0),
        "bos_token_id": shared.token("bos_token_id"),
        "eos_token_ids": _eos(shared),
        "expert_dtype": expert_dtype,
        "weight_block_size": tile,
    }


def layer_ratios(keys: Keys, layers: int, n_mtp: int) -> tuple[int, ...]:
    """`compress_ratios` of the layers; those of MTP blocks may follow and are 0."""
    ratios = keys.integers("compress_ratios", at_least=0)
    if len(ratios) not in (layers, layers + n_mtp):
        allowed = f"{layers} entries (num_hidden_layers), or {layers + n_mtp} with the MTP blocks"
        raise keys.error("compress_ratios", f"a list of {len(ratios)}", allowed)
    if any(ratios[layers:]):
        raise keys.error("compress_ratios", f"{list(ratios[layers:])} for the MTP blocks", "0 for each")
    return ratios[:layers]


def common_rules(c: ModelConfig, *, indexed: bool) -> Iterator[Rule]:
    """What must hold in both generations; `indexed` says whether any layer picks entries."""
    below = f"below vocab_size, {c.vocab_size}"
    yield (c.experts_per_token <= c.n_routed_experts, "num_experts_per_tok", c.experts_per_token,
           f"at most n_routed_experts, {c.n_routed_experts}")  # fmt: skip
    yield (c.heads % c.o_groups == 0, "o_groups", c.o_groups,
           f"a divisor of num_attention_heads, {c.heads}")  # fmt: skip
    yield c.rope_dim % 2 == 0, "qk_rope_head_dim", c.rope_dim, "an even number"
    yield c.rope_dim <= c.head_dim, "qk_rope_head_dim", c.rope_dim, f"at most head_dim, {c.head_dim}"
    yield (not indexed or c.rope_dim <= c.index_head_dim, "index_head_dim", c.index_head_dim,
           f"at least qk_rope_head_dim, {c.rope_dim}")  # fmt: skip
    yield c.bos_token_id is None or c.bos_token_id < c.vocab_size, "bos_token_id", c.bos_token_id, below
    eos = c.eos_token_ids
    yield all(t < c.vocab_size for t in eos), "eos_token_id", list(eos), below


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
        raise keys.error("rope_scaling", "a contradiction to rope_parameters", ONE_OF_TWO)
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


def _quantization(keys: Keys, size: int) -> tuple[str | None, tuple[int, int]]:
    """(expert dtype, block of one FP8 scale); the block is `size` squared when nothing is said."""
    quant = keys.nested("quantization_config")
    if quant.raw:
        quant.choice("quant_method", ("fp8",))
        quant.choice("fmt", ("e4m3",), "e4m3")
        quant.choice("scale_fmt", ("ue8m0", "float"), "float")
        quant.choice("activation_scheme", ("dynamic",), "dynamic")
    block = quant.integers("weight_block_size", (size, size), at_least=1)
    if len(block) != 2:
        raise quant.error("weight_block_size", str(list(block)), "two numbers: rows and columns")
    inner = quant.choice("expert_dtype", ("fp4", "fp8"), None)
    return keys.choice("expert_dtype", ("fp4", "fp8"), inner), (block[0], block[1])
