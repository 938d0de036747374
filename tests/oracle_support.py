"""The oracle: a checkpoint in any spelling as a float32 model of transformers.

Reads and dequantises on its own: nothing is shared with the front end under test but the files.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

Arr = npt.NDArray[Any]
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
VIEWS = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "u1", "U8": "u1",
    "F8_E4M3": "u1", "F8_E8M0": "u1",
}  # fmt: skip
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention"}
HCA = "heavily_compressed_attention"


class Oracle:
    """transformers' DeepseekV4ForCausalLM with the weights of a checkpoint directory."""

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.model = model.float().eval()
        self.model.config._attn_implementation = "eager"
        self.model.config._experts_implementation = "eager"  # the others want sizes to be multiples of 4

    @classmethod
    def open(cls, directory: Path) -> Oracle:
        config = json.loads((directory / "config.json").read_text())
        model = DeepseekV4ForCausalLM(library_config(config))
        state = module_names(dequantise(read_tensors(directory)))
        model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
        return cls(model)

    @torch.no_grad()
    def logits(self, ids: Arr) -> Arr:
        """[T,V] for one prompt [T], in one call without a cache."""
        return self.model(torch.from_numpy(ids[None].astype(np.int64)), use_cache=False).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, ids: Arr, count: int) -> tuple[Arr, float]:
        """`count` greedy tokens through the library's cache, and the smallest lead of a chosen token.

        The whole text fed anew must choose the same tokens, or the reference is not one.
        """
        step, cache, out = torch.from_numpy(ids[None].astype(np.int64)), None, []
        for _ in range(count):
            result = self.model(step, past_key_values=cache, use_cache=True)
            cache, step = result.past_key_values, result.logits[:, -1:].argmax(-1)
            out.append(int(step))
        new = np.array(out)
        again = self.logits(np.concatenate([ids, new]))[len(ids) - 1 : -1]
        assert (again.argmax(1) == new).all()
        first, second = np.sort(again, 1)[:, :-3:-1].T
        return new, float((first - second).min())


def library_config(raw: dict[str, Any]) -> DeepseekV4Config:
    """The configuration; published ratios other than 4 and 128 need the library's own spelling."""
    gone = ("quantization_config", "expert_dtype", "torch_dtype", "dtype")
    keys = {k: v for k, v in raw.items() if k not in gone and v is not None}
    if "compress_ratios" in keys:
        ratios = keys.pop("compress_ratios")[: keys["num_hidden_layers"]]
        keys["layer_types"] = [KINDS.get(r, HCA) for r in ratios]
        heavy = {r for r in ratios if r not in KINDS} or {128}
        keys["compress_rates"] = {KINDS[4]: 4, HCA: heavy.pop()}
        assert not heavy, "one ratio of heavily compressed layers"
    config = DeepseekV4Config(**keys)
    config._attn_implementation = "eager"
    return config


def read_tensors(directory: Path) -> dict[str, tuple[str, Arr]]:
    """Name -> stored type and raw array, of every file in the directory."""
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = (8 + size + o for o in entry["data_offsets"])
                array = np.frombuffer(data[start:end], VIEWS[entry["dtype"]])
                out[name] = entry["dtype"], array.reshape(entry["shape"])
    return out


def dequantise(stored: dict[str, tuple[str, Arr]]) -> dict[str, Arr]:
    """Name -> values: float32, or int64 for expert ids. Scales are applied and gone."""
    out = {}
    for name, (kind, raw) in stored.items():
        if name.endswith(".scale") and name.removesuffix("scale") + "weight" in stored:
            continue
        if kind in ("I8", "F8_E4M3"):
            scale_kind, scale = stored[name.removesuffix("weight") + "scale"]
            factor = scale.astype(np.float64)
            factor = factor if scale_kind == "F32" else np.exp2(factor - 127)
            out[name] = (_fp4(raw, factor) if kind == "I8" else _fp8(raw, factor)).astype(np.float32)
        elif kind == "BF16":
            out[name] = (raw.astype("<u4") << 16).view("<f4")
        else:
            out[name] = raw.astype(np.int64 if kind.startswith("I") else np.float32)
    return out


