"""Builds the MODEL-level graph of a DeepSeek-V4 checkpoint: what section 4 of the specification says."""

from __future__ import annotations

from collections.abc import Callable

from dsv4c.ir.graph import Module, Value

from .architecture import LayerKind, ModelConfig
from .layers import LayerBuilder, WeightOf


def build_model(config: ModelConfig, weight_of: WeightOf, name: str = "deepseek_v4") -> Module:
    """The whole model as one module at level MODEL.

    Inputs: `tokens` i32[B,T], `n_valid` i32[B] (real tokens per row), `rows` i32[B,L] (tokens whose
    logits are wanted). Output: `logits` f32[B,L,vocab].
    """
    return _ModelBuilder(config, weight_of, name).build()


class _ModelBuilder(LayerBuilder):
    def __init__(self, config: ModelConfig, weight_of: WeightOf, name: str) -> None:
        flavours = {kind is not LayerKind.SLIDING for kind in config.layer_kinds}
        super().__init__(config, weight_of, name, flavours)

    def build(self) -> Module:
        c, b = self.c, self.b
        x = b.op("repeat_streams", b.op("embed", self.tokens, self.w("embed.weight")), n=c.hc_mult)
        for layer in range(c.num_hidden_layers):
            x = self._layer(layer, x)
        b.loc = "head"
        mix = b.op("hc_head_mix", x, *(self.w(f"hc_head_{p}") for p in ("fn", "base", "scale")),
                   eps=c.hc_eps, norm_eps=c.rms_norm_eps)  # fmt: skip
        return self.finish(self.norm(b.op("hc_collapse", x, mix), "norm.weight"))

    def _layer(self, layer: int, x: Value) -> Value:
        prefix = f"layers.{layer}"
        x = self._sublayer(x, f"{prefix}.hc_attn", f"{prefix}.attn_norm", lambda y: self._attention(layer, y))
        return self._sublayer(x, f"{prefix}.hc_ffn", f"{prefix}.ffn_norm", lambda y: self._moe(layer, y))

    def _sublayer(self, x: Value, hc: str, norm: str, body: Callable[[Value], Value]) -> Value:
        pre, post, comb = self.mix(x, hc)
        y = body(self.norm(self.b.op("hc_collapse", x, pre), f"{norm}.weight"))
        self.b.loc = hc
        return self.b.op("hc_expand", x, y, post, comb)

    def _attention(self, layer: int, x: Value) -> Value:
        c, b, name = self.c, self.b, f"layers.{layer}.attn"
        kind = c.layer_kinds[layer]
        rope = self.ropes[kind is not LayerKind.SLIDING]
        b.loc = name
        qr, q = self.queries(x, name)
        q = b.op("rotary", b.op("unit_norm", q, eps=c.rms_norm_eps), rope.cos, rope.sin)
        window, entries, selected = self.window(layer, x, rope), None, None
        if kind is not LayerKind.SLIDING:
            entries = self._compressor(layer, x, f"{name}.compressor", f"layers.{layer}")
        if kind is LayerKind.CSA:
            selected = self._indexer(layer, x, qr)
        return self.attend(layer, q, window, rope, entries, selected)

    def _compressor(self, layer: int, x: Value, name: str, state: str) -> Value:
        """Entries including those this call closes; leaves rings and entries in the state."""
        b, ratio = self.b, self.c.compress_ratios[layer]
        b.loc = name
        kv = self.linear(x, f"{name}.wkv")
        gate = b.op("position_bias", self.linear(x, f"{name}.wgate"), self.w(f"{name}.ape"), self.pos)
        new = self.pool(kv, gate, state, ratio, self.c.layer_kinds[layer] is LayerKind.CSA)
        return self.append(self.norm(new, f"{name}.norm.weight"), state, ratio)

    def _indexer(self, layer: int, x: Value, qr: Value) -> Value:
        b, name = self.b, f"layers.{layer}.attn.indexer"
        keys = self._compressor(layer, x, f"{name}.compressor", f"layers.{layer}.index")
        q, weights = self.index_queries(x, qr, name)
        ratio = self.c.compress_ratios[layer]
        scores = b.op("index_scores", q, weights, keys, self.pos, self.n_valid, ratio=ratio)
        return b.op("index_topk", scores, k=self.c.index_topk)

    def _moe(self, layer: int, x: Value) -> Value:
        c, b, name = self.c, self.b, f"layers.{layer}.ffn"
        scores = self.router_scores(x, name)
        if c.hash_layers[layer]:
            ids = b.op("route_hash", self.tokens, self.w(f"{name}.gate.tid2eid"))
        else:
            ids = b.op("route_topk", scores, self.w(f"{name}.gate.bias"), k=c.experts_per_token)
        return self.experts(layer, x, scores, ids)
