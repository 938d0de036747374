"""Whole models of random configurations for the fuzzer: V4, V4.1, and the image encoder of V4.1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsv4c.frontend.architecture import ModelConfig
from dsv4c.frontend.config import parse_config
from dsv4c.frontend.engram import engram_config
from dsv4c.frontend.engram_hash import layer_hashes
from dsv4c.frontend.engram_layer import layer_weights
from dsv4c.frontend.generate_config import BASE, PRESETS
from dsv4c.frontend.model import build_model
from dsv4c.frontend.model_v41 import EngramParts, build_model_v41
from dsv4c.frontend.table import Role, TensorSpec, expected_tensors
from dsv4c.frontend.vision import build_vision
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module
from dsv4c.ir.sample import RandomStore

Rng = np.random.Generator
V41 = Path(__file__).parent / "data" / "golden" / "v41" / "config.json"


def pick(rng: Rng, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def random_model(seed: int) -> Module:
    """The MODEL graph of a random V4 configuration, its weights made up in random stored formats."""
    rng = np.random.default_rng([1, seed])
    config = parse_config(_random_config(rng))
    return _filled(build_model(config, _weight_of(rng, config)), seed)


def random_model_v41(seed: int) -> Module:
    """The same of V4.1: other sources of entries and selections, with and without Engram and images."""
    rng = np.random.default_rng([3, seed])
    config = parse_config(_random_config_v41(rng))
    weight_of = _weight_of(rng, config)
    parts = _engram_parts(config, weight_of, packed=rng.random() < 0.5) if config.engram else None
    return _filled(build_model_v41(config, weight_of, parts), seed)


def random_vision(seed: int) -> Module:
    """The image encoder of a random V4.1 model."""
    rng = np.random.default_rng([4, seed])
    raw = _random_config_v41(rng)
    while "vision_config" not in raw:
        raw = _random_config_v41(rng)
    config = parse_config(raw)
    return _filled(build_vision(config, _weight_of(rng, config)), seed)


def _filled(module: Module, seed: int) -> Module:
    module.store = RandomStore(module, seed)
    return module


# ---------------------------------------------------------------------------------- configurations


def _random_config(rng: Rng) -> dict[str, object]:
    heads, groups = int(rng.integers(1, 4)), 1
    groups = heads if rng.random() < 0.5 else 1
    experts = int(rng.integers(2, 6))
    layers = int(rng.integers(1, 4))
    raw = {**BASE, **PRESETS["tiny"]}
    raw |= dict(
        vocab_size=int(rng.integers(5, 40)), hidden_size=16 * int(rng.integers(2, 5)),
        num_hidden_layers=layers, compress_ratios=[int(pick(rng, (0, 4, 8, 16))) for _ in range(layers)],
        num_hash_layers=int(rng.integers(0, layers + 1)), num_attention_heads=heads, head_dim=24,
        qk_rope_head_dim=8, q_lora_rank=16, o_groups=groups, o_lora_rank=8,
        sliding_window=int(rng.integers(1, 7)), n_routed_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)), moe_intermediate_size=32,
        index_n_heads=2, index_head_dim=32, index_topk=int(rng.integers(1, 5)), num_nextn_predict_layers=0,
        hc_mult=int(rng.integers(1, 5)), hc_sinkhorn_iters=int(rng.integers(1, 4)),
    )  # fmt: skip
    return raw


def _random_config_v41(rng: Rng) -> dict[str, Any]:
    """The small model of the tests with other sizes and sources; the last source may choose candidates."""
    raw: dict[str, Any] = json.loads(V41.read_text(encoding="utf-8"))
    text, heads, experts = raw["text_config"], int(rng.integers(1, 4)), int(rng.integers(2, 6))
    vocab = int(rng.integers(5, 12))
    ratios = sorted(int(pick(rng, (0, 1, 1, 2))) for _ in range(int(rng.integers(2, 6))))
    ratios = [r for r in ratios if not r] + [r for r in ratios[::-1] if r]  # windows, groups, single tokens
    first = [i for i, r in enumerate(ratios) if r and ratios.index(r) == i]
    sources = {i for i, r in enumerate(ratios) if r and rng.random() < 0.15} | set(first)
    selects = {i for i, r in enumerate(ratios) if r and rng.random() < 0.8} | sources
    candidate = pick(rng, (-1, *[max(sources)] * 3)) if sources else -1
    text |= dict(
        vocab_size=vocab, hidden_size=16 * int(rng.integers(2, 4)), num_hidden_layers=len(ratios),
        compress_ratios=ratios, kv_source_layer_ids=sorted(sources), index_source_layer_ids=sorted(selects),
        candidate_source_layer_id=candidate, candidate_topk_blocks=int(rng.integers(1, 4)),
        candidate_block_size=int(rng.integers(1, 4)), num_attention_heads=heads, head_dim=24,
        qk_rope_head_dim=8, q_lora_rank=16, o_groups=heads, o_lora_rank=8,
        sliding_window=int(rng.integers(1, 7)), n_routed_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)), moe_intermediate_size=32,
        index_n_heads=2, index_head_dim=32, index_topk=int(rng.integers(1, 5)), num_nextn_predict_layers=0,
        hc_mult=int(rng.integers(1, 5)), hc_sinkhorn_iters=int(rng.integers(1, 4)),
    )  # fmt: skip
    raw["text_config"] = {k: v for k, v in text.items() if not k.startswith(("dspark_", "engram_"))}
    if rng.random() < 0.5:
        raw["text_config"] |= _random_engram(rng, len(ratios), vocab)
    raw["image_token_id"] = int(rng.integers(vocab))
    raw["vision_config"] |= dict(
        num_hidden_layers=int(rng.integers(1, 3)), hidden_size=16, patch_size=2,
        num_attention_heads=int(pick(rng, (1, 2, 4))), intermediate_size=int(rng.integers(3, 20)),
        downsample_ratio=int(rng.integers(1, 4)),
    )  # fmt: skip
    if rng.random() < 0.5:
        del raw["vision_config"], raw["image_token_id"]
    return raw


def _random_engram(rng: Rng, layers: int, vocab: int) -> dict[str, object]:
    at = sorted({int(i) for i in rng.integers(1, layers, 2)})
    ngram, heads, start = int(rng.integers(2, 5)), int(rng.integers(1, 3)), int(rng.integers(5, 50))
    hashes = layer_hashes(at, (start,) * (ngram - 1), heads, vocab)
    return dict(
        engram_layer_ids=at, engram_max_ngram_size=ngram, engram_vocab_size=start, engram_n_heads=heads,
        engram_head_dim=32, engram_compressed_vocab_size=vocab, engram_pad_token_id=int(rng.integers(vocab)),
        engram_num_embeddings=[hashes[layer].rows for layer in at],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ weights


def _weight_of(rng: Rng, config: ModelConfig) -> Callable[[str], w.WeightExpr]:
    specs = expected_tensors(config)
    linear = pick(rng, (DType.F8E4M3, DType.BF16, DType.F32))
    expert = pick(rng, (DType.F4E2M1X2, DType.F8E4M3, DType.BF16, None))

    def weight_of(name: str) -> w.WeightExpr:
        spec = specs[name]
        one = expert if expert is not None else pick(rng, (DType.F4E2M1X2, DType.BF16, DType.F8E4M3))
        return _weight(name, spec, linear, one, config.weight_block_size)

    return weight_of


def _weight(
    name: str, spec: TensorSpec, linear: DType, expert: DType, block: tuple[int, int]
) -> w.WeightExpr:
    if spec.role is Role.TABLE:
        return w.cast(w.source(name, DType.I64, spec.shape), DType.I32)
    dtype = {Role.LINEAR: linear, Role.EXPERT: expert, Role.PRECISE: DType.F32}.get(spec.role, DType.BF16)
    codes = w.source(name, dtype, spec.stored_shape(dtype))
    if dtype not in (DType.F8E4M3, DType.F4E2M1X2):
        return codes
    scale = w.source(f"{name}.scale", DType.F8E8M0, spec.scale_shape(dtype, block))
    return w.decode_fp8(codes, scale, block) if dtype is DType.F8E4M3 else w.decode_fp4(codes, scale)


def _engram_parts(config: ModelConfig, weight_of: Callable[[str], w.WeightExpr], packed: bool) -> EngramParts:
    """Engram layers whose classes are the tokens in another order, with tables in FP8 or in BF16."""
    engram, specs = engram_config(config), expected_tensors(config)

    def raw(name: str) -> w.WeightExpr | None:
        spec = specs.get(name.replace("embed.scale", "embed.weight"))
        if packed and spec is not None and spec.role is Role.ROWS:
            if name.endswith("weight"):
                return w.source(name, DType.F8E4M3, spec.shape)
            return w.source(name, DType.F8E8M0, spec.scale_shape(DType.F8E4M3, config.weight_block_size))
        return None if name.endswith(".scale") else weight_of(name)

    token_map = w.source("token_map", DType.I32, (config.vocab_size,))
    return EngramParts(engram, lambda i: layer_weights(engram, raw, f"layers.{i}.engram."), token_map)
