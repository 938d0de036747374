"""Reads the configuration of a DeepSeek-V4.1 model.

Owns its three forms: nested (`text_config`, `vision_config`), the text part alone, and the flat one that the
reference code reads (`dim`, `kv_source_layers`, `vision_dim`). Knows nothing of tensors and files. Source:
specification of V4.1, section 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .architecture import (
    Drafter,
    EngramTables,
    Generation,
    LayerKind,
    ModelConfig,
    SharedAttention,
    VisionTower,
)
from .config_common import (
    COMMON,
    FIXED,
    HARMLESS,
    Rule,
    check_fixed,
    check_known,
    check_rules,
    common_fields,
    common_rules,
    layer_ratios,
)
from .engram_hash import layer_hashes
from .keys import Keys

_TEXT_TYPE = f"{Generation.V41.value}_text"
MODEL_TYPES = (Generation.V41.value, _TEXT_TYPE)
"""What `model_type` may say of a V4.1 model; the second one has no image encoder."""

_SHARED = ("bos_token_id", "eos_token_id", "quantization_config", "expert_dtype")
"""Keys of the text part that may stand beside it."""

_TEXT = COMMON | {
    "kv_source_layer_ids", "index_source_layer_ids", "candidate_source_layer_id", "candidate_topk_blocks",
    "candidate_block_size", "gate_temp", "num_hash_layers",
    "engram_layer_ids", "engram_num_embeddings", "engram_max_ngram_size", "engram_vocab_size",
    "engram_n_heads", "engram_head_dim", "engram_compressed_vocab_size", "engram_pad_token_id",
    "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank",
    "dspark_n_routed_experts", "dspark_num_experts_per_tok",
}  # fmt: skip
_VISION = frozenset({
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "patch_size",
    "rope_theta", "downsample_ratio", "max_image_tokens", "min_pixels", "max_wh_ratio",
})  # fmt: skip
_VISION_FIXED: dict[str, object] = {"model_type": f"{Generation.V41.value}_vision"}
_TOP_FIXED: dict[str, object] = {"tie_word_embeddings": False}
_TOP = HARMLESS | {"model_type", "text_config", "vision_config", "image_token_id", *_TOP_FIXED, *_SHARED}
_TEXT_FIXED = {**FIXED, "num_hash_layers": 0}


@dataclass(frozen=True)
class _Parts:
    """One configuration taken apart, in the published spelling.

    Attributes:
        top: what stands beside the parts.
        shared: special tokens and quantisation, from wherever they stand.
        vision: None without an image encoder.
    """

    top: Keys
    text: Keys
    shared: Keys
    vision: Keys | None


def parse_v41(raw: dict[str, object], where: str) -> ModelConfig:
    """Build the `ModelConfig` of a V4.1 model; `where` names the file in errors.

    The flat form says nothing of the longest text it is meant for (`max_seq_len` is how long the reference
    code makes its buffers). There, unless `max_position_embeddings` stands beside, it is what YaRN scales to.

    Raises:
        ConfigError: a key is unknown, missing, of the wrong type or of an impossible value.
    """
    parts = _flat(raw, where) if is_flat(raw) else _nested(raw, where)
    text = parts.text
    fields = common_fields(text, parts.shared, 32)
    layers, n_mtp = fields["num_hidden_layers"], fields["n_mtp_layers"]
    ratios = layer_ratios(text, layers, n_mtp)
    config = ModelConfig(
        **fields,
        layer_kinds=tuple(LayerKind.SHARED if r else LayerKind.SLIDING for r in ratios),
        compress_ratios=ratios,
        hash_layers=(False,) * layers,
        raw=raw,
        generation=Generation.V41,
        gate_temperature=text.number("gate_temp", 1.0),
        shared=_shared_attention(text),
        engram=_engram(text),
        vision=_vision(parts.vision, parts.top) if parts.vision else None,
        drafter=_drafter(text) if n_mtp else None,
    )
    check_rules(text, _text_rules(config))
    if parts.vision and config.vision:
        check_rules(parts.vision, _vision_rules(config.vision))
        _check_image_token(parts.top, config)
    return config


# --------------------------------------------------------------------------------- the forms


def _nested(raw: dict[str, object], where: str) -> _Parts:
    top = Keys(raw, where)
    if raw.get("model_type") == _TEXT_TYPE:
        text, vision = top, None
    else:
        check_known(top, _TOP)
        check_fixed(top, _TOP_FIXED)
        text = top.nested("text_config", required=True)
        text.choice("model_type", (_TEXT_TYPE,), None)
        vision = top.nested("vision_config") if raw.get("vision_config") is not None else None
    check_known(text, _TEXT)
    check_fixed(text, _TEXT_FIXED)
    if vision:
        check_known(vision, _VISION | HARMLESS | set(_VISION_FIXED))
        check_fixed(vision, _VISION_FIXED)
    return _Parts(top, text, _shared(top, text), vision)


def _shared(top: Keys, text: Keys) -> Keys:
    for key in _SHARED:
        if key in top.raw and key in text.raw and top.raw[key] != text.raw[key]:
            raise top.error(key, f"{top.raw[key]!r}, a contradiction to that of text_config", "one value")
    both = {**text.raw, **top.raw}
    return Keys({key: both[key] for key in _SHARED if key in both}, top.where, top.names)


_FLAT = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "moe_inter_dim": "moe_intermediate_size", "n_hash_layers": "num_hash_layers",
    "n_mtp_layers": "num_nextn_predict_layers", "n_activated_experts": "num_experts_per_tok",
    "route_scale": "routed_scaling_factor", "score_func": "scoring_func", "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window", "norm_eps": "rms_norm_eps",
    "kv_source_layers": "kv_source_layer_ids", "index_source_layers": "index_source_layer_ids",
    "candidate_source_layer": "candidate_source_layer_id", "engram_pad_id": "engram_pad_token_id",
    "dspark_n_activated_experts": "dspark_num_experts_per_tok",
}  # fmt: skip
"""Key of the flat form -> the published key, where they differ."""

_FLAT_YARN = {
    "rope_factor": "factor", "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow",
}  # fmt: skip
_FLAT_VISION = {
    "vision_n_layers": "num_hidden_layers", "vision_dim": "hidden_size",
    "vision_n_heads": "num_attention_heads", "vision_inter_dim": "intermediate_size",
    "vision_patch_size": "patch_size", "vision_rope_theta": "rope_theta",
    "vision_downsample_ratio": "downsample_ratio", "vision_max_n_token": "max_image_tokens",
    "vision_min_pixels": "min_pixels", "vision_max_wh_ratio": "max_wh_ratio",
}  # fmt: skip
_FLAT_HARMLESS = {"max_batch_size", "max_seq_len", "scale_fmt", "scale_dtype", "temperature"}


def is_flat(raw: Mapping[str, object]) -> bool:
    """Whether a configuration is in the flat form of V4.1's reference code; such a file names no type."""
    return "kv_source_layers" in raw


