"""Writes the random benchmark model as GGUF, for llama.cpp; its quantised forms come from llama.cpp itself.

    to_gguf.py CHECKPOINT OUT.gguf F32|BF16          from the BF16 checkpoint that transformers reads
    to_gguf.py IN.gguf OUT.gguf Q8_0|Q4_0|MXFP4      by llama.cpp's own quantiser

Runs in the environment of `rivals-requirements.txt`. Vectors, hyper-connections and the router stay F32, as
llama.cpp wants them. Q8_0 and Q4_0 are "pure": every matrix, the output head too. MXFP4 is llama.cpp's kind
for mixtures of experts: routed experts in MXFP4, every other matrix in Q8_0. Nothing but one tensor, or the
stacked experts of one layer, is in memory at a time.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

ARCH = "deepseek4"
SQRT_SOFTPLUS = 4
"""The scoring function's number in GGUF."""
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "head.weight": "output.weight", "model.hc_head.hc_fn": "output_hc_fn.weight",
    "model.hc_head.hc_base": "output_hc_base.weight", "model.hc_head.hc_scale": "output_hc_scale.weight",
}  # fmt: skip
"""Name in the checkpoint -> name in GGUF, outside the layers."""

LAYER = {
    "attn_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight", "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight", "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight", "attn.norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight", "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight", "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.gate.bias": "exp_probs_b.bias", "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    **{f"hc_{x}_{y}": f"hc_{x}_{y}.weight" for x in ("attn", "ffn") for y in ("fn", "base", "scale")},
}  # fmt: skip
"""The same inside `model.layers.N.` and `blk.N.`."""

EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
KEPT_F32 = re.compile(r"hc_\w*fn\.weight|_ape\.weight|ffn_gate_inp\.weight")

