"""What tensors a model has: the table of section 2 of the model specification, per configuration.

Owns published names, shapes and which number formats each tensor may come in. Knows no files.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dsv4c.ir.dtypes import DType

from .config import LayerKind, ModelConfig

FP4_GROUP = 32  # columns that share one scale of packed FP4


class Role(enum.Enum):
    """What a tensor is for; decides which stored formats are allowed."""

    PLAIN = "plain"  # embedding, norms, compressor, router: never quantised
    PRECISE = "precise"  # hyper-connections, sinks, biases: published in F32
    LINEAR = "linear"  # published in FP8 with `.scale`
    EXPERT = "expert"  # published in packed FP4 or FP8 with `.scale`
    TABLE = "table"  # hash routing: expert ids of every token


_FLOATS = (DType.F32, DType.BF16, DType.F16)

ALLOWED: dict[Role, tuple[DType, ...]] = {
    Role.PLAIN: _FLOATS,
    Role.PRECISE: _FLOATS,
    Role.LINEAR: (*_FLOATS, DType.F8E4M3),
    Role.EXPERT: (*_FLOATS, DType.F8E4M3, DType.F4E2M1X2),
    Role.TABLE: (DType.I64, DType.I32),
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
        return (-(-rows // block[0]), -(-columns // block[1]))

    def allows(self, dtype: DType) -> bool:
        fits = dtype is not DType.F4E2M1X2 or self.shape[-1] % 2 == 0
        return dtype in ALLOWED[self.role] and fits


def scale_name(weight: str) -> str:
    """`x.weight` -> `x.scale`."""
    return weight.removesuffix(".weight") + ".scale"


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the model without scales, MTP blocks included, in the order of the layers."""
    out = {"embed.weight": TensorSpec((config.vocab_size, config.hidden_size), Role.PLAIN)}
    for i in range(config.num_hidden_layers):
        kind, ratio = config.layer_kinds[i], config.compress_ratios[i]
        out.update({f"layers.{i}.{n}": s for n, s in _block(config, kind, ratio, config.hash_layers[i])})
    for i in range(config.n_mtp_layers):
        out.update({f"mtp.{i}.{n}": s for n, s in _block(config, LayerKind.SLIDING, 0, False)})
        out.update({f"mtp.{i}.{n}": s for n, s in _mtp_extra(config)})
    out.update(_head(config))
    out["head.weight"] = TensorSpec((config.vocab_size, config.hidden_size), Role.PLAIN)
    return out


_Specs = Iterator[tuple[str, TensorSpec]]


def _block(c: ModelConfig, kind: LayerKind, ratio: int, hashed: bool) -> _Specs:
    d, mixes = c.hidden_size, (2 + c.hc_mult) * c.hc_mult
    for part in ("attn", "ffn"):
        yield f"{part}_norm.weight", TensorSpec((d,), Role.PLAIN)
        yield f"hc_{part}_fn", TensorSpec((mixes, c.hc_mult * d), Role.PRECISE)
        yield f"hc_{part}_base", TensorSpec((mixes,), Role.PRECISE)
        yield f"hc_{part}_scale", TensorSpec((3,), Role.PRECISE)
    for name, spec in _attention(c, kind, ratio):
        yield f"attn.{name}", spec
    for name, spec in _experts(c, hashed):
        yield f"ffn.{name}", spec


