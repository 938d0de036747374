"""Check an exported checkpoint from its files alone.

    python evaluate.py --checkpoint checkpoint --text heldout.txt

Reads the safetensors bytes, decodes FP4 / FP8 / BF16 with numpy (nothing is shared with the
code that wrote them), loads the values into a fresh float32 transformers model, then
measures the loss on a text and continues two prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
from model import empty_model
from tokenizers import Tokenizer
from train import PROMPTS, held_out_loss, write_text

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def fp8_table() -> np.ndarray:
    """The 256 values of E4M3 (no infinities, one NaN per sign)."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    value = np.where((exponent == 15) & (mantissa == 7), np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


def read_raw(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type name and raw little-endian array of every tensor that the index lists."""
    raw: dict[str, tuple[str, np.ndarray]] = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    views = {"F32": "<f4", "I64": "<i8", "BF16": "<u2", "I8": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1"}
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        content = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header: dict[str, Any] = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if index["weight_map"][name] != file:
                raise ValueError(f"{name} is not in the shard that the index names")
            start, end = entry["data_offsets"]
            total += end - start
            body = np.frombuffer(content[8 + size + start : 8 + size + end], views[entry["dtype"]])
            raw[name] = entry["dtype"], body.reshape(entry["shape"])
    if set(raw) != set(index["weight_map"]) or total != index["metadata"]["total_size"]:
        raise ValueError("the index and the shards disagree")
    return raw


def decode(raw: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Plain values of all tensors, scales applied and removed."""
    eight = fp8_table()
    values: dict[str, np.ndarray] = {}
    for name, (kind, body) in raw.items():
        if kind == "F8_E8M0":
            continue
        if kind in ("I8", "F8_E4M3"):
            scale = 2.0 ** (raw[name.removesuffix("weight") + "scale"][1].astype(np.float64) - 127)
        if kind == "I8":
            rows, packed = body.shape
            codes = np.empty((rows, 2 * packed), dtype=np.uint8)
            codes[:, 0::2], codes[:, 1::2] = body & 15, body >> 4
            values[name] = (FP4_VALUES[codes] * np.repeat(scale, 32, axis=1)).astype(np.float32)
        elif kind == "F8_E4M3":
            rows, columns = np.indices(body.shape)
            values[name] = (eight[body] * scale[rows // 128, columns // 128]).astype(np.float32)
        elif kind == "BF16":
            values[name] = (body.astype(np.uint32) << 16).view(np.float32)
        else:
            values[name] = body
    return values


def library_state(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """State dict with the names of the transformers library."""
    left = dict(values)
    state: dict[str, np.ndarray] = {}

    def move(source: str, target: str) -> None:
        state[target] = left.pop(source)

    move("embed.weight", "model.embed_tokens.weight")
    move("head.weight", "lm_head.weight")
    move("norm.weight", "model.norm.weight")
    for part in ("fn", "base", "scale"):
        move(f"hc_head_{part}", f"model.hc_head.hc_{part}")
    for n in range(config["num_hidden_layers"]):
        ratio = config["compress_ratios"][n]
        src, dst = f"layers.{n}.", f"model.layers.{n}."
        for part in ("fn", "base", "scale"):
            move(f"{src}hc_attn_{part}", f"{dst}attn_hc.{part}")
            move(f"{src}hc_ffn_{part}", f"{dst}ffn_hc.{part}")
        move(src + "attn_norm.weight", dst + "input_layernorm.weight")
        move(src + "ffn_norm.weight", dst + "post_attention_layernorm.weight")
        for old, new in (
            ("wq_a", "q_a_proj"),
            ("q_norm", "q_a_norm"),
            ("wq_b", "q_b_proj"),
            ("wkv", "kv_proj"),
            ("kv_norm", "kv_norm"),
            ("wo_a", "o_a_proj"),
            ("wo_b", "o_b_proj"),
        ):
            move(f"{src}attn.{old}.weight", f"{dst}self_attn.{new}.weight")
        move(src + "attn.attn_sink", dst + "self_attn.sinks")
        compressors = [("compressor.", "compressor.")] if ratio else []
        if ratio == 4:
            compressors.append(("indexer.compressor.", "compressor.indexer."))
            move(src + "attn.indexer.wq_b.weight", dst + "self_attn.compressor.indexer.q_b_proj.weight")
            move(
                src + "attn.indexer.weights_proj.weight",
                dst + "self_attn.compressor.indexer.scorer.weights_proj.weight",
            )
        for old, new in compressors:
            move(f"{src}attn.{old}wkv.weight", f"{dst}self_attn.{new}kv_proj.weight")
            move(f"{src}attn.{old}wgate.weight", f"{dst}self_attn.{new}gate_proj.weight")
            move(f"{src}attn.{old}norm.weight", f"{dst}self_attn.{new}kv_norm.weight")
            move(f"{src}attn.{old}ape", f"{dst}self_attn.{new}position_bias")
        move(src + "ffn.gate.weight", dst + "mlp.gate.weight")
        if n < config["num_hash_layers"]:
            move(src + "ffn.gate.tid2eid", dst + "mlp.gate.tid2eid")
        else:
            move(src + "ffn.gate.bias", dst + "mlp.gate.e_score_correction_bias")
        for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            move(f"{src}ffn.shared_experts.{old}.weight", f"{dst}mlp.shared_experts.{new}.weight")
        experts = [
            [left.pop(f"{src}ffn.experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")]
            for e in range(config["n_routed_experts"])
        ]
        state[dst + "mlp.experts.gate_up_proj"] = np.stack([np.concatenate(e[:2]) for e in experts])
        state[dst + "mlp.experts.down_proj"] = np.stack([e[2] for e in experts])
    if left:
        raise ValueError(f"tensors without a place: {sorted(left)}")
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure an exported checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=384, help="tokens per scored window")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write after each prompt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    model = empty_model(config)
    model.load_state_dict(library_state(decode(read_raw(args.checkpoint)), config), strict=True)
    text = args.text.read_text(encoding="utf-8")
    tokens = data.encode(tokenizer, text)
    loss = held_out_loss(model, tokens, args.length)
    bits = loss * len(tokens) / len(text.encode()) / math.log(2)
    print(f"{len(tokens)} tokens, {loss:.4f} nats per token, {bits:.4f} bits per byte")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            print(f"--- temperature {temperature}")
            print(write_text(model, tokenizer, prompt, args.tokens, temperature))


if __name__ == "__main__":
    main()
