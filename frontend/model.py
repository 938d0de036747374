"""Builds the MODEL-level graph of a DeepSeek-V4 checkpoint: what section 4 of the specification says.

One step function serves prefill and decode: ``step(tokens[B,T], n_valid[B], rows[B,L], state) ->
logits[B,L,vocab], state``. Every weight is a lazy expression and every routed expert its own sub-graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from dsv4c.ir.dims import Dim, sym
from dsv4c.ir.graph import Builder, Module, Value
from dsv4c.ir.types import f32, i32
from dsv4c.ir.weights import WeightExpr, rope_frequencies

from .config import LayerKind, ModelConfig

WeightOf = Callable[[str], WeightExpr]
"""Published tensor name (without `.scale`) -> its logical value."""

B, T, L, CTX = sym("B"), sym("T"), sym("L"), sym("ctx")


def build_model(config: ModelConfig, weight_of: WeightOf, name: str = "deepseek_v4") -> Module:
    """The whole model as one module at level MODEL.

    Inputs: `tokens` i32[B,T], `n_valid` i32[B] (real tokens per row), `rows` i32[B,L] (tokens whose
    logits are wanted). Output: `logits` f32[B,L,vocab].
    """
    return _ModelBuilder(config, weight_of, name).build()


@dataclass(frozen=True)
class _Rope:
    """Angles of one rotary flavour: at the tokens, and per ratio at the entries this call may close."""

    frequencies: Value
    cos: Value
    sin: Value


class _ModelBuilder:
    def __init__(self, config: ModelConfig, weight_of: WeightOf, name: str) -> None:
        self.c, self.weight_of = config, weight_of
        self.module = Module(name, meta=_meta(config))
        self.b = Builder(self.module)
        self._entry_angles: dict[int, tuple[Value, Value]] = {}

    # ------------------------------------------------------------------ whole model

    def build(self) -> Module:
        c, b = self.c, self.b
        self.tokens = b.input("tokens", i32(B, T))
        self.n_valid = b.input("n_valid", i32(B))
        rows = b.input("rows", i32(B, L))
        self.pos = b.state("pos", i32(B))
        self.positions = b.op("positions", self.tokens, self.pos)
        self.ropes = self._ropes()
        x = b.op("repeat_streams", b.op("embed", self.tokens, self.w("embed.weight")), n=c.hc_mult)
        for layer in range(c.num_hidden_layers):
            x = self._layer(layer, x)
        b.loc = "head"
        mix = b.op("hc_head_mix", x, *(self.w(f"hc_head_{p}") for p in ("fn", "base", "scale")),
                   eps=c.hc_eps, norm_eps=c.rms_norm_eps)  # fmt: skip
        y = self.norm(b.op("hc_collapse", x, mix), "norm.weight")
        logits = b.op("linear", b.op("gather_rows", y, rows), self.w("head.weight"))
        self.module.outputs["logits"] = logits
        self.module.outputs["pos"] = b.op("advance", self.pos, self.n_valid)
        return self.module

    def _ropes(self) -> dict[bool, _Rope]:
        """Rotary angles by whether the layer compresses (section 3.6), only those some layer needs."""
        c, out = self.c, {}
        for compressed in sorted({kind is not LayerKind.SLIDING for kind in c.layer_kinds}):
            theta = c.compress_rope_theta if compressed else c.rope_theta
            y = c.yarn if compressed else None
            scaling = (y.factor, y.original, y.beta_fast, y.beta_slow) if y else ()
            expr = rope_frequencies(c.rope_dim, theta, *scaling)
            frequencies = self.b.weight(expr, "rope.compressed" if compressed else "rope.window")
            cos, sin = self.b.multi("rope_angles", self.positions, frequencies).results
            out[compressed] = _Rope(frequencies, cos, sin)
        return out

    def _layer(self, layer: int, x: Value) -> Value:
        prefix = f"layers.{layer}"
        x = self._sublayer(x, f"{prefix}.hc_attn", f"{prefix}.attn_norm", lambda y: self._attention(layer, y))
        return self._sublayer(x, f"{prefix}.hc_ffn", f"{prefix}.ffn_norm", lambda y: self._moe(layer, y))

    def _sublayer(self, x: Value, hc: str, norm: str, body: Callable[[Value], Value]) -> Value:
        c, b = self.c, self.b
        b.loc = hc
        parameters = (self.w(f"{hc}_{p}") for p in ("fn", "base", "scale"))
        mix = b.multi(
            "hc_mix", x, *parameters, eps=c.hc_eps, norm_eps=c.rms_norm_eps, iters=c.hc_sinkhorn_iters
        )
        pre, post, comb = mix.results
        y = body(self.norm(b.op("hc_collapse", x, pre), f"{norm}.weight"))
        b.loc = hc
        return b.op("hc_expand", x, y, post, comb)

    # -------------------------------------------------------------------- attention

    def _attention(self, layer: int, x: Value) -> Value:
        c, b, name = self.c, self.b, f"layers.{layer}.attn"
        kind, ratio = c.layer_kinds[layer], c.compress_ratios[layer]
        rope = self.ropes[kind is not LayerKind.SLIDING]
        b.loc = name
        qr = self.norm(self.linear(x, f"{name}.wq_a"), f"{name}.q_norm.weight")
        q = b.op("split_heads", self.linear(qr, f"{name}.wq_b"), heads=c.heads)
        q = b.op("rotary", b.op("unit_norm", q, eps=c.rms_norm_eps), rope.cos, rope.sin)
        kv = self.norm(self.linear(x, f"{name}.wkv"), f"{name}.kv_norm.weight")
        kv = b.op("rotary", kv, rope.cos, rope.sin)
        ring = b.state(f"layers.{layer}.window", f32(B, c.sliding_window, c.head_dim))
        operands = [q, kv, ring, self.w(f"{name}.attn_sink"), self.pos, self.n_valid]
        if kind is not LayerKind.SLIDING:
            operands.append(self._compressor(layer, x, f"{name}.compressor", c.head_dim, f"layers.{layer}"))
        if kind is LayerKind.CSA:
            operands.append(self._indexer(layer, x, qr))
        b.loc = name
        o = b.op("attention", *operands, scale=c.head_dim**-0.5, window=c.sliding_window, ratio=ratio)
        self.module.outputs[ring.name] = b.op("ring_write", ring, kv, self.pos, self.n_valid)
        o = b.op("rotary", o, rope.cos, rope.sin, inverse=True)
        u = b.op("grouped_linear", o, self.w(f"{name}.wo_a.weight"), groups=c.o_groups)
        return self.linear(u, f"{name}.wo_b")

    def _compressor(self, layer: int, x: Value, name: str, width: int, state: str) -> Value:
        """Entries including those this call closes; leaves rings and entries in the state."""
        c, b = self.c, self.b
        ratio, overlap = c.compress_ratios[layer], c.layer_kinds[layer] is LayerKind.CSA
        halves = 2 if overlap else 1
        b.loc = name
        kv = self.linear(x, f"{name}.wkv")
        gate = b.op("position_bias", self.linear(x, f"{name}.wgate"), self.w(f"{name}.ape"), self.pos)
        rings = [b.state(f"{state}.{r}_ring", f32(B, halves * ratio, halves * width)) for r in ("kv", "gate")]
        new = b.op("compress", kv, gate, *rings, self.pos, self.n_valid, ratio=ratio, overlap=overlap)
        for ring, rows in zip(rings, (kv, gate), strict=True):
            self.module.outputs[ring.name] = b.op("ring_write", ring, rows, self.pos, self.n_valid)
        new = b.op("rotary", self.norm(new, f"{name}.norm.weight"), *self._angles_of_entries(ratio))
        entries = b.state(f"{state}.entries", f32(B, _capacity(ratio), width))
        after = b.op("entries_append", entries, new, self.pos, self.n_valid, ratio=ratio)
        self.module.outputs[entries.name] = after
        return after

    def _angles_of_entries(self, ratio: int) -> tuple[Value, Value]:
        if ratio not in self._entry_angles:
            positions = self.b.op("entry_positions", self.tokens, self.pos, ratio=ratio)
            op = self.b.multi("rope_angles", positions, self.ropes[True].frequencies)
            self._entry_angles[ratio] = (op.results[0], op.results[1])
        return self._entry_angles[ratio]

    def _indexer(self, layer: int, x: Value, qr: Value) -> Value:
        c, b, name = self.c, self.b, f"layers.{layer}.attn.indexer"
        keys = self._compressor(layer, x, f"{name}.compressor", c.index_head_dim, f"layers.{layer}.index")
        b.loc = name
        rope = self.ropes[True]
        q = b.op("split_heads", self.linear(qr, f"{name}.wq_b"), heads=c.index_n_heads)
        q = b.op("rotary", q, rope.cos, rope.sin)
        factor = (c.index_head_dim * c.index_n_heads) ** -0.5
        weights = b.op("scale", self.linear(x, f"{name}.weights_proj"), factor=factor)
        ratio = c.compress_ratios[layer]
        scores = b.op("index_scores", q, weights, keys, self.pos, self.n_valid, ratio=ratio)
        return b.op("index_topk", scores, k=c.index_topk)

    # -------------------------------------------------------------------------- moe

    def _moe(self, layer: int, x: Value) -> Value:
        c, b, name = self.c, self.b, f"layers.{layer}.ffn"
        b.loc = f"{name}.gate"
        scores = b.op("sqrt_softplus", self.linear(x, f"{name}.gate"))
        if c.hash_layers[layer]:
            ids = b.op("route_hash", self.tokens, self.w(f"{name}.gate.tid2eid"))
        else:
            ids = b.op("route_topk", scores, self.w(f"{name}.gate.bias"), k=c.experts_per_token)
        weights = b.op("route_weights", scores, ids, factor=c.routed_scaling_factor, eps=1e-20)
        b.loc = name
        routed = b.multi(
            "dispatch", x, ids, weights, self.n_valid, experts=c.n_routed_experts, label=f"R{layer}"
        )
        ys = []
        for expert in range(c.n_routed_experts):
            rows, gate = routed.results[2 * expert : 2 * expert + 2]
            ys.append(self._mlp(rows, f"{name}.experts.{expert}", gate))
        b.loc = name
        y = b.op("combine", ids, self.n_valid, *ys)
        shared = self._mlp(x, f"{name}.shared_experts", None)
        b.loc = name
        return b.op("add", y, shared)

    def _mlp(self, x: Value, name: str, routing: Value | None) -> Value:
        b, limit = self.b, float(self.c.swiglu_limit)
        b.loc = name
        gate = b.op("clamp", self.linear(x, f"{name}.w1"), low=-inf, high=limit)
        up = b.op("clamp", self.linear(x, f"{name}.w3"), low=-limit, high=limit)
        hidden = b.op("swiglu", gate, up)
        if routing is not None:
            hidden = b.op("scale_rows", hidden, routing)
        return self.linear(hidden, f"{name}.w2")

    # ---------------------------------------------------------------------- helpers

    def w(self, name: str) -> Value:
        return self.b.weight(self.weight_of(name), name)

    def linear(self, x: Value, name: str) -> Value:
        return self.b.op("linear", x, self.w(f"{name}.weight"))

    def norm(self, x: Value, name: str) -> Value:
        return self.b.op("rms_norm", x, self.w(name), eps=self.c.rms_norm_eps)


def _capacity(ratio: int) -> Dim | int:
    return CTX // ratio


def _meta(c: ModelConfig) -> dict[str, object]:
    """What the runtime must know of the checkpoint."""
    return {
        "max_positions": c.max_position_embeddings, "vocab_size": c.vocab_size, "bos": c.bos_token_id,
        "eos": list(c.eos_token_ids), "layers": c.num_hidden_layers, "experts": c.n_routed_experts,
        "experts_per_token": c.experts_per_token, "hidden_size": c.hidden_size,
    }  # fmt: skip