def _flat(raw: dict[str, object], where: str) -> _Parts:
    names = {new: old for table in (_FLAT, _FLAT_YARN) for old, new in table.items()}
    file = Keys(raw, where, names)
    renamed = set(_FLAT.values()) | {"rope_scaling", "rope_parameters", "partial_rotary_factor"}
    check_known(
        Keys(raw, where),
        (_TEXT - renamed) | {*_FLAT, *_FLAT_YARN, *_FLAT_VISION, *_FLAT_HARMLESS, "image_token_id"},
    )
    text = {_FLAT.get(key, key): value for key, value in raw.items() if key not in _FLAT_VISION}
    if raw.get("original_seq_len"):  # 0: no scaling
        text["rope_scaling"] = {"type": "yarn"} | {n: raw[o] for o, n in _FLAT_YARN.items() if o in raw}
        text.setdefault("max_position_embeddings", _scaled_positions(file))
    keys = Keys(text, where, names)
    keys.choice("model_type", MODEL_TYPES, None)
    check_fixed(keys, _TEXT_FIXED)
    vision = {new: raw[old] for old, new in _FLAT_VISION.items() if old in raw}
    tower = Keys(vision, where, {new: old for old, new in _FLAT_VISION.items()})
    return _Parts(keys, keys, keys, tower if vision.get("num_hidden_layers") else None)


