"""Builds Engram: the configuration of its variants, and the ops of a layer inside any model's graph.

Three variants are published (Engram specification, section 1): DEMO, TK and PROD. They differ in constants
and in what stands around the gate. Knows no files.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

from dsv4c.errors import CheckpointError, ConfigError
from dsv4c.ir.dims import sym
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Builder, Value
from dsv4c.ir.types import TensorType, f32, i32
from dsv4c.ir.weights import WeightExpr

from .architecture import ModelConfig
from .engram_hash import LayerHash, layer_hashes

HISTORY = "engram.history"
"""The state with the last compressed ids; one for all layers of a model."""

_CONV_EPS = 1e-5
_F32_EPS = 2.0**-23


class Variant(enum.Enum):
    """Which published Engram: the paper's demonstration, TileKernels' operators, or DeepSeek-V4.1's layer."""

    DEMO = "demo"
    TK = "tk"
    PROD = "prod"


@dataclass(frozen=True)
class _Rules:
    """How a variant computes (sections 4 and 6).

    Attributes:
        eps: of both mean squares in the gate.
        copysign: whether delta = 0 counts as positive (TileKernels: its kernel, not its torch reference).
        dead: whether a negative id breaks the look-back and closes the gate.
        conv_taps: of the short convolution; 0 for none. Its dilation is the largest n-gram.
    """

    eps: float
    copysign: bool
    dead: bool
    conv_taps: int


_RULES = {
    Variant.DEMO: _Rules(_F32_EPS, copysign=False, dead=False, conv_taps=4),
    Variant.TK: _Rules(1e-20, copysign=True, dead=False, conv_taps=0),
    Variant.PROD: _Rules(1e-20, copysign=True, dead=True, conv_taps=0),
}


@dataclass(frozen=True)
class EngramConfig:
    """The Engram layers of one model.

    Attributes:
        layers: every layer that has one, in order; primes are never shared between them.
        table_sizes: where the search for primes starts, one per n-gram order 2, 3, ...
        heads, width: tables per order, and numbers per table row.
        hidden, streams: width and number of the residual streams.
        compressed_vocab: classes of tokens; fixes the multipliers.
        pad: the class that stands before the start of a sequence.
        vocab: tokens; 0 where the model is fed compressed ids.
        dead_token: a token without a class, such as that of image positions; -1 for none.
    """

    variant: Variant
    layers: tuple[int, ...]
    table_sizes: tuple[int, ...]
    heads: int
    width: int
    hidden: int
    streams: int
    compressed_vocab: int
    pad: int
    vocab: int = 0
    dead_token: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"width": self.width, "hidden": self.hidden, "streams": self.streams}
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"{name} = {value}", where="engram", allowed="1 or more")
        if not 0 <= self.pad < self.compressed_vocab:
            allowed = f"0..{self.compressed_vocab - 1}"
            raise ConfigError(f"pad class {self.pad}", where="engram", allowed=allowed)

    @cached_property
    def hashes(self) -> dict[int, LayerHash]:
        """Layer -> its hash."""
        return layer_hashes(self.layers, self.table_sizes, self.heads, self.compressed_vocab, self.seed)

    @property
    def max_ngram(self) -> int:
        return len(self.table_sizes) + 1

    @property
    def columns(self) -> int:
        """Table rows per token and layer."""
        return self.heads * len(self.table_sizes)

    @property
    def conv_taps(self) -> int:
        return _RULES[self.variant].conv_taps


def engram_config(config: ModelConfig) -> EngramConfig:
    """The Engram layers of a V4.1 model; `pad` is still a token, `with_token_map` makes it a class.

    Raises:
        ConfigError: the model has none.
    """
    e = config.engram
    if e is None:
        raise ConfigError("the model has no Engram layers", where="engram", allowed="engram_layer_ids")
    return EngramConfig(
        variant=Variant.PROD,
        layers=e.layers,
        table_sizes=(e.table_size,) * (e.max_ngram - 1),
        heads=e.heads,
        width=e.width,
        hidden=config.hidden_size,
        streams=config.hc_mult,
        compressed_vocab=e.compressed_vocab,
        pad=e.pad_token,
        vocab=config.vocab_size,
        dead_token=config.vision.image_token if config.vision else -1,
    )


@dataclass(frozen=True)
class EngramWeights:
    """The weights of one layer, n streams of width d.

    Attributes:
        table: [rows, width], FP8 codes or plain numbers.
        scales: E8M0 [rows, width/g], or None where the table is plain.
        kv: [(n+1) d, columns width]: the keys of the streams in order, then the value.
        bias: [(n+1) d], or None.
        q_norm, k_norm: [n, d], the norm weights of streams and keys.
        conv: [n d, taps], or None.
        conv_norm: [n, d], or None.
    """

    table: WeightExpr
    scales: WeightExpr | None
    kv: WeightExpr
    bias: WeightExpr | None
    q_norm: WeightExpr
    k_norm: WeightExpr
    conv: WeightExpr | None = None
    conv_norm: WeightExpr | None = None


@dataclass(frozen=True)
class EngramStep:
    """What all Engram layers of a step share: compressed ids, their history, position and valid count."""

    ids: Value
    history: Value
    pos: Value
    n_valid: Value


