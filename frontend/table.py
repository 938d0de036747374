"""What tensors a model has: the tables of section 2 of the model specifications, per configuration.

Owns published names, shapes and which number formats each tensor may come in. Knows no files.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dsv4c.ir.dtypes import DType
from dsv4c.ir.rows import FP4_GROUP

from .architecture import Drafter, EngramTables, Generation, LayerKind, ModelConfig, VisionTower

ROW_GROUP = 32  # numbers of an Engram row that share one scale


class Role(enum.Enum):
    """What a tensor is for; decides which stored formats are allowed."""

    PLAIN = "plain"  # embedding, norms, compressor, router: never quantised
    PRECISE = "precise"  # hyper-connections, sinks, biases: published in F32
    LINEAR = "linear"  # published in FP8 with `.scale`
    EXPERT = "expert"  # published in packed FP4 or FP8 with `.scale`
    TABLE = "table"  # hash routing: expert ids of every token
    ROWS = "rows"  # Engram memory: published in FP8 with `.scale` per part of a row, decoded at look-up


_FLOATS = (DType.F32, DType.BF16, DType.F16)

ALLOWED: dict[Role, tuple[DType, ...]] = {
    Role.PLAIN: _FLOATS,
    Role.PRECISE: _FLOATS,
    Role.LINEAR: (*_FLOATS, DType.F8E4M3),
    Role.EXPERT: (*_FLOATS, DType.F8E4M3, DType.F4E2M1X2),
    Role.TABLE: (DType.I64, DType.I32),
    Role.ROWS: (*_FLOATS, DType.F8E4M3),
}
"""Role -> element types a checkpoint may hold it in. F8E4M3 and F4E2M1X2 come with a scale."""

SCALED = (DType.F8E4M3, DType.F4E2M1X2)
SCALE_DTYPES = (DType.F8E8M0, DType.F32)


@dataclass(frozen=True)
class TensorSpec:
    """One published tensor.

    Attributes:
        shape: logical, in numbers; packed FP4 stores half as many columns.
    """

    shape: tuple[int, ...]
    role: Role

    def stored_shape(self, dtype: DType) -> tuple[int, ...]:
        """Shape on disk in `dtype`; packed FP4 needs an even number of columns, else it is rounded up."""
        if dtype is DType.F4E2M1X2:
            return (*self.shape[:-1], -(-self.shape[-1] // 2))
        return self.shape

    def scale_shape(self, dtype: DType, block: tuple[int, int]) -> tuple[int, int]:
        """[rows, columns] of the scale that goes with a matrix stored in `dtype`, one of `SCALED`."""
        rows, columns = self.shape
        if dtype is DType.F4E2M1X2:
            return (rows, -(-columns // FP4_GROUP))
        if self.role is Role.ROWS:
            return (rows, columns // ROW_GROUP)
        return (-(-rows // block[0]), -(-columns // block[1]))

    @property
    def scale_dtypes(self) -> tuple[DType, ...]:
        """What its scale may be stored in; those of Engram rows are decoded as codes."""
        return SCALE_DTYPES[:1] if self.role is Role.ROWS else SCALE_DTYPES

    def allows(self, dtype: DType) -> bool:
        """Whether a checkpoint may hold it in `dtype`; codes must fill their bytes and groups."""
        if dtype not in ALLOWED[self.role]:
            return False
        whole = {DType.F4E2M1X2: 2, DType.F8E4M3: ROW_GROUP if self.role is Role.ROWS else 1}
        return self.shape[-1] % whole.get(dtype, 1) == 0


def scale_name(weight: str) -> str:
    """`x.weight` -> `x.scale`."""
    return weight.removesuffix(".weight") + ".scale"


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the model without scales, MTP blocks included, in the order of the layers."""
    v41 = config.generation is Generation.V41
    out = {"embed.weight": TensorSpec((config.vocab_size, config.hidden_size), Role.PLAIN)}
    for i in range(config.num_hidden_layers):
        out.update({f"layers.{i}.{n}": s for n, s in _layer(config, i)})
    for i in range(config.n_mtp_layers):
        block = _draft_layer(config, i) if v41 else _mtp_block(config)
        out.update({f"mtp.{i}.{n}": s for n, s in block})
    out.update(_norm(config) if v41 else _head(config))
    out["head.weight"] = TensorSpec((config.vocab_size, config.hidden_size), Role.PLAIN)
    out.update(_vision(config.vision, config.hidden_size) if config.vision else ())
    return out


_Specs = Iterator[tuple[str, TensorSpec]]


def _layer(c: ModelConfig, i: int) -> _Specs:
    kind, ratio = c.layer_kinds[i], c.compress_ratios[i]
    if c.engram and i in c.engram.layers:
        yield from _engram(c, c.engram, c.engram.rows[c.engram.layers.index(i)])
    yield from _norms_and_mixes(c)
    yield from _attention(c)
    if kind is LayerKind.SHARED:
        yield from _shared_attention(c, i)
    elif kind is not LayerKind.SLIDING:
        yield from _own_attention(c, kind, ratio)
    yield from _experts(c, c.n_routed_experts, c.hash_layers[i])