Arr = npt.NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file: `dtype` is BF16 or I64."""

    dtype: str
    shape: tuple[int, ...]
    array: Arr


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Tensors by name, mapped; BF16 is uint16."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            kind = {"BF16": np.uint16, "I64": np.int64}[entry["dtype"]]
            shape = tuple(entry["shape"])
            out[name] = Stored(entry["dtype"], shape, data[start:end].view(kind).reshape(shape))
    return out


def gguf_tensors(tensors: dict[str, Stored], layers: int, experts: int) -> Iterator[tuple[str, list[Stored]]]:
    """(name in GGUF, the tensors that it stacks: one, or those of every expert); every tensor once."""
    left = dict(tensors)
    for old, new in WHOLE.items():
        yield new, [left.pop(old)]
    for n in range(layers):
        for old, new in LAYER.items():
            if (found := left.pop(f"model.layers.{n}.{old}", None)) is not None:
                yield f"blk.{n}.{new}", [found]
        for old, new in EXPERTS.items():
            names = [f"model.layers.{n}.ffn.experts.{e}.{old}.weight" for e in range(experts)]
            yield f"blk.{n}.{new}", [left.pop(name) for name in names]
    if left:
        raise SystemExit(f"no GGUF name for {sorted(left)[:5]}")


def type_of(name: str, parts: list[Stored], narrow: bool) -> gguf.GGMLQuantizationType:
    """The type in which a GGUF tensor is stored."""
    types = gguf.GGMLQuantizationType
    if parts[0].dtype == "I64":
        return types.I32
    matrix = len(parts[0].shape) > 1 and not KEPT_F32.search(name)
    return types.BF16 if narrow and matrix else types.F32


def converted(parts: list[Stored], kind: gguf.GGMLQuantizationType) -> Arr:
    """The bytes of one GGUF tensor; BF16 as uint16."""
    array = parts[0].array if len(parts) == 1 else np.stack([p.array for p in parts])
    if kind is gguf.GGMLQuantizationType.I32:
        return array.astype(np.int32)
    if kind is gguf.GGMLQuantizationType.BF16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def write_gguf(checkpoint: Path, output: Path, narrow: bool) -> None:
    """The whole model, matrices in BF16 or F32."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = read_safetensors(checkpoint / "model.safetensors")
    writer = gguf.GGUFWriter(output, ARCH)
    describe(writer, config, narrow)
    plan = list(gguf_tensors(tensors, config["num_hidden_layers"], config["n_routed_experts"]))
    for name, parts in plan:
        kind, shape = type_of(name, parts, narrow), parts[0].shape
        shape = shape if len(parts) == 1 else (len(parts), *shape)
        item = np.dtype(np.uint16 if kind is gguf.GGMLQuantizationType.BF16 else np.int32)
        writer.add_tensor_info(name, shape, item, math.prod(shape) * item.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in plan:
        writer.write_tensor_data(converted(parts, type_of(name, parts, narrow)))
    writer.close()


def describe(writer: gguf.GGUFWriter, c: dict[str, Any], narrow: bool) -> None:
    """The keys that llama.cpp reads of a DeepSeek-V4 model without YaRN and without a tokenizer."""
    layers, ropes = c["num_hidden_layers"], c["rope_parameters"]
    if any(rope["rope_type"] != "default" for rope in ropes.values()):
        raise SystemExit("this converter writes models without scaled rotary frequencies only")
    whole = {
        "block_count": layers, "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "feed_forward_length": c["moe_intermediate_size"],
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": 1,
        "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"],
        "rope.dimension_count": c["qk_rope_head_dim"], "vocab_size": c["vocab_size"],
        "expert_count": c["n_routed_experts"], "expert_used_count": c["num_experts_per_tok"],
        "expert_gating_func": SQRT_SOFTPLUS, "attention.q_lora_rank": c["q_lora_rank"],
        "attention.sliding_window": c["sliding_window"], "expert_shared_count": c["n_shared_experts"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "attention.indexer.head_count": c["index_n_heads"],
        "attention.indexer.key_length": c["index_head_dim"], "attention.indexer.top_k": c["index_topk"],
        "attention.output_group_count": c["o_groups"], "attention.output_lora_rank": c["o_lora_rank"],
        "hyper_connection.count": c["hc_mult"],
        "hyper_connection.sinkhorn_iterations": c["hc_sinkhorn_iters"],
        "hash_layer_count": c["mlp_layer_types"].count("hash_moe"),
        "embedding_length_out": c["hidden_size"] * c["hc_mult"],
    }  # fmt: skip
    real = {
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "rope.freq_base": c["rope_theta"],
        "expert_weights_scale": c["routed_scaling_factor"],
        "attention.compress_rope_freq_base": c["compress_rope_theta"],
        "hyper_connection.epsilon": c["hc_eps"],
    }  # fmt: skip
    for key, value in whole.items():
        writer.add_uint32(f"{ARCH}.{key}", value)
    for key, value in real.items():
        writer.add_float32(f"{ARCH}.{key}", value)
    writer.add_bool(f"{ARCH}.expert_weights_norm", c["norm_topk_prob"])
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        writer.add_array(f"{ARCH}.{key}", [float(c["swiglu_limit"])] * layers)
    writer.add_array(f"{ARCH}.attention.compress_ratios", [RATIOS[kind] for kind in c["layer_types"]])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if narrow else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")


def quantise(source: Path, output: Path, kind: str) -> None:
    """What the program llama-quantize does."""
    import llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    types = {
        "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
        "MXFP4": llama.LLAMA_FTYPE_MOSTLY_MXFP4_MOE,
    }  # fmt: skip
    params.ftype, params.pure = types[kind], kind != "MXFP4"
    if llama.llama_model_quantize(str(source).encode(), str(output).encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {source} to {kind}")


def main() -> None:
    source, output, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind in ("F32", "BF16"):
        write_gguf(source, output, kind == "BF16")
    else:
        quantise(source, output, kind)


if __name__ == "__main__":
    main()
