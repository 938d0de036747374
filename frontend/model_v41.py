"""Builds the MODEL-level graph of a DeepSeek-V4.1 checkpoint: sections 4 to 6 of its specification.

What differs from V4: the streams are collapsed by weights that the sub-layer before has mixed, some layers
publish compressed entries and selections for those behind them, Engram layers add what they remember of
n-grams, and image positions choose experts by a bias of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv4c.errors import ConfigError
from dsv4c.ir.dims import sym
from dsv4c.ir.graph import Module, Value
from dsv4c.ir.types import f32, i32
from dsv4c.ir.weights import WeightExpr

from .architecture import ModelConfig
from .engram import EngramConfig, EngramStep, EngramWeights, begin_engram, end_engram, engram_block
from .layers import B, LayerBuilder, WeightOf

IMAGES = sym("I")
"""Image rows that one call brings; at least one, which may be unused."""


@dataclass(frozen=True)
class EngramParts:
    """Where the Engram layers of a model come from.

    Attributes:
        config: with the class of the pad token, see `engram_layer.with_token_map`.
        weights: layer -> its weights.
        token_map: i32 [vocab], token -> class.
    """

    config: EngramConfig
    weights: Callable[[int], EngramWeights]
    token_map: WeightExpr


def build_model_v41(
    config: ModelConfig, weight_of: WeightOf, engram: EngramParts | None, name: str = "deepseek_v41"
) -> Module:
    """The whole text model as one module at level MODEL.

    Inputs: `tokens` i32[B,T], `n_valid` i32[B] (real tokens per row), `rows` i32[B,L] (tokens whose
    logits are wanted); with a vision tower also `images` f32[B,I,d] and `n_images` i32[B], the rows that
    stand for the image tokens of this call in their order. Output: `logits` f32[B,L,vocab].

    Raises:
        ConfigError: the model has Engram layers and `engram` is missing.
    """
    return _V41Builder(config, weight_of, engram, name).build()


class _V41Builder(LayerBuilder):
    def __init__(
        self, config: ModelConfig, weight_of: WeightOf, engram: EngramParts | None, name: str
    ) -> None:
        super().__init__(config, weight_of, name, {ratio > 0 for ratio in config.compress_ratios})
        assert config.shared is not None, "every V4.1 model shares its entries"
        self.shared, self.engram = config.shared, engram
        self.latents: dict[int, tuple[Value, Value]] = {}  # source layer -> its entries and index keys
        self.selections: dict[int, Value] = {}  # source layer -> what it selects
        self.candidates: Value | None = None

    def build(self) -> Module:
        c, b = self.c, self.b
        y = self._embedding()
        memory = self._engram_step()
        x = b.op("repeat_streams", y, n=c.hc_mult)
        pre: Value | None = None  # none yet: the first sub-layer takes the first stream, which is y
        for layer in range(c.num_hidden_layers):
            if memory and self.engram and layer in self.engram.config.layers:
                x = engram_block(b, x, memory, self.engram.weights(layer), self.engram.config, layer)
            x, pre = self._layer(layer, x, pre, y)
        if memory:
            end_engram(b, memory)
        b.loc = "head"
        assert pre is not None, "a model has layers"
        return self.finish(self.norm(b.op("hc_collapse", x, pre), "norm.weight"))

    def _embedding(self) -> Value:
        """Embeddings [B,T,d], those of image positions from outside (section 9.4)."""
        b, vision = self.b, self.c.vision
        y = b.op("embed", self.tokens, self.w("embed.weight"))
        if vision is None:
            return y
        images, count = b.input("images", f32(B, IMAGES, self.c.hidden_size)), b.input("n_images", i32(B))
        return b.op("merge_images", y, self.tokens, images, count, image_token=vision.image_token)

    def _engram_step(self) -> EngramStep | None:
        if self.c.engram is None:
            return None
        if self.engram is None:
            raise ConfigError("the model has Engram layers", where="engram", allowed="with their weights")
        return begin_engram(
            self.b, self.engram.config, self.tokens, self.pos, self.n_valid, self.engram.token_map
        )

    def _layer(self, layer: int, x: Value, pre: Value | None, first: Value) -> tuple[Value, Value]:
        """The streams behind a layer, and the weights by which the next sub-layer collapses them."""
        name = f"layers.{layer}"
        x, pre = self._sublayer(x, pre, first, f"{name}.hc_attn", lambda y: self._attention(layer, y))
        return self._sublayer(x, pre, first, f"{name}.hc_ffn", lambda y: self._moe(layer, y))

    def _sublayer(
        self, x: Value, pre: Value | None, first: Value, hc: str, body: Callable[[Value], Value]
    ) -> tuple[Value, Value]:
        """Section 4.2: collapsed by the weights mixed one sub-layer earlier, expanded by its own."""
        after, post, comb = self.mix(x, hc)
        y = first if pre is None else self.b.op("hc_collapse", x, pre)
        y = body(self.norm(y, f"{hc.replace('.hc_', '.')}_norm.weight"))
        self.b.loc = hc
        return self.b.op("hc_expand", x, y, post, comb), after

    # ---------------------------------------------------------------------------------- attention

    def _attention(self, layer: int, x: Value) -> Value:
        """Section 4.3."""
        c, b, name = self.c, self.b, f"layers.{layer}.attn"
        ratio = c.compress_ratios[layer]
        rope = self.ropes[ratio > 0]
        b.loc = name
        qr, q = self.queries(x, name)
        q = b.op("rotary", q, rope.cos, rope.sin)
        window, entries, selected = self.window(layer, x, rope), None, None
        if layer in self.shared.kv_sources:
            self.latents[layer] = self._publish(layer, x)
        if layer in self.shared.index_sources:
            self.selections[layer] = self._select(layer, x, qr)
        if ratio:
            entries = self.latents[self.shared.kv_source(layer)][0]
            selected = self.selections[self.shared.index_source(layer)]
        return self.attend(layer, q, window, rope, entries, selected)

    def _publish(self, layer: int, x: Value) -> tuple[Value, Value]:
        """Entries and index keys of this layer's store (section 4.4)."""
        b, name, state = self.b, f"layers.{layer}.attn", f"layers.{layer}"
        ratio = self.c.compress_ratios[layer]
        b.loc = f"{name}.compressor"
        latent = self.linear(x, f"{name}.compressor.wkv")
        if ratio > 1:
            gate = self.linear(x, f"{name}.compressor.wgate")
            latent = self.pool(latent, gate, state, ratio, overlap=False)
        latent = self.norm(latent, f"{name}.compressor.norm.weight")
        entries = self.append(latent, state, ratio)
        b.loc = f"{name}.indexer"
        keys = self.norm(self.linear(latent, f"{name}.indexer.wk"), f"{name}.indexer.k_norm.weight")
        return entries, self.append(keys, f"{state}.index", ratio)

    def _select(self, layer: int, x: Value, qr: Value) -> Value:
        """The entries that this layer and those behind it attend to (section 4.5)."""
        c, b, shared, name = self.c, self.b, self.shared, f"layers.{layer}.attn.indexer"
        q, weights = self.index_queries(x, qr, name)
        keys, ratio = self.latents[shared.kv_source(layer)][1], c.compress_ratios[layer]
        scores = b.op("index_scores", q, weights, keys, self.pos, self.n_valid, ratio=ratio)
        if layer == shared.candidate_source:
            self.candidates = b.op("candidate_blocks", scores, self.pos, self.n_valid, ratio=ratio,
                                   size=shared.candidate_size, count=shared.candidate_blocks)  # fmt: skip
        elif self.candidates is not None:
            scores = b.op("index_restrict", scores, self.candidates, size=shared.candidate_size)
        return b.op("index_topk", scores, k=c.index_topk)

    # ---------------------------------------------------------------------------------------- moe

    def _moe(self, layer: int, x: Value) -> Value:
        """Section 4.6: image positions add a bias of their own."""
        c, name = self.c, f"layers.{layer}.ffn"
        scores = self.router_scores(x, name)
        operands, token = [scores, self.w(f"{name}.gate.bias")], -1
        if c.vision is not None:
            operands += [self.tokens, self.w(f"{name}.gate.bias_vl")]
            token = c.vision.image_token
        ids = self.b.op("route_topk", *operands, k=c.experts_per_token, image_token=token)
        return self.experts(layer, x, scores, ids)
