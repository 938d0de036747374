"""The sub-graphs that all DeepSeek-V4 generations share; models differ in how they join them.

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

from .architecture import ModelConfig

WeightOf = Callable[[str], WeightExpr]
"""Published tensor name (without `.scale`) -> its logical value."""

B, T, L, CTX = sym("B"), sym("T"), sym("L"), sym("ctx")


@dataclass(frozen=True)
class Rope:
    """Angles of one rotary flavour at the tokens of a step, and the frequencies behind them."""

    frequencies: Value
    cos: Value
    sin: Value


class LayerBuilder:
    """A module under construction: its arguments, rotary angles, and the layers' common parts.

    Attributes:
        ropes: by whether the layer compresses; those of the flavours in `flavours`.
    """

    def __init__(self, config: ModelConfig, weight_of: WeightOf, name: str, flavours: set[bool]) -> None:
        self.c, self.weight_of = config, weight_of
        self.module = Module(name, meta=model_meta(config))
        self.b = b = Builder(self.module)
        self.tokens = b.input("tokens", i32(B, T))
        self.n_valid = b.input("n_valid", i32(B))
        self.rows = b.input("rows", i32(B, L))
        self.pos = b.state("pos", i32(B))
        self.positions = b.op("positions", self.tokens, self.pos)
        self.ropes = {compressed: self._rope(compressed) for compressed in sorted(flavours)}
        self._entry_angles: dict[int, tuple[Value, Value]] = {}

    def _rope(self, compressed: bool) -> Rope:
        """Rotary angles at the tokens (section 3.6)."""
        c = self.c
        theta = c.compress_rope_theta if compressed else c.rope_theta
        y = c.yarn if compressed else None
        scaling = (y.factor, y.original, y.beta_fast, y.beta_slow) if y else ()
        expr = rope_frequencies(c.rope_dim, theta, *scaling)
        frequencies = self.b.weight(expr, "rope.compressed" if compressed else "rope.window")
        cos, sin = self.b.multi("rope_angles", self.positions, frequencies).results
        return Rope(frequencies, cos, sin)

    def angles_of_entries(self, ratio: int) -> tuple[Value, Value]:
        """Angles at the entries of `ratio` tokens that this call may close."""
        if ratio not in self._entry_angles:
            positions = self.b.op("entry_positions", self.tokens, self.pos, ratio=ratio)
            op = self.b.multi("rope_angles", positions, self.ropes[True].frequencies)
            self._entry_angles[ratio] = (op.results[0], op.results[1])
        return self._entry_angles[ratio]

    def finish(self, y: Value) -> Module:
        """The head over the normalised rows asked for, and the position after this call."""
        b = self.b
        logits = b.op("linear", b.op("gather_rows", y, self.rows), self.w("head.weight"))
        self.module.outputs["logits"] = logits
        self.module.outputs["pos"] = b.op("advance", self.pos, self.n_valid)
        return self.module

    # ------------------------------------------------------------------------- hyper-connections

    def mix(self, x: Value, hc: str) -> tuple[Value, Value, Value]:
        """pre, post and comb of a sub-layer."""
        c, b = self.c, self.b
        b.loc = hc
        parameters = (self.w(f"{hc}_{p}") for p in ("fn", "base", "scale"))
        made = b.multi(
            "hc_mix", x, *parameters, eps=c.hc_eps, norm_eps=c.rms_norm_eps, iters=c.hc_sinkhorn_iters
        )
        pre, post, comb = made.results
        return pre, post, comb

    # ---------------------------------------------------------------------------------- attention

    def queries(self, x: Value, name: str) -> tuple[Value, Value]:
        """The low-rank query, which an indexer shares, and the heads [B,T,H,D] before any rotation."""
        qr = self.norm(self.linear(x, f"{name}.wq_a"), f"{name}.q_norm.weight")
        return qr, self.b.op("split_heads", self.linear(qr, f"{name}.wq_b"), heads=self.c.heads)

    def window(self, layer: int, x: Value, rope: Rope) -> tuple[Value, Value]:
        """The rotated key-values of this call, and the ring of those before it."""
        c, name = self.c, f"layers.{layer}.attn"
        kv = self.norm(self.linear(x, f"{name}.wkv"), f"{name}.kv_norm.weight")
        kv = self.b.op("rotary", kv, rope.cos, rope.sin)
        return kv, self.b.state(f"layers.{layer}.window", f32(B, c.sliding_window, c.head_dim))

    def attend(
        self, layer: int, q: Value, window: tuple[Value, Value], rope: Rope, entries: Value | None,
        selected: Value | None,
    ) -> Value:  # fmt: skip
        """Rotated queries over a window and entries, through the output projections."""
        c, b, name, (kv, ring) = self.c, self.b, f"layers.{layer}.attn", window
        b.loc = name
        operands = [q, kv, ring, self.w(f"{name}.attn_sink"), self.pos, self.n_valid]
        operands += [v for v in (entries, selected) if v is not None]
        o = b.op("attention", *operands, scale=c.head_dim**-0.5, window=c.sliding_window,
                 ratio=c.compress_ratios[layer])  # fmt: skip
        self.module.outputs[ring.name] = b.op("ring_write", ring, kv, self.pos, self.n_valid)
        o = b.op("rotary", o, rope.cos, rope.sin, inverse=True)
        u = b.op("grouped_linear", o, self.w(f"{name}.wo_a.weight"), groups=c.o_groups)
        return self.linear(u, f"{name}.wo_b")

    def pool(self, kv: Value, gate: Value, state: str, ratio: int, overlap: bool) -> Value:
        """The entries that this call closes, not yet normalised; leaves the open group in the state."""
        b, channels = self.b, kv.type.shape[2]
        slots = ratio * (2 if overlap else 1)
        rings = [b.state(f"{state}.{r}_ring", f32(B, slots, channels)) for r in ("kv", "gate")]
        new = b.op("compress", kv, gate, *rings, self.pos, self.n_valid, ratio=ratio, overlap=overlap)
        for ring, rows in zip(rings, (kv, gate), strict=True):
            self.module.outputs[ring.name] = b.op("ring_write", ring, rows, self.pos, self.n_valid)
        return new

    def append(self, rows: Value, state: str, ratio: int) -> Value:
        """Rotated rows behind the entries of the calls before."""
        b, width = self.b, rows.type.shape[2]
        rotated = b.op("rotary", rows, *self.angles_of_entries(ratio))
        entries = b.state(f"{state}.entries", f32(B, capacity(ratio), width))
        after = b.op("entries_append", entries, rotated, self.pos, self.n_valid, ratio=ratio)
        self.module.outputs[entries.name] = after
        return after

    def index_queries(self, x: Value, qr: Value, name: str) -> tuple[Value, Value]:
        """Rotated index queries [B,T,h,d] and the weights of their heads."""
        c, b = self.c, self.b
        b.loc = name
        rope = self.ropes[True]
        q = b.op("split_heads", self.linear(qr, f"{name}.wq_b"), heads=c.index_n_heads)
        q = b.op("rotary", q, rope.cos, rope.sin)
        factor = (c.index_head_dim * c.index_n_heads) ** -0.5
        return q, b.op("scale", self.linear(x, f"{name}.weights_proj"), factor=factor)

    # ---------------------------------------------------------------------------------------- moe

    def router_scores(self, x: Value, name: str) -> Value:
        """sqrt(softplus(W x / temperature)) of every expert."""
        self.b.loc = f"{name}.gate"
        logits = self.linear(x, f"{name}.gate")
        if self.c.gate_temperature != 1.0:
            logits = self.b.op("scale", logits, factor=1 / self.c.gate_temperature)
        return self.b.op("sqrt_softplus", logits)

    def experts(self, layer: int, x: Value, scores: Value, ids: Value) -> Value:
        """The chosen experts, weighted, and the shared one."""
        c, b, name = self.c, self.b, f"layers.{layer}.ffn"
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

    # ------------------------------------------------------------------------------------ helpers

    def w(self, name: str) -> Value:
        return self.b.weight(self.weight_of(name), name)

    def linear(self, x: Value, name: str) -> Value:
        return self.b.op("linear", x, self.w(f"{name}.weight"))

    def norm(self, x: Value, name: str) -> Value:
        return self.b.op("rms_norm", x, self.w(name), eps=self.c.rms_norm_eps)


def capacity(ratio: int) -> Dim | int:
    """Entries of `ratio` tokens that a context has room for."""
    return CTX // ratio


def model_meta(c: ModelConfig) -> dict[str, object]:
    """What the runtime must know of the checkpoint."""
    v = c.vision
    images = {} if v is None else {
        "vision": {
            "patch_size": v.patch, "downsample": v.downsample, "max_tokens": v.max_tokens,
            "min_pixels": v.min_pixels, "max_wh_ratio": v.max_wh_ratio, "placeholder": v.image_token,
        }
    }  # fmt: skip
    halves = {"encoder_layers": max(c.shared.kv_sources)} if c.shared and c.shared.kv_sources else {}
    return {
        **images, **halves, "generation": c.generation.value,
        "max_positions": c.max_position_embeddings, "vocab_size": c.vocab_size, "bos": c.bos_token_id,
        "eos": list(c.eos_token_ids), "layers": c.num_hidden_layers, "experts": c.n_routed_experts,
        "experts_per_token": c.experts_per_token, "hidden_size": c.hidden_size,
    }  # fmt: skip