def _norms_and_mixes(c: ModelConfig) -> _Specs:
    d, mixes = c.hidden_size, (2 + c.hc_mult) * c.hc_mult
    for part in ("attn", "ffn"):
        yield f"{part}_norm.weight", TensorSpec((d,), Role.PLAIN)
        yield f"hc_{part}_fn", TensorSpec((mixes, c.hc_mult * d), Role.PRECISE)
        yield f"hc_{part}_base", TensorSpec((mixes,), Role.PRECISE)
        yield f"hc_{part}_scale", TensorSpec((3,), Role.PRECISE)


def _attention(c: ModelConfig) -> _Specs:
    d, width = c.hidden_size, c.heads * c.head_dim
    yield "attn.attn_sink", TensorSpec((c.heads,), Role.PRECISE)
    yield "attn.wq_a.weight", TensorSpec((c.q_lora_rank, d), Role.LINEAR)
    yield "attn.q_norm.weight", TensorSpec((c.q_lora_rank,), Role.PLAIN)
    yield "attn.wq_b.weight", TensorSpec((width, c.q_lora_rank), Role.LINEAR)
    yield "attn.wkv.weight", TensorSpec((c.head_dim, d), Role.LINEAR)
    yield "attn.kv_norm.weight", TensorSpec((c.head_dim,), Role.PLAIN)
    yield "attn.wo_a.weight", TensorSpec((c.o_groups * c.o_lora_rank, width // c.o_groups), Role.LINEAR)
    yield "attn.wo_b.weight", TensorSpec((d, c.o_groups * c.o_lora_rank), Role.LINEAR)


def _own_attention(c: ModelConfig, kind: LayerKind, ratio: int) -> _Specs:
    """V4: every compressed layer has its compressor, and with CSA its indexer."""
    yield from _compressor(c, "attn.compressor", c.head_dim, ratio, 2 if kind is LayerKind.CSA else 1)
    if kind is LayerKind.CSA:
        yield from _index_queries(c)
        yield from _compressor(c, "attn.indexer.compressor", c.index_head_dim, ratio, 2)


def _compressor(c: ModelConfig, prefix: str, dim: int, ratio: int, overlap: int) -> _Specs:
    for name in ("wkv", "wgate"):
        yield f"{prefix}.{name}.weight", TensorSpec((overlap * dim, c.hidden_size), Role.PLAIN)
    yield f"{prefix}.ape", TensorSpec((ratio, overlap * dim), Role.PRECISE)
    yield f"{prefix}.norm.weight", TensorSpec((dim,), Role.PLAIN)


def _index_queries(c: ModelConfig) -> _Specs:
    heads, dim = c.index_n_heads, c.index_head_dim
    yield "attn.indexer.wq_b.weight", TensorSpec((heads * dim, c.q_lora_rank), Role.LINEAR)
    yield "attn.indexer.weights_proj.weight", TensorSpec((heads, c.hidden_size), Role.PLAIN)


def _shared_attention(c: ModelConfig, i: int) -> _Specs:
    """V4.1: what a layer publishes for itself and those after it; a ratio of 1 has nothing to gate."""
    assert c.shared is not None, "a layer of this kind has sources"
    if i in c.shared.kv_sources:
        latent = TensorSpec((c.head_dim, c.hidden_size), Role.PLAIN)
        yield "attn.compressor.wkv.weight", latent
        if c.compress_ratios[i] > 1:
            yield "attn.compressor.wgate.weight", latent
        yield "attn.compressor.norm.weight", TensorSpec((c.head_dim,), Role.PLAIN)
        yield "attn.indexer.wk.weight", TensorSpec((c.index_head_dim, c.head_dim), Role.PLAIN)
        yield "attn.indexer.k_norm.weight", TensorSpec((c.index_head_dim,), Role.PLAIN)
    if i in c.shared.index_sources:
        yield from _index_queries(c)


def _experts(c: ModelConfig, experts: int, hashed: bool = False) -> _Specs:
    d, inner = c.hidden_size, c.moe_intermediate_size
    yield "ffn.gate.weight", TensorSpec((experts, d), Role.PLAIN)
    if hashed:
        yield "ffn.gate.tid2eid", TensorSpec((c.vocab_size, c.experts_per_token), Role.TABLE)
    else:
        yield "ffn.gate.bias", TensorSpec((experts,), Role.PRECISE)
    if c.generation is Generation.V41:
        yield "ffn.gate.bias_vl", TensorSpec((experts,), Role.PRECISE)
    shapes = {"w1": (inner, d), "w2": (d, inner), "w3": (inner, d)}
    for name, shape in shapes.items():
        yield f"ffn.shared_experts.{name}.weight", TensorSpec(shape, Role.LINEAR)
    specs = {name: TensorSpec(shape, Role.EXPERT) for name, shape in shapes.items()}
    for e in range(experts):
        for name, spec in specs.items():
            yield f"ffn.experts.{e}.{name}.weight", spec


def _engram(c: ModelConfig, e: EngramTables, rows: int) -> _Specs:
    d, n = c.hidden_size, c.hc_mult
    yield "engram.embed.weight", TensorSpec((rows, e.width), Role.ROWS)
    columns = (e.max_ngram - 1) * e.heads * e.width
    yield "engram.wkv.weight", TensorSpec(((n + 1) * d, columns), Role.LINEAR)
    for name in ("q_weight", "k_weight"):
        yield f"engram.{name}", TensorSpec((n, d), Role.PLAIN)


def _mtp_block(c: ModelConfig) -> _Specs:
    d = c.hidden_size
    yield from _norms_and_mixes(c)
    yield from _attention(c)
    yield from _experts(c, c.n_routed_experts)
    for name in ("e_proj", "h_proj"):
        yield f"{name}.weight", TensorSpec((d, d), Role.LINEAR)
    for name in ("enorm", "hnorm"):
        yield f"{name}.weight", TensorSpec((d,), Role.PLAIN)
    yield from _head(c)


def _head(c: ModelConfig) -> _Specs:
    yield from _norm(c)
    yield "hc_head_fn", TensorSpec((c.hc_mult, c.hc_mult * c.hidden_size), Role.PRECISE)
    yield "hc_head_base", TensorSpec((c.hc_mult,), Role.PRECISE)
    yield "hc_head_scale", TensorSpec((1,), Role.PRECISE)


def _norm(c: ModelConfig) -> _Specs:
    yield "norm.weight", TensorSpec((c.hidden_size,), Role.PLAIN)


def _draft_layer(c: ModelConfig, i: int) -> _Specs:
    """DSpark: the first layer takes the taps of the target in, the last one has the heads."""
    drafter, d = c.drafter, c.hidden_size
    assert drafter is not None, "a V4.1 model with draft layers describes them"
    if i == 0:
        yield "main_proj.weight", TensorSpec((d, len(drafter.targets) * d), Role.LINEAR)
        yield "main_norm.weight", TensorSpec((d,), Role.PLAIN)
    yield from _norms_and_mixes(c)
    yield from _attention(c)
    yield from _experts(c, drafter.experts)
    if i == c.n_mtp_layers - 1:
        yield from _draft_heads(c, drafter)


def _draft_heads(c: ModelConfig, drafter: Drafter) -> _Specs:
    yield from _norm(c)
    for name in ("embed", "head"):
        yield f"markov_head.{name}.weight", TensorSpec((c.vocab_size, drafter.markov_rank), Role.PLAIN)
    both = c.hidden_size + drafter.markov_rank
    yield "confidence_head.proj.weight", TensorSpec((1, both), Role.PLAIN)


def _vision(v: VisionTower, d: int) -> _Specs:
    """The image encoder, the aligner to the `d` channels of the text, and the rows around an image."""
    for name, shape in _vision_shapes(v, d):
        yield name, TensorSpec(shape, Role.PLAIN)


_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _vision_shapes(v: VisionTower, d: int) -> _Shapes:
    w = v.width
    for name in ("start", "newline", "end"):
        yield f"image_{name}", (d,)
    yield from _biased("vision.patch_embed.proj", w, 3 * v.patch**2)
    for i in range(v.layers):
        block = f"vision.blocks.{i}"
        yield f"{block}.norm1.weight", (w,)
        yield from _biased(f"{block}.attn.wqkv", 3 * w, w)
        yield from _biased(f"{block}.attn.wo", w, w)
        yield f"{block}.norm2.weight", (w,)
        yield f"{block}.mlp.w1.weight", (2 * v.inner, w)
        yield f"{block}.mlp.w2.weight", (w, v.inner)
    yield "vision.norm.weight", (w,)
    yield from _biased("aligner.w1", d, v.downsample**2 * w)
    yield from _biased("aligner.w2", d, d)


def _biased(name: str, rows: int, columns: int) -> _Shapes:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


# ---------------------------------------------------------------------- the published format


def published_dtype(name: str, spec: TensorSpec, config: ModelConfig) -> DType:
    """The element type a released checkpoint stores `name` in; without `expert_dtype` experts are FP8."""
    if spec.role is Role.EXPERT:
        packed = config.expert_dtype == "fp4" and spec.allows(DType.F4E2M1X2)
        return DType.F4E2M1X2 if packed else DType.F8E4M3
    return {
        Role.PLAIN: DType.BF16, Role.PRECISE: DType.F32, Role.LINEAR: DType.F8E4M3, Role.TABLE: DType.I64,
        Role.ROWS: DType.F8E4M3,
    }[spec.role]  # fmt: skip


def ledger(config: ModelConfig) -> tuple[int, int]:
    """(tensors, bytes of their data) of the released checkpoint of this configuration."""
    count = size = 0
    for name, spec in expected_tensors(config).items():
        dtype = published_dtype(name, spec, config)
        count, size = count + 1, size + prod(spec.stored_shape(dtype)) * dtype.itemsize
        if dtype in SCALED:
            count, size = count + 1, size + prod(spec.scale_shape(dtype, config.weight_block_size))
    return count, size
