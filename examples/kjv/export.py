"""Write a transformers DeepSeek-V4 model as a checkpoint in the published layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from quantise import encode_fp4, encode_fp8, storage_of
from safetensors.torch import save_file
from torch import Tensor

# transformers name -> published name, applied in this order.
_RENAMES: list[tuple[str, str]] = [
    (r"^lm_head\.", "head."),
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_(fn|base|scale)$", r"hc_head_\1"),
    (r"\.attn_hc\.", ".hc_attn_"),
    (r"\.ffn_hc\.", ".hc_ffn_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.mlp\.", ".ffn."),
    (r"\.self_attn\.", ".attn."),
    (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.kv_proj\.", ".compressor.wkv."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.position_bias$", ".ape"),
    (r"\.attn\.q_a_proj\.", ".attn.wq_a."),
    (r"\.attn\.q_b_proj\.", ".attn.wq_b."),
    (r"\.attn\.kv_proj\.", ".attn.wkv."),
    (r"\.attn\.o_a_proj\.", ".attn.wo_a."),
    (r"\.attn\.o_b_proj\.", ".attn.wo_b."),
    (r"\.attn\.q_a_norm\.", ".attn.q_norm."),
    (r"\.attn\.sinks$", ".attn.attn_sink"),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
]


def published_name(name: str) -> str:
    """Published tensor name of a transformers tensor (routed experts are handled apart)."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the checkpoint, encoded, by published name."""
    out: dict[str, Tensor] = {}

    def put(name: str, encoded: tuple[Tensor, Tensor]) -> None:
        out[name + ".weight"], out[name + ".scale"] = encoded

    for name, tensor in state.items():
        kind = storage_of(name)
        if kind == "fp4":
            prefix = published_name(name).rsplit(".", 1)[0]
            for index, matrix in enumerate(tensor):
                if name.endswith("gate_up_proj"):
                    gate, up = matrix.chunk(2)
                    put(f"{prefix}.{index}.w1", encode_fp4(gate))
                    put(f"{prefix}.{index}.w3", encode_fp4(up))
                else:
                    put(f"{prefix}.{index}.w2", encode_fp4(matrix))
        elif kind == "fp8":
            put(published_name(name).removesuffix(".weight"), encode_fp8(tensor))
        else:
            dtype = {"f32": torch.float32, "i64": torch.int64, "bf16": torch.bfloat16}[kind]
            out[published_name(name)] = tensor.to(dtype)
    return {name: tensor.detach().contiguous() for name, tensor in out.items()}


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def export_checkpoint(
    state: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer_json: str, folder: Path, shards: int = 2
) -> int:
    """Write config, tokenizer and sharded weights into `folder`; returns the total tensor bytes.

    Every file is written under a temporary name first and then renamed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(state)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    weight_map: dict[str, str] = {}
    groups: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    written = 0
    for name, tensor in tensors.items():
        shard = min(written * shards // total, shards - 1)
        groups[shard][name] = tensor
        weight_map[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        written += tensor.numel() * tensor.element_size()
    for number, group in enumerate(groups, 1):
        target = folder / f"model-{number:05d}-of-{shards:05d}.safetensors"
        temporary = target.with_name(target.name + ".tmp")
        save_file(group, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
        temporary.replace(target)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", dict(config))
    temporary = folder / "tokenizer.json.tmp"
    temporary.write_text(tokenizer_json, encoding="utf-8")
    temporary.replace(folder / "tokenizer.json")
    return total