def edit_text(raw: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """A copy of a V4.1 configuration in which keys of the text part have other values.

    Args:
        changes: by published names; in the flat form they are written as that spells them.
    """
    text = raw.get("text_config")
    if isinstance(text, dict):
        return {**raw, "text_config": {**text, **changes}}
    spelt = {new: old for old, new in _FLAT.items()} if is_flat(raw) else {}
    return {**raw, **{spelt.get(key, key): value for key, value in changes.items()}}


def _scaled_positions(file: Keys) -> int:
    return int(file.integer("original_seq_len") * file.number("rope_factor", at_least=1.0))


# --------------------------------------------------------------------------------- the parts


def _shared_attention(keys: Keys) -> SharedAttention:
    source = keys.get("candidate_source_layer_id", lambda v: type(v) is int, "a layer, or -1 for none", -1)
    needed = 1 if source >= 0 else 0
    count, size = (
        keys.integer(key, at_least=1) if needed else keys.integer(key, 0, at_least=0)
        for key in ("candidate_topk_blocks", "candidate_block_size")
    )
    return SharedAttention(
        kv_sources=keys.integers("kv_source_layer_ids"),
        index_sources=keys.integers("index_source_layer_ids"),
        candidate_source=source if needed else None,
        candidate_blocks=count,
        candidate_size=size,
    )


def _engram(keys: Keys) -> EngramTables | None:
    layers = keys.integers("engram_layer_ids", ())
    if not layers:
        return None
    return EngramTables(
        layers=layers,
        rows=keys.integers("engram_num_embeddings", at_least=1),
        max_ngram=keys.integer("engram_max_ngram_size", at_least=2),
        table_size=keys.integer("engram_vocab_size", at_least=2),
        heads=keys.integer("engram_n_heads"),
        width=keys.integer("engram_head_dim"),
        compressed_vocab=keys.integer("engram_compressed_vocab_size"),
        pad_token=keys.integer("engram_pad_token_id", at_least=0),
    )


def _vision(keys: Keys, top: Keys) -> VisionTower:
    return VisionTower(
        layers=keys.integer("num_hidden_layers"),
        width=keys.integer("hidden_size"),
        heads=keys.integer("num_attention_heads"),
        inner=keys.integer("intermediate_size"),
        patch=keys.integer("patch_size"),
        rope_theta=keys.number("rope_theta"),
        downsample=keys.integer("downsample_ratio"),
        max_tokens=keys.integer("max_image_tokens", at_least=4),  # start, one image row of one, line end, end
        min_pixels=keys.integer("min_pixels", at_least=0),
        max_wh_ratio=None if keys.raw.get("max_wh_ratio") is None else keys.number("max_wh_ratio"),
        image_token=top.integer("image_token_id", at_least=0),
    )


def _drafter(keys: Keys) -> Drafter:
    return Drafter(
        block=keys.integer("dspark_block_size"),
        noise_token=keys.integer("dspark_noise_token_id", at_least=0),
        targets=keys.integers("dspark_target_layer_ids"),
        markov_rank=keys.integer("dspark_markov_rank"),
        experts=keys.integer("dspark_n_routed_experts"),
        experts_per_token=keys.integer("dspark_num_experts_per_tok"),
    )


# ---------------------------------------------------------------------- what must hold between


def _text_rules(c: ModelConfig) -> Iterator[Rule]:
    yield from common_rules(c, indexed=LayerKind.SHARED in c.layer_kinds)
    yield from _source_rules(c)
    if c.engram:
        yield from _engram_rules(c, c.engram)
    if c.drafter:
        yield from _drafter_rules(c, c.drafter)


def _rising(key: str, layers: Sequence[int], count: int) -> Rule:
    ok = all(a < b for a, b in pairwise(layers)) and all(i < count for i in layers)
    return ok, key, list(layers), f"rising layers of 0 to {count - 1}"


def _source_rules(c: ModelConfig) -> Iterator[Rule]:
    shared, ratios = c.shared, c.compress_ratios
    assert shared is not None, "every V4.1 model has it"
    yield max(ratios) <= 2, "compress_ratios", f"a list with {max(ratios)}", "0, 1 or 2 for each layer"
    compressed = [i for i, r in enumerate(ratios) if r]
    for key, sources in (
        ("kv_source_layer_ids", shared.kv_sources),
        ("index_source_layer_ids", shared.index_sources),
    ):
        yield _rising(key, sources, c.num_hidden_layers)
        idle = [s for s in sources if not ratios[s]]
        yield not idle, key, list(sources), f"layers with a compress ratio above 0; {idle} have 0"
        first = compressed[0] if compressed else 0
        yield (not compressed or (bool(sources) and sources[0] <= first), key, list(sources),
               f"a source at or before layer {first}, the first with a compress ratio above 0")  # fmt: skip
        for layer in compressed:
            source = max(s for s in sources if s <= layer)
            yield (ratios[layer] == ratios[source], key, list(sources),
                   f"a source of its own for layer {layer} with ratio {ratios[layer]}; that at or before it "
                   f"is layer {source} with ratio {ratios[source]}")  # fmt: skip
    candidate = shared.candidate_source
    yield (candidate is None or candidate in shared.index_sources, "candidate_source_layer_id", candidate,
           f"one of index_source_layer_ids, {list(shared.index_sources)}, or -1 for none")  # fmt: skip
    last = shared.kv_sources[-1] if shared.kv_sources else 0
    yield (candidate is None or candidate >= last, "candidate_source_layer_id", candidate,
           f"a layer from the last of kv_source_layer_ids on, {last}: blocks are of its entries")  # fmt: skip


def _engram_rules(c: ModelConfig, e: EngramTables) -> Iterator[Rule]:
    yield _rising("engram_layer_ids", e.layers, c.num_hidden_layers)
    yield (e.layers[0] > 0, "engram_layer_ids", list(e.layers),
           "layers from 1 on; Engram in front of the first layer is not supported")  # fmt: skip
    yield (len(e.rows) == len(e.layers), "engram_num_embeddings", f"a list of {len(e.rows)}",
           f"one number for each of engram_layer_ids, {len(e.layers)}")  # fmt: skip
    orders = e.max_ngram - 1
    yield ((columns := orders * e.heads * e.width) % 32 == 0, "engram_head_dim", e.width,
           f"a width with which {orders} orders of {e.heads} heads make a multiple of 32, not {columns}"
           )  # fmt: skip
    yield (e.compressed_vocab <= c.vocab_size, "engram_compressed_vocab_size", e.compressed_vocab,
           f"at most vocab_size, {c.vocab_size}")  # fmt: skip
    yield (e.pad_token < e.compressed_vocab, "engram_pad_token_id", e.pad_token,
           f"below engram_compressed_vocab_size, {e.compressed_vocab}")  # fmt: skip
    largest = (2**31 - 1) // (orders * e.heads)
    yield (e.table_size < largest, "engram_vocab_size", e.table_size,
           f"below {largest}, so that all rows of a layer fit int32")  # fmt: skip
    hashes = layer_hashes(e.layers, (e.table_size,) * orders, e.heads, e.compressed_vocab)
    rows = [hashes[layer].rows for layer in e.layers]
    yield (list(e.rows) == rows, "engram_num_embeddings", list(e.rows),
           f"{rows}, the sums of the primes from engram_vocab_size on")  # fmt: skip


def _drafter_rules(c: ModelConfig, d: Drafter) -> Iterator[Rule]:
    targets = "dspark_target_layer_ids"
    yield bool(d.targets), targets, [], "at least one layer"
    yield _rising(targets, d.targets, c.num_hidden_layers)
    yield (d.noise_token < c.vocab_size, "dspark_noise_token_id", d.noise_token,
           f"below vocab_size, {c.vocab_size}")  # fmt: skip
    yield (d.experts_per_token <= d.experts, "dspark_num_experts_per_tok", d.experts_per_token,
           f"at most dspark_n_routed_experts, {d.experts}")  # fmt: skip


def _vision_rules(v: VisionTower) -> Iterator[Rule]:
    yield v.width % v.heads == 0, "num_attention_heads", v.heads, f"a divisor of hidden_size, {v.width}"
    yield (v.width // v.heads % 4 == 0, "num_attention_heads", v.heads,
           f"heads of a multiple of 4 channels, not {v.width // v.heads}")  # fmt: skip


def _check_image_token(top: Keys, c: ModelConfig) -> None:
    token: Any = c.vision and c.vision.image_token
    if token >= c.vocab_size:
        raise top.error("image_token_id", str(token), f"below vocab_size, {c.vocab_size}")