def _attention(c: ModelConfig, kind: LayerKind, ratio: int) -> _Specs:
    d, width = c.hidden_size, c.heads * c.head_dim
    yield "attn_sink", TensorSpec((c.heads,), Role.PRECISE)
    yield "wq_a.weight", TensorSpec((c.q_lora_rank, d), Role.LINEAR)
    yield "q_norm.weight", TensorSpec((c.q_lora_rank,), Role.PLAIN)
    yield "wq_b.weight", TensorSpec((width, c.q_lora_rank), Role.LINEAR)
    yield "wkv.weight", TensorSpec((c.head_dim, d), Role.LINEAR)
    yield "kv_norm.weight", TensorSpec((c.head_dim,), Role.PLAIN)
    yield "wo_a.weight", TensorSpec((c.o_groups * c.o_lora_rank, width // c.o_groups), Role.LINEAR)
    yield "wo_b.weight", TensorSpec((d, c.o_groups * c.o_lora_rank), Role.LINEAR)
    if kind is LayerKind.SLIDING:
        return
    yield from _compressor(c, "compressor", c.head_dim, ratio, 2 if kind is LayerKind.CSA else 1)
    if kind is LayerKind.CSA:
        heads, dim = c.index_n_heads, c.index_head_dim
        yield "indexer.wq_b.weight", TensorSpec((heads * dim, c.q_lora_rank), Role.LINEAR)
        yield "indexer.weights_proj.weight", TensorSpec((heads, d), Role.PLAIN)
        yield from _compressor(c, "indexer.compressor", dim, ratio, 2)


def _compressor(c: ModelConfig, prefix: str, dim: int, ratio: int, overlap: int) -> _Specs:
    for name in ("wkv", "wgate"):
        yield f"{prefix}.{name}.weight", TensorSpec((overlap * dim, c.hidden_size), Role.PLAIN)
    yield f"{prefix}.ape", TensorSpec((ratio, overlap * dim), Role.PRECISE)
    yield f"{prefix}.norm.weight", TensorSpec((dim,), Role.PLAIN)


def _experts(c: ModelConfig, hashed: bool) -> _Specs:
    d, inner = c.hidden_size, c.moe_intermediate_size
    yield "gate.weight", TensorSpec((c.n_routed_experts, d), Role.PLAIN)
    if hashed:
        yield "gate.tid2eid", TensorSpec((c.vocab_size, c.experts_per_token), Role.TABLE)
    else:
        yield "gate.bias", TensorSpec((c.n_routed_experts,), Role.PRECISE)
    shapes = {"w1": (inner, d), "w2": (d, inner), "w3": (inner, d)}
    for name, shape in shapes.items():
        yield f"shared_experts.{name}.weight", TensorSpec(shape, Role.LINEAR)
    specs = {name: TensorSpec(shape, Role.EXPERT) for name, shape in shapes.items()}
    for e in range(c.n_routed_experts):
        for name, spec in specs.items():
            yield f"experts.{e}.{name}.weight", spec


def _mtp_extra(c: ModelConfig) -> _Specs:
    d = c.hidden_size
    for name in ("e_proj", "h_proj"):
        yield f"{name}.weight", TensorSpec((d, d), Role.LINEAR)
    for name in ("enorm", "hnorm"):
        yield f"{name}.weight", TensorSpec((d,), Role.PLAIN)
    yield from _head(c)


def _head(c: ModelConfig) -> _Specs:
    yield "norm.weight", TensorSpec((c.hidden_size,), Role.PLAIN)
    yield "hc_head_fn", TensorSpec((c.hc_mult, c.hc_mult * c.hidden_size), Role.PRECISE)
    yield "hc_head_base", TensorSpec((c.hc_mult,), Role.PRECISE)
    yield "hc_head_scale", TensorSpec((1,), Role.PRECISE)


# ---------------------------------------------------------------------- the published format


def published_dtype(name: str, spec: TensorSpec, config: ModelConfig) -> DType:
    """The element type a released checkpoint stores `name` in; without `expert_dtype` experts are FP8."""
    if spec.role is Role.EXPERT:
        packed = config.expert_dtype == "fp4" and spec.allows(DType.F4E2M1X2)
        return DType.F4E2M1X2 if packed else DType.F8E4M3
    return {
        Role.PLAIN: DType.BF16, Role.PRECISE: DType.F32, Role.LINEAR: DType.F8E4M3, Role.TABLE: DType.I64,
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
