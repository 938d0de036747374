"""Counts what a model is made of and what it costs to serve: parameters, bytes per token, operations.

Pure arithmetic on a configuration and its table of tensors; every formula stands in a docstring, with sizes
named as in the specifications: D, R head and rotary width, H heads, W window, r_l ratio of layer l. Knows no
files. What real devices make of it is the business of `dsv4c estimate`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from .architecture import Generation, LayerKind, ModelConfig
from .table import TensorSpec

CLASSES: tuple[tuple[str, str], ...] = (
    ("MTP blocks", r"mtp\."),
    ("hash tables", r".*\.tid2eid"),
    ("vision", r"vision\.|aligner\.|image_"),
    ("engram tables", r".*\.engram\.embed\."),
    ("engram", r".*\.engram\."),
    ("routed experts", r".*\.ffn\.experts\."),
    ("shared experts", r".*\.ffn\.shared_experts\."),
    ("routers", r".*\.ffn\.gate\."),
    ("indexers", r".*\.attn\.indexer\."),
    ("compressors", r".*\.attn\.compressor\."),
    ("attention", r".*\.attn\."),
    ("hyper-connections", r"(.*\.)?hc_"),
    ("norms", r"(.*[._])?norm\."),
    ("embedding", r"embed\."),
    ("head", r"head\."),
)
"""Class of parameters -> pattern of the published name; the first that matches counts."""

EXTRA = ("MTP blocks", "hash tables")
"""Not counted as parameters of the model: drafts of further tokens, and tables of expert ids."""

_IDLE = (*EXTRA, "vision")
"""Classes that take no part in a token of text."""

_MATRIX = re.compile(r".*(\.weight|_fn)$")


@dataclass(frozen=True)
class Count:
    """Parameters of one class: all of them, and those that take part in one token of text."""

    total: int
    active: int


def parameters(specs: Mapping[str, TensorSpec], config: ModelConfig) -> dict[str, Count]:
    """Class of `CLASSES`, or "other" -> its parameters; classes that do not occur are left out.

    Active are one row of the embedding, the chosen of the routed experts, one row of each table of each
    Engram layer, nothing of the image encoder and of drafts, and the whole of everything else.
    """
    totals: dict[str, int] = {}
    for name, spec in specs.items():
        kind = class_of(name)
        totals[kind] = totals.get(kind, 0) + prod(spec.shape)
    return {kind: Count(total, _active(kind, total, config)) for kind, total in totals.items()}


def class_of(name: str) -> str:
    """The class of a tensor by its published name."""
    return next((kind for kind, pattern in CLASSES if re.match(pattern, name)), "other")


def _active(kind: str, total: int, c: ModelConfig) -> int:
    if kind in _IDLE:
        return 0
    if kind == "embedding":
        return c.hidden_size
    if kind == "routed experts":
        return total * c.experts_per_token // c.n_routed_experts
    if kind == "engram tables" and c.engram:
        return len(c.engram.layers) * (c.engram.max_ngram - 1) * c.engram.heads * c.engram.width
    return total


# -------------------------------------------------------------------------------------- state


def entry_bytes(c: ModelConfig) -> int:
    """Bytes of one compressed entry as served.

    V4 (section 5): D - R channels in FP8, a scale byte for each 64 of them, padded to a multiple of 8, and
    2 R bytes of rotated BF16; 584. V4.1 (section 7): D / 2 bytes of FP4 and D / 16 scales; 288.
    """
    if c.generation is Generation.V41:
        return _ceil(c.head_dim, 2) + _ceil(c.head_dim, 16)
    plain = c.head_dim - c.rope_dim
    return plain + 2 * c.rope_dim + 8 * _ceil(_ceil(plain, 64), 8)


def index_bytes(c: ModelConfig) -> int:
    """Bytes of one index key as served: FP4 with a scale byte for each 32; 68 for 128 channels."""
    return _ceil(c.index_head_dim, 2) + _ceil(c.index_head_dim, 32)


def window_bytes(c: ModelConfig) -> int:
    """Bytes of one row of a window: V4 as a compressed entry; V4.1 D of FP8 and D / 32 scales, 528."""
    return c.head_dim + _ceil(c.head_dim, 32) if c.generation is Generation.V41 else entry_bytes(c)


def kv_bytes_per_token(c: ModelConfig) -> float:
    """Bytes by which the state of a sequence grows with each token, as served.

    The sum over the layers that store entries: V4 all compressed ones, (entry + index key) / 4 with CSA and
    entry / 128 with HCA; V4.1 the sources of KV only, (entry + index key) / r_l. V4-Flash 3,514, V4-Pro
    5,031, V4.1-Flash 890 = (3/2 + 1) 356. Sources: section 5 of V4, section 7 of V4.1.
    """
    return sum(_entry(c, i) / c.compress_ratios[i] for i in _storing(c))


def _storing(c: ModelConfig) -> tuple[int, ...]:
    if c.shared:
        return c.shared.kv_sources
    return tuple(i for i, r in enumerate(c.compress_ratios) if r)


def _entry(c: ModelConfig, layer: int) -> int:
    return entry_bytes(c) + (0 if c.layer_kinds[layer] is LayerKind.HCA else index_bytes(c))


def state_bytes(c: ModelConfig) -> dict[str, int]:
    """What a sequence takes whatever its length, in bytes; parts that are empty are left out.

    windows: W rows per layer. groups: what an unfinished entry is made of, keys and gates in FP32: with CSA
    2 r rows of 2 D (main) and 2 r rows of twice the index width, with HCA r rows of D; V4.1 r rows of D for
    each source with r > 1. history: the last compressed ids of Engram, int32. drafts: W rows per draft layer.
    """
    window = c.sliding_window * window_bytes(c)
    ids = c.engram.max_ngram - 1 if c.engram else 0
    found = {
        "windows": c.num_hidden_layers * window,
        "groups": sum(_group_bytes(c, i) for i in _storing(c)),
        "history": 4 * ids,
        "drafts": c.n_mtp_layers * window,
    }
    return {name: size for name, size in found.items() if size}


def _group_bytes(c: ModelConfig, layer: int) -> int:
    ratio, both = c.compress_ratios[layer], 2 * 4  # keys and gates, FP32
    if c.layer_kinds[layer] is LayerKind.CSA:
        return both * 2 * ratio * 2 * (c.head_dim + c.index_head_dim)
    return both * ratio * c.head_dim if ratio > 1 else 0


# --------------------------------------------------------------------------------- operations


def flops_per_token(
    specs: Mapping[str, TensorSpec], c: ModelConfig, contexts: Sequence[int]
) -> dict[int, dict[str, int]]:
    """Context -> part -> operations of one decoded token of text that sees so many, itself included.

    A multiplication with its addition counts as two, each number format the same; norms, softmax, Sinkhorn,
    the mixing of streams and drafts are left out.

    projections, experts, head: 2 for every active parameter of a matrix. attention: 4 H D for every visible
    row of every layer, min(W, context) of the window and, of the n = context // r_l compressed ones, all with
    HCA and min(top-k, n) otherwise. index: 2 (D_I + 1) H_I for every entry an indexer scores: n, and in V4.1
    behind the candidate source at most its blocks.
    """
    constant = {"projections": 0, "experts": 0, "head": 0}
    matrices = {n: s for n, s in specs.items() if len(s.shape) == 2 and _MATRIX.match(n)}
    for kind, count in parameters(matrices, c).items():
        if kind not in ("embedding", "engram tables"):
            part = "experts" if kind.endswith(" experts") else "head" if kind == "head" else "projections"
            constant[part] += 2 * count.active
    return {context: {**constant, **_growing_flops(c, context)} for context in contexts}


def _growing_flops(c: ModelConfig, context: int) -> dict[str, int]:
    layers = range(c.num_hidden_layers)
    return {
        "attention": 4 * c.heads * c.head_dim * sum(_visible(c, i, context) for i in layers),
        "index": 2 * (c.index_head_dim + 1) * c.index_n_heads * sum(_scored(c, i, context) for i in layers),
    }


def _visible(c: ModelConfig, layer: int, context: int) -> int:
    entries = _entries(c, layer, context)
    if c.layer_kinds[layer] is not LayerKind.HCA:
        entries = min(entries, c.index_topk)
    return min(c.sliding_window, context) + entries


def _entries(c: ModelConfig, layer: int, context: int) -> int:
    ratio = c.compress_ratios[layer]
    return context // ratio if ratio else 0


def _scored(c: ModelConfig, layer: int, context: int) -> int:
    entries = _entries(c, layer, context)
    if c.shared is None:
        return entries if c.layer_kinds[layer] is LayerKind.CSA else 0
    if layer not in c.shared.index_sources:
        return 0
    source = c.shared.candidate_source
    if source is None or layer <= source:
        return entries
    return min(entries, c.shared.candidate_blocks * c.shared.candidate_size)


def _ceil(count: int, group: int) -> int:
    return -(-count // group)
