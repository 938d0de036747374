"""Builds the image encoder of a DeepSeek-V4.1 checkpoint as a module of its own (section 9)."""

from __future__ import annotations

from dsv4c.ir.dims import sym
from dsv4c.ir.graph import Builder, Module, Value
from dsv4c.ir.types import f32, i32
from dsv4c.ir.weights import rope_frequencies, rows

from .architecture import ModelConfig, VisionTower
from .layers import WeightOf

_EPS = 1e-6
B, N, M, S = sym("B"), sym("N"), sym("M"), sym("S")


def build_vision(config: ModelConfig, weight_of: WeightOf) -> Module:
    """ViT, aligner and span of B images of one size as a module at level MODEL.

    Inputs: `patches` f32[B,N,3 p p] and their `places` i32[B,N,2] (row, column); `cells` i32[B,M,k k], the
    patches of each image token with -1 outside the image; `layout` i32[B,S], the rows of the span, -1 for its
    start, -2 for the end of a row of tokens, -3 for its end. Outputs: `tower` f32[B,N,w], `rows` f32[B,S,d].
    """
    assert config.vision is not None, "the model has a vision tower"
    return _VisionBuilder(config, config.vision, weight_of).build()


class _VisionBuilder:
    def __init__(self, config: ModelConfig, tower: VisionTower, weight_of: WeightOf) -> None:
        self.c, self.v, self.weight_of = config, tower, weight_of
        self.module = Module("deepseek_v41_vision", meta={"hidden_size": config.hidden_size})
        self.b = Builder(self.module)

    def build(self) -> Module:
        v, b = self.v, self.b
        patches = b.input("patches", f32(B, N, 3 * v.patch**2))
        places = b.input("places", i32(B, N, 2))
        cells, layout = b.input("cells", i32(B, M, v.downsample**2)), b.input("layout", i32(B, S))
        frequencies = b.weight(rope_frequencies(v.width // v.heads // 2, v.rope_theta), "rope.vision")
        angles = b.multi("grid_angles", places, frequencies)
        self.cos, self.sin = angles.results
        b.loc = "vision.patch_embed"
        x = self._affine(patches, "vision.patch_embed.proj")
        for i in range(v.layers):
            name = f"vision.blocks.{i}"
            b.loc = name
            x = b.op("add", x, self._attention(self._norm(x, f"{name}.norm1"), f"{name}.attn"))
            x = b.op("add", x, self._mlp(self._norm(x, f"{name}.norm2"), f"{name}.mlp"))
        b.loc = "vision"
        x = self._norm(x, "vision.norm")
        self.module.outputs["tower"] = x
        b.loc = "aligner"
        hidden = self._affine(b.op("gather_cells", x, cells), "aligner.w1")
        tokens = self._affine(b.op("gelu", hidden), "aligner.w2")
        marks = (self._w(f"image_{name}") for name in ("start", "newline", "end"))
        self.module.outputs["rows"] = b.op("image_span", tokens, layout, *marks)
        return self.module

    def _attention(self, x: Value, name: str) -> Value:
        """Every patch sees every patch; q, k and v are thirds of one projection."""
        v, b = self.v, self.b
        b.loc = name
        parts = []
        for third in range(3):
            low, high = third * v.width, (third + 1) * v.width
            y = b.op("linear", x, self._rows(f"{name}.wqkv.weight", low, high))
            y = b.op("add_bias", y, self._rows(f"{name}.wqkv.bias", low, high))
            y = b.op("split_heads", y, heads=v.heads)
            parts.append(y if third == 2 else b.op("rotary", y, self.cos, self.sin, halves=True))
        o = b.op("full_attention", *parts, scale=(v.width // v.heads) ** -0.5)
        return self._affine(b.op("merge_heads", o), f"{name}.wo")

    def _mlp(self, x: Value, name: str) -> Value:
        b, inner = self.b, self.v.inner
        b.loc = name
        gate = b.op("linear", x, self._rows(f"{name}.w1.weight", 0, inner))
        up = b.op("linear", x, self._rows(f"{name}.w1.weight", inner, 2 * inner))
        return b.op("linear", b.op("swiglu", gate, up), self._w(f"{name}.w2.weight"))

    def _affine(self, x: Value, name: str) -> Value:
        y = self.b.op("linear", x, self._w(f"{name}.weight"))
        return self.b.op("add_bias", y, self._w(f"{name}.bias"))

    def _norm(self, x: Value, name: str) -> Value:
        return self.b.op("rms_norm", x, self._w(f"{name}.weight"), eps=_EPS)

    def _w(self, name: str) -> Value:
        return self.b.weight(self.weight_of(name), name)

    def _rows(self, name: str, low: int, high: int) -> Value:
        """A part of a stacked matrix or bias as a weight of its own."""
        return self.b.weight(rows(self.weight_of(name), low, high), f"{name}.{low}-{high}")