def begin_engram(
    b: Builder, config: EngramConfig, tokens: Value, pos: Value, n_valid: Value, token_map: WeightExpr | None
) -> EngramStep:
    """Compressed ids of this call, and the state with those before it.

    Args:
        tokens: i32 [B,T]; compressed ids already where `token_map` is None.
        pos: i32 [B], the state before `advance`.
        token_map: i32 [vocab], token -> class.
    """
    b.loc = "engram.tokens"
    if token_map is not None:
        dead, map_ = _RULES[config.variant].dead, b.weight(token_map, "engram.token_map")
        tokens = b.op("compress_tokens", tokens, map_, dead=dead, dead_token=config.dead_token)
    history = b.state(HISTORY, TensorType(DType.I32, (pos.type.shape[0], config.max_ngram - 1)))
    return EngramStep(tokens, history, pos, n_valid)


def end_engram(b: Builder, step: EngramStep) -> None:
    """Leave the ids of this call in the state; after the last layer has read it."""
    b.loc = "engram.tokens"
    after = b.op("ngram_history", step.history, step.ids, step.pos, step.n_valid)
    b.module.outputs[HISTORY] = after


def engram_block(
    b: Builder, x: Value, step: EngramStep, weights: EngramWeights, config: EngramConfig, layer: int
) -> Value:
    """Streams f32 [B,T,n,d] -> streams with what the layer remembers of their n-grams added (section 6).

    Rows depend on token ids only, so they are looked up in front of everything that reads `x`.
    """
    prefix, rules = f"layers.{layer}.engram", _RULES[config.variant]
    kv = _project(b, engram_lookup(b, step, weights, config, layer), weights, prefix)
    b.loc = prefix
    norms = [b.weight(weights.q_norm, f"{prefix}.q_norm"), b.weight(weights.k_norm, f"{prefix}.k_norm")]
    marks = (step.ids,) if rules.dead else ()
    out = b.op("engram_gate", x, kv, *norms, *marks, eps=rules.eps, copysign=rules.copysign,
               residual=not rules.conv_taps)  # fmt: skip
    return b.op("add", x, _with_conv(b, out, step, weights, config, layer)) if rules.conv_taps else out


def engram_lookup(
    b: Builder, step: EngramStep, weights: EngramWeights, config: EngramConfig, layer: int
) -> Value:
    """The table rows of every n-gram side by side, f32 [B,T,columns*width] (sections 4 and 5).

    Raises:
        CheckpointError: the table has not exactly the rows that the hash can name.
    """
    hash_, prefix = config.hashes[layer], f"layers.{layer}.engram"
    b.loc = prefix
    if weights.table.shape != (hash_.rows, config.width):
        allowed = f"[{hash_.rows}, {config.width}]"
        raise CheckpointError(f"the table is {list(weights.table.shape)}", where=prefix, allowed=allowed)
    rows = b.op("ngram_rows", step.ids, step.history, step.pos, step.n_valid, pad=config.pad,
                multipliers=hash_.multipliers, primes=hash_.primes, offsets=hash_.offsets, heads=config.heads,
                dead=_RULES[config.variant].dead)  # fmt: skip
    table = [b.weight(weights.table, f"{prefix}.embed")]
    if weights.scales is not None:
        table.append(b.weight(weights.scales, f"{prefix}.embed.scale"))
    return b.op("engram_rows", rows, *table)


def _project(b: Builder, e: Value, weights: EngramWeights, prefix: str) -> Value:
    b.loc = prefix
    kv = b.op("linear", e, b.weight(weights.kv, f"{prefix}.kv"))
    return kv if weights.bias is None else b.op("add_bias", kv, b.weight(weights.bias, f"{prefix}.kv.bias"))


def _with_conv(
    b: Builder, v: Value, step: EngramStep, weights: EngramWeights, config: EngramConfig, layer: int
) -> Value:
    """V + ShortConv(V); the state keeps the normalised rows that later tokens reach back to."""
    assert weights.conv is not None and weights.conv_norm is not None, "the variant has a convolution"
    prefix, dilation = f"layers.{layer}.engram.conv", config.max_ngram
    b.loc = prefix
    z = b.op("stream_norm", v, b.weight(weights.conv_norm, f"{prefix}.norm"), eps=_CONV_EPS)
    reach = dilation * (config.conv_taps - 1)
    ring = b.state(prefix, f32(step.pos.type.shape[0], reach, config.streams * config.hidden))
    taps = b.weight(weights.conv, f"{prefix}.taps")
    y = b.op("short_conv", z, ring, taps, step.pos, step.n_valid, dilation=dilation)
    b.module.outputs[prefix] = b.op("ring_write", ring, z, step.pos, step.n_valid)
    return b.op("add", v, b.op("split_heads", y, heads=config.streams))


B, T = sym("B"), sym("T")


def token_inputs(b: Builder) -> tuple[Value, Value, Value]:
    """The arguments `tokens` i32 [B,T], `n_valid` i32 [B] and the state `pos` i32 [B]."""
    return b.input("tokens", i32(B, T)), b.input("n_valid", i32(B)), b.state("pos", i32(B))
