"""What one DeepSeek-V4 or V4.1 checkpoint is, as values: sizes, kinds of layers, and its optional parts.

Source: the model specifications, section 1. Knows neither the files nor the spelling of their keys.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Generation(enum.Enum):
    """Which specification a model follows. The value is its `model_type`."""

    V4 = "deepseek_v4"
    V41 = "deepseek_v41"


class LayerKind(enum.Enum):
    """How a layer attends beyond its sliding window. The value is the name transformers uses."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"  # overlapping compressor and an indexer that picks entries
    HCA = "heavily_compressed_attention"  # plain compressor, every complete entry is visible
    SHARED = "shared_compressed_attention"  # V4.1: entries and selections that some layers publish for all


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies of compressed layers (specification, section 3.6)."""

    factor: float
    original: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class SharedAttention:
    """Who publishes what in V4.1 (specification of V4.1, sections 1 and 4.3 to 4.5).

    Attributes:
        kv_sources: layers with a compressor; a layer reads the store of the last one up to itself.
        index_sources: layers with an indexer; a layer attends to what the last one up to itself selects.
        candidate_source: the index source whose best blocks bound the choice of later ones; None: no bound.
        candidate_blocks, candidate_size: how many blocks it keeps, and entries per block.
    """

    kv_sources: tuple[int, ...]
    index_sources: tuple[int, ...]
    candidate_source: int | None
    candidate_blocks: int
    candidate_size: int

    def kv_source(self, layer: int) -> int:
        """The layer whose store `layer` reads."""
        return max(s for s in self.kv_sources if s <= layer)

    def index_source(self, layer: int) -> int:
        """The layer whose selection `layer` attends to."""
        return max(s for s in self.index_sources if s <= layer)


@dataclass(frozen=True)
class EngramTables:
    """Engram memory of a V4.1 model (specification of Engram, section 3).

    Attributes:
        layers: that have one, in order; rows: entries of their tables, in the same order.
        table_size: where the search for the primes of every n-gram order starts.
        heads, width: tables per order, and numbers per row.
        compressed_vocab: classes of tokens.
        pad_token: the token whose class stands before the start of a text.
    """

    layers: tuple[int, ...]
    rows: tuple[int, ...]
    max_ngram: int
    table_size: int
    heads: int
    width: int
    compressed_vocab: int
    pad_token: int


@dataclass(frozen=True)
class VisionTower:
    """The image encoder of a V4.1 model (specification of V4.1, section 9).

    Attributes:
        layers, width, heads, inner: of the ViT; its MLP has `inner` gated channels.
        patch: pixels per side of a patch; downsample: patches per side of one image token.
        max_tokens: the longest span of one image; min_pixels: smaller images are enlarged to about that.
        max_wh_ratio: wider images are squeezed to it; None: no bound.
        image_token: the id at every position of an image.
    """

    layers: int
    width: int
    heads: int
    inner: int
    patch: int
    rope_theta: float
    downsample: int
    max_tokens: int
    min_pixels: int
    max_wh_ratio: float | None
    image_token: int


@dataclass(frozen=True)
class Drafter:
    """DSpark, the draft layers of a V4.1 model: tensors `mtp.*` (specification of V4.1, section 8).

    Attributes:
        block: tokens drafted at once; noise_token: stands for those not known yet.
        targets: layers whose input streams feed the draft.
        experts, experts_per_token: of the draft layers.
    """

    block: int
    noise_token: int
    targets: tuple[int, ...]
    markov_rank: int
    experts: int
    experts_per_token: int


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one DeepSeek-V4 or V4.1 checkpoint.

    Attributes:
        rope_dim: rotated channels; they are the LAST `rope_dim` of `head_dim`.
        layer_kinds, compress_ratios, hash_layers: one entry per layer; the ratio is 0 exactly for SLIDING.
        yarn: applies to compressed layers only, with `compress_rope_theta`; None without scaling.
        n_mtp_layers: MTP blocks (V4.1: draft layers) the checkpoint may carry after the last layer.
        bos_token_id: None when the file names none.
        eos_token_ids: every id that ends a text; may be empty.
        expert_dtype: "fp4", "fp8" or None as the file says; the stored tensors decide what is read.
        weight_block_size: rows and columns that share one FP8 scale.
        gate_temperature: divides the router's logits.
        shared, engram, vision, drafter: parts only V4.1 has; `shared` is there for every V4.1 model, and
            without it `index_*` are those of CSA layers.
        raw: the parsed file.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    layer_kinds: tuple[LayerKind, ...]
    compress_ratios: tuple[int, ...]
    hash_layers: tuple[bool, ...]
    n_routed_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    n_mtp_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    expert_dtype: str | None
    weight_block_size: tuple[int, int]
    raw: dict[str, object] = field(repr=False, compare=False, hash=False)
    generation: Generation = Generation.V4
    gate_temperature: float = 1.0
    shared: SharedAttention | None = None
    engram: EngramTables | None = None
    vision: VisionTower | None = None
    drafter: Drafter | None = None
