"""The configuration and the initial weights of the small DeepSeek-V4 model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.04,
    "max_position_embeddings": 2048,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 0,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 64,
    "compress_ratios": [0, 4, 128, 4, 128],
    "compress_rope_theta": 160000,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 32,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 2048,
}


def empty_model(config: dict[str, Any] = CONFIG) -> DeepseekV4ForCausalLM:
    """A float32 model of a published configuration, with the library's own initial values."""
    settings = {
        k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "expert_dtype")
    }
    settings["rope_scaling"] = dict(config["rope_scaling"])
    hf_config = DeepseekV4Config(**settings)
    hf_config._attn_implementation = "eager"
    return DeepseekV4ForCausalLM(hf_config).float()


@torch.no_grad()
def initial_model(seed: int) -> DeepseekV4ForCausalLM:
    """A model ready for training.

    Three things differ from the library's initial values. The hash-routing tables (zeros
    there) get distinct seeded experts per token. The hyper-connections start with nearly
    separate residual streams, each sub-layer reading mostly one of them, so that the
    streams do not collapse into one average. Output projections start smaller.
    """
    torch.manual_seed(seed)
    model = empty_model()
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    streams = config.hc_mult
    model.model.embed_tokens.weight.normal_(0.0, 0.1, generator=generator)
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp.gate, "tid2eid"):
            table = layer.mlp.gate.tid2eid
            ranks = torch.rand(table.shape[0], config.num_local_experts, generator=generator)
            table.copy_(ranks.argsort(dim=1)[:, : table.shape[1]])
        for place, connection in enumerate((layer.attn_hc, layer.ffn_hc)):
            chosen = (2 * number + place) % streams
            pre = torch.full((streams,), -1.5)
            pre[chosen] = 1.5
            mix = 3.0 * torch.eye(streams)
            connection.base.copy_(torch.cat([pre, torch.zeros(streams), mix.flatten()]))
            connection.scale.fill_(0.2)
        for weight in (layer.self_attn.o_b_proj.weight, layer.mlp.experts.down_proj):
            weight.mul_(0.5)
        layer.mlp.shared_experts.down_proj.weight.mul_(0.5)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: decay on the matrices, none on norms, biases, sinks and hyper-connections."""
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        keep = parameter.ndim < 2 or "_hc." in name or "hc_head" in name or "position_bias" in name
        (plain if keep or "embed_tokens" in name else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