def _fp4(packed: Arr, scale: Arr) -> Arr:
    """Low half byte first; one scale for 32 columns."""
    values = FP4[np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)]
    return values * np.repeat(scale, 32, axis=1)[:, : values.shape[1]]


def _fp8(codes: Arr, scale: Arr) -> Arr:
    """torch knows E4M3; one scale for a tile of 128 x 128."""
    values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).double().numpy()
    rows, columns = np.indices(values.shape)
    return values * scale[rows // 128, columns // 128]


ATTENTION = {
    "wq_a.weight": "q_a_proj.weight", "q_norm.weight": "q_a_norm.weight", "wq_b.weight": "q_b_proj.weight",
    "wkv.weight": "kv_proj.weight", "kv_norm.weight": "kv_norm.weight", "norm.weight": "kv_norm.weight",
    "wo_a.weight": "o_a_proj.weight", "wo_b.weight": "o_b_proj.weight", "attn_sink": "sinks",
}  # fmt: skip
COMPRESSOR = {
    "wkv.weight": "kv_proj.weight", "wgate.weight": "gate_proj.weight", "norm.weight": "kv_norm.weight",
    "ape": "position_bias",
}  # fmt: skip
INDEXER = {"wq_b.weight": "q_b_proj.weight", "weights_proj.weight": "scorer.weights_proj.weight"}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{p}_{x}": f"{p}_hc.{x}" for p in ("attn", "ffn") for x in ("fn", "base", "scale")},
    **{f"attn.{a}": f"self_attn.{b}" for a, b in ATTENTION.items()},
    **{f"attn.compressor.{a}": f"self_attn.compressor.{b}" for a, b in COMPRESSOR.items()},
    **{f"attn.indexer.{a}": f"self_attn.compressor.indexer.{b}" for a, b in INDEXER.items()},
    **{f"attn.indexer.compressor.{a}": f"self_attn.compressor.indexer.{b}" for a, b in COMPRESSOR.items()},
    "ffn.gate.weight": "mlp.gate.weight", "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    **{
        f"ffn.shared_experts.{a}.weight": f"mlp.shared_experts.{b}_proj.weight"
        for a, b in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
    },
}  # fmt: skip
TOP = {
    "embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head_{x}": f"model.hc_head.hc_{x}" for x in ("fn", "base", "scale")},
}  # fmt: skip


def module_names(values: dict[str, Arr]) -> dict[str, Arr]:
    """A state dict of the library from published names, module names or what `save_pretrained` writes."""
    out: dict[str, Arr] = {}
    experts: dict[tuple[str, int, str], Arr] = {}
    modules, published = set(TOP.values()), {b: b for b in LAYER.values()}
    for name, value in values.items():
        if name.startswith("mtp."):
            continue
        if name in modules or name in TOP:
            out[TOP.get(name, name)] = value
            continue
        short = name.removeprefix("model.")
        if short in TOP:
            out[TOP[short]] = value
            continue
        layer, rest = re.fullmatch(r"layers\.(\d+)\.(.+)", short).groups()  # type: ignore[union-attr]
        prefix = f"model.layers.{layer}."
        one = re.fullmatch(r"(?:ffn|mlp)\.experts\.(\d+)\.(\w+)\.weight", rest)
        if one:
            part = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.get(one[2], one[2])
            experts[prefix, int(one[1]), part] = value
        elif rest.startswith("mlp.experts."):
            out[prefix + rest] = value
        else:
            out[prefix + (LAYER.get(rest) or published[rest])] = value
    for prefix in {key[0] for key in experts}:
        count = 1 + max(e for p, e, _ in experts if p == prefix)
        both = [np.concatenate([experts[prefix, e, "w1"], experts[prefix, e, "w3"]]) for e in range(count)]
        out[f"{prefix}mlp.experts.gate_up_proj"] = np.stack(both)
        out[f"{prefix}mlp.experts.down_proj"] = np.stack([experts[prefix, e, "w2"] for e in range(count)])
    return out
