"""One Engram layer alone: a directory with its weights in, a module over tokens and streams out.

Owns the tensor names of the variants and the directory's config.json. Knows nothing of the model around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsv4c.errors import CheckpointError, ConfigError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Builder, Module
from dsv4c.ir.types import f32
from dsv4c.ir.verify import verify
from dsv4c.ir.weights import WeightExpr, concat, decode_fp8, reshape, source, stack

from .engram import (
    B,
    EngramConfig,
    EngramWeights,
    T,
    Variant,
    begin_engram,
    end_engram,
    engram_block,
    token_inputs,
)
from .safetensors import TensorFiles, parse_json
from .token_map import SOURCE, Overlay, TokenMap, read_token_map

MODEL_TYPE = "engram_layer"
TILE = (32, 32)
"""One scale of the FP8 projection covers this many outputs and inputs."""

Raw = Callable[[str], WeightExpr | None]
"""Tensor name -> the tensor as stored, or None where there is none."""


# ------------------------------------------------------------------------------------ weights


def layer_weights(
    config: EngramConfig, raw: Raw, prefix: str = "", tile: tuple[int, int] = TILE
) -> EngramWeights:
    """The weights of a layer by the names of its variant.

    PROD and TK: `embed.weight` [rows, width] with or without `embed.scale`, `wkv.weight` [(n+1) d, columns
    width] with or without `wkv.scale`, `q_weight` and `k_weight` [n, d], as DeepSeek-V4.1 publishes them
    under `layers.N.engram.`; one scale of `wkv` covers `tile`. DEMO: the module names of the demonstration.

    Raises:
        CheckpointError: a tensor is missing.
    """

    def need(name: str) -> WeightExpr:
        found = raw(prefix + name)
        if found is None:
            raise CheckpointError(f"no tensor {prefix + name!r}", where=f"Engram {config.variant.value}")
        return found

    if config.variant is Variant.DEMO:
        return _demo_weights(config, need)
    kv, scale = need("wkv.weight"), raw(prefix + "wkv.scale")
    return EngramWeights(
        table=need("embed.weight"),
        scales=raw(prefix + "embed.scale"),
        kv=kv if scale is None else decode_fp8(kv, scale, tile),
        bias=None,
        q_norm=need("q_weight"),
        k_norm=need("k_weight"),
    )


def _demo_weights(config: EngramConfig, need: Callable[[str], WeightExpr]) -> EngramWeights:
    streams = range(config.streams)
    maps = [f"key_projs.{j}" for j in streams] + ["value_proj"]
    taps = need("short_conv.conv.weight")  # [channels, 1, taps]: depthwise
    return EngramWeights(
        table=need("multi_head_embedding.embedding.weight"),
        scales=None,
        kv=concat(tuple(need(f"{name}.weight") for name in maps)),
        bias=concat(tuple(need(f"{name}.bias") for name in maps)),
        q_norm=stack(tuple(need(f"norm2.{j}.weight") for j in streams)),
        k_norm=stack(tuple(need(f"norm1.{j}.weight") for j in streams)),
        conv=reshape(taps, (config.streams * config.hidden, config.conv_taps)),
        conv_norm=stack(tuple(need(f"short_conv.norms.{j}.weight") for j in streams)),
    )


# -------------------------------------------------------------------------------------- graph


def build_engram_layer(
    config: EngramConfig, layer: int, weights: EngramWeights, token_map: WeightExpr | None
) -> Module:
    """One layer as a module at level MODEL.

    Inputs: `tokens` i32 [B,T], `n_valid` i32 [B], `streams` f32 [B,T,n,d]. Output: `streams`, same type.
    States: `pos`, the history of compressed ids, and the rows of the convolution where there is one.
    """
    module = Module(MODEL_TYPE, meta=_meta(config, layer))
    b = Builder(module)
    tokens, n_valid, pos = token_inputs(b)
    streams = b.input("streams", f32(B, T, config.streams, config.hidden))
    step = begin_engram(b, config, tokens, pos, n_valid, token_map)
    module.outputs["streams"] = engram_block(b, streams, step, weights, config, layer)
    end_engram(b, step)
    module.outputs["pos"] = b.op("advance", pos, n_valid)
    return module


def _meta(config: EngramConfig, layer: int) -> dict[str, object]:
    return {
        "variant": config.variant.value, "layer": layer, "streams": config.streams,
        "vocab_size": config.vocab or config.compressed_vocab, "hidden_size": config.hidden,
        "table_rows": config.hashes[layer].rows,
    }  # fmt: skip


# ---------------------------------------------------------------------------------- directory


def load_engram_layer(directory: str | Path) -> Module:
    """Read a directory that `generate_engram_layer` wrote, or one laid out like it.

    Raises:
        ConfigError, CheckpointError: what is wrong with the directory.
    """
    root = Path(directory)
    keys = _read_config(root)
    files = TensorFiles.open(root)

    def raw(name: str) -> WeightExpr | None:
        found = files.tensors.get(name)
        return None if found is None else source(found.name, found.dtype, found.shape)

    layer = keys.pop("layer")
    config = _config(root, keys)
    if not isinstance(layer, int) or layer not in config.layers:
        raise ConfigError(f"layer {layer!r}", where=str(root), allowed=", ".join(map(str, config.layers)))
    map_, overlay = None, Overlay(files, {})
    if config.variant is not Variant.TK:
        table = read_token_map(root)
        config = with_token_map(config, table, str(root))
        map_ = source(SOURCE, DType.I32, table.shape)
        overlay.arrays[SOURCE] = table
    module = build_engram_layer(config, layer, layer_weights(config, raw), map_)
    module.store = overlay
    verify(module)
    return module


def with_token_map(config: EngramConfig, table: TokenMap, where: str) -> EngramConfig:
    """`config`, whose `pad` is a token id, with the class of that token instead.

    Raises:
        ConfigError: the map has another number of classes than the multipliers were drawn for.
    """
    classes = int(table.max()) + 1
    if classes != config.compressed_vocab:
        raise ConfigError(
            f"the tokenizer has {classes} classes of tokens", where=where,
            allowed=str(config.compressed_vocab),
            hint="tokenizer and checkpoint do not belong together",
        )  # fmt: skip
    if config.pad >= len(table):
        raise ConfigError(f"pad token {config.pad}", where=where, allowed=f"0..{len(table) - 1}")
    return replace(config, pad=int(table[config.pad]), vocab=len(table))


_LISTS = ("layers", "table_sizes")
_INTS = ("heads", "width", "hidden", "streams", "compressed_vocab", "pad", "dead_token", "seed", "layer")


def _read_config(root: Path) -> dict[str, object]:
    file = root / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(file)) from None
    keys = parse_json(text, str(file), ConfigError)
    if keys.pop("model_type", None) != MODEL_TYPE:
        raise ConfigError("not an Engram layer", where=str(file), allowed=f'"model_type": "{MODEL_TYPE}"')
    known = {"variant", *_LISTS, *_INTS}
    for name in keys.keys() ^ known:
        what = "is missing" if name in known else "is unknown"
        raise ConfigError(f"key {name!r} {what}", where=str(file), allowed=", ".join(sorted(known)))
    for name, value in keys.items():
        values = value if name in _LISTS else [value]
        good = isinstance(values, list) and values and all(type(v) is int for v in values)
        if name != "variant" and not good:
            raise ConfigError(f"{name} = {value!r}", where=str(file), allowed="integers")
    return keys


def _config(root: Path, keys: dict[str, object]) -> EngramConfig:
    variants = {v.value: v for v in Variant}
    variant = keys.pop("variant")
    if variant not in variants:
        raise ConfigError(f"variant {variant!r}", where=str(root), allowed=", ".join(variants))
    rest = {name: tuple(v) if isinstance(v, list) else v for name, v in keys.items()}
    return EngramConfig(variant=variants[str(variant)], **rest)  # type: ignore[arg-type]


def config_json(config: EngramConfig, layer: int, pad: int) -> str:
    """The text of config.json; `pad` is the token id (TK: the class) that stands before the start."""
    keys: dict[str, object] = {"model_type": MODEL_TYPE, "variant": config.variant.value, "layer": layer}
    keys |= {name: list(getattr(config, name)) for name in _LISTS}
    keys |= {name: getattr(config, name) for name in _INTS if name not in ("pad", "layer")}
    return json.dumps({**keys, "pad": pad}, indent=2) + "\n"


def mod_token_map(vocab: int, classes: int) -> TokenMap:
    """The made-up map of test models: token modulo the number of classes."""
    return (np.arange(vocab) % classes).astype(np.int32)
