"""Reads config.json into a validated `ModelConfig`.

Tells the model types apart and owns the two spellings of a DeepSeek-V4 configuration: the published one
(`compress_ratios`, `num_hash_layers`, `rope_scaling`) and the one transformers 5 writes (`layer_types`,
`compress_rates`, `mlp_layer_types`, `rope_parameters`). V4.1 has `config_v41.py`. Knows nothing of tensors.
Source: model specification, section 1.
"""

from __future__ import annotations

from pathlib import Path

from dsv4c.errors import ConfigError

from .architecture import LayerKind, ModelConfig
from .config_common import (
    COMMON,
    FIXED,
    ONE_OF_TWO,
    check_fixed,
    check_known,
    check_rules,
    common_fields,
    common_rules,
    layer_ratios,
)
from .config_v41 import MODEL_TYPES, is_flat, parse_v41
from .keys import Keys
from .safetensors import parse_json


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
    kind = raw.get("model_type")
    if kind in MODEL_TYPES or (kind is None and is_flat(raw)):
        return parse_v41(raw, where)
    _check_model_type(kind, where)
    return _parse_v4(raw, where)


_V4 = "deepseek_v4"
_ALLOWED_TYPES = ", ".join((_V4, *MODEL_TYPES))
_UNSUPPORTED_TYPES = {
    "deepseek_v4_vl": "DeepSeek-V4 with vision",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v32": "DeepSeek-V3.2",
}


def _check_model_type(kind: object, where: str) -> None:
    if kind == _V4:
        return
    if kind is None:
        raise ConfigError("key 'model_type' is missing", where=where, allowed=_ALLOWED_TYPES)
    if isinstance(kind, str) and kind in _UNSUPPORTED_TYPES:
        what = f"model_type {kind!r} ({_UNSUPPORTED_TYPES[kind]}) is not supported yet"
        raise ConfigError(what, where=where, allowed=_ALLOWED_TYPES)
    raise ConfigError(f"model_type {kind!r} is unknown", where=where, allowed=_ALLOWED_TYPES)


# ---------------------------------------------------------------------------------- DeepSeek-V4

_ELSEWHERE = {
    "dspark": "the DSpark drafter", "vision": "image input", "image": "image input",
    "engram": "Engram memory", "text_config": "a model with several parts",
}  # fmt: skip
"""Beginning of a key -> the feature behind it, which V4 models have not, or not in a known way."""

_KINDS = (LayerKind.SLIDING, LayerKind.CSA, LayerKind.HCA)
_KNOWN = COMMON | {"layer_types", "compress_rates", "num_hash_layers", "mlp_layer_types"}


def _parse_v4(raw: dict[str, object], where: str) -> ModelConfig:
    keys = Keys(raw, where)
    _check_keys(keys)
    check_fixed(keys, FIXED)
    fields = common_fields(keys, keys, 128)
    kinds, ratios = _layer_kinds(keys, fields["num_hidden_layers"], fields["n_mtp_layers"])
    config = ModelConfig(
        **fields,
        layer_kinds=kinds,
        compress_ratios=ratios,
        hash_layers=_hash_layers(keys, fields["num_hidden_layers"]),
        raw=raw,
    )
    check_rules(keys, common_rules(config, indexed=LayerKind.CSA in kinds))
    return config


def _check_keys(keys: Keys) -> None:
    for key in sorted(keys.raw.keys() - _KNOWN):
        for start, feature in _ELSEWHERE.items():
            if key.startswith(start):
                raise ConfigError(f"key {key!r}: {feature} is not supported yet", where=keys.where)
    check_known(keys, _KNOWN)


def _layer_kinds(keys: Keys, layers: int, n_mtp: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Kind and ratio of every layer, from either spelling; both spellings must agree when both are there."""
    published = _from_ratios(keys, layers, n_mtp) if "compress_ratios" in keys.raw else None
    typed = _from_types(keys, layers) if "layer_types" in keys.raw else None
    if published and typed and published != typed:
        raise keys.error("layer_types", "a contradiction to compress_ratios", ONE_OF_TWO)
    found = published or typed
    if found is None:
        raise keys.missing("compress_ratios", "compress_ratios, or layer_types with compress_rates")
    return found


def _from_ratios(keys: Keys, layers: int, n_mtp: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    ratios = layer_ratios(keys, layers, n_mtp)
    if 1 in ratios:
        raise keys.error("compress_ratios", "an entry 1", "0 for no compression, or at least 2")
    kinds = {0: LayerKind.SLIDING, 4: LayerKind.CSA}
    return tuple(kinds.get(r, LayerKind.HCA) for r in ratios), ratios


def _from_types(keys: Keys, layers: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    names = keys.choices("layer_types", tuple(k.value for k in _KINDS), layers)
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
        raise keys.error("mlp_layer_types", "a contradiction to num_hash_layers", ONE_OF_TWO)
    found = by_count or by_type
    if found is None:
        raise keys.missing("num_hash_layers", "num_hash_layers or mlp_layer_types")
    return found
