"""Maps the tensor names found in the wild onto the published ones.

Owns three spellings of V4: published (`layers.0.attn.wq_a.weight`), transformers' modules
(`model.layers.0.self_attn.q_a_proj.weight`, experts stacked) and the mixture its `save_pretrained` writes
(`model.layers.0.attn.norm.weight`, `head.weight`). V4.1 has the published names, and those which its
conversion script renames to them. Knows names only. Source: model specifications, section 2.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product

from dsv4c.errors import CheckpointError

from .architecture import Generation


class Half(enum.Enum):
    """Which rows of each matrix of a stack: all, or one half of `gate_up_proj`."""

    ALL = 0
    FIRST = 1
    SECOND = 2


@dataclass(frozen=True)
class Origin:
    """Where a published tensor lies: in the stored tensor `name`, whole or as one part of a stack.

    Attributes:
        stacked: the stored tensor has a leading axis of experts.
    """

    name: str
    stacked: bool = False
    half: Half = Half.ALL


# In all tables the last spelling is that of transformers' modules; `#` stands for a number.

_CONTAINERS: dict[str, tuple[str, ...]] = {
    "attn": ("attn", "self_attn"),
    "attn.compressor": ("attn.compressor", "self_attn.compressor"),
    "attn.indexer": (
        "attn.indexer", "self_attn.indexer", "attn.compressor.indexer", "self_attn.compressor.indexer",
    ),
    "attn.indexer.compressor": (
        "attn.indexer.compressor", "self_attn.indexer.compressor",
        "attn.compressor.indexer", "self_attn.compressor.indexer",
    ),
    "ffn": ("ffn", "mlp"),
    "ffn.gate": ("ffn.gate", "mlp.gate"),
    "ffn.experts.#": ("ffn.experts.#", "mlp.experts.#"),
    "ffn.shared_experts": ("ffn.shared_experts", "mlp.shared_experts"),
}  # fmt: skip
"""Module of a block -> its spellings."""

_HC = ("fn", "base", "scale")
_Table = dict[str, tuple[str, ...]]
_MLP: _Table = {"w1": ("w1", "gate_proj"), "w2": ("w2", "down_proj"), "w3": ("w3", "up_proj")}
_COMPRESSOR: _Table = {
    "wkv": ("wkv", "kv_proj"),
    "wgate": ("wgate", "gate_proj"),
    "norm": ("norm", "kv_norm"),
}

_MODULES: dict[str, _Table] = {
    "": {
        "attn_norm": ("attn_norm", "input_layernorm"),
        "ffn_norm": ("ffn_norm", "post_attention_layernorm"),
        "e_proj": ("e_proj",), "h_proj": ("h_proj",), "enorm": ("enorm",), "hnorm": ("hnorm",),
        "norm": ("norm",),
    },
    "attn": {
        "wq_a": ("wq_a", "q_a_proj"), "q_norm": ("q_norm", "q_a_norm"), "wq_b": ("wq_b", "q_b_proj"),
        "wkv": ("wkv", "kv_proj"), "kv_norm": ("norm", "kv_norm"),
        "wo_a": ("wo_a", "o_a_proj"), "wo_b": ("wo_b", "o_b_proj"),
    },
    "attn.compressor": _COMPRESSOR,
    "attn.indexer": {
        "wq_b": ("wq_b", "q_b_proj"), "weights_proj": ("weights_proj", "scorer.weights_proj"),
    },
    "attn.indexer.compressor": _COMPRESSOR,
    "ffn": {"gate": ("gate",)},
    "ffn.experts.#": _MLP,
    "ffn.shared_experts": _MLP,
}  # fmt: skip
"""Container -> modules that own a `.weight` and perhaps a `.scale`."""

_SUFFIXES: _Table = {"weight": ("weight",), "scale": ("scale", "weight_scale_inv")}

_LEAVES: dict[str, _Table] = {
    "": {
        **{f"hc_{part}_{p}": (f"hc_{part}_{p}", f"{part}_hc.{p}") for part in ("attn", "ffn") for p in _HC},
        **{f"hc_head_{p}": (f"hc_head_{p}", f"hc_head.hc_{p}") for p in _HC},
    },
    "attn": {"attn_sink": ("attn_sink", "sinks")},
    "attn.compressor": {"ape": ("ape", "position_bias")},
    "attn.indexer.compressor": {"ape": ("ape", "position_bias")},
    "ffn.gate": {"bias": ("bias", "e_score_correction_bias"), "tid2eid": ("tid2eid",)},
}  # fmt: skip
"""Container -> parameters without a suffix."""

_TOP: _Table = {
    "embed.weight": ("embed.weight", "embed_tokens.weight"),
    "head.weight": ("head.weight", "lm_head.weight"),
    "norm.weight": ("norm.weight",),
    **{f"hc_head_{p}": (f"hc_head_{p}", f"hc_head.hc_{p}") for p in _HC},
}

_STACKS: dict[str, tuple[tuple[str, Half], ...]] = {
    "gate_up_proj": (("w1", Half.FIRST), ("w3", Half.SECOND)),
    "down_proj": (("w2", Half.ALL),),
}
"""Stacked module -> the expert matrices in it."""

_IGNORED = frozenset({
    "mtp.#.embed.weight", "mtp.#.embed_tokens.weight", "mtp.#.emb.tok_emb.weight", "mtp.#.head.weight",
    "mtp.#.lm_head.weight", "mtp.#.shared_head.head.weight",
})  # fmt: skip
"""Copies of embedding and head that an MTP block may carry; the backbone's are used."""


@cache
def _aliases() -> dict[str, str]:
    """Every known spelling, numbers as `#` -> the published one."""
    out = {alias: name for name, names in _TOP.items() for alias in names}

    def add(container: str, table: _Table, suffixes: _Table) -> None:
        for name, suffix in product(table, suffixes):
            published = ".".join(filter(None, (container, name, suffix)))
            spelt = product(_CONTAINERS.get(container, (container,)), table[name], suffixes[suffix])
            for block, parts in product(("layers.#", "mtp.#"), spelt):
                out[".".join((block, *filter(None, parts)))] = f"{block}.{published}"

    for container, table in _MODULES.items():
        add(container, table, _SUFFIXES)
    for container, table in _LEAVES.items():
        add(container, table, {"": ("",)})
    return out


@cache
def _stacks() -> dict[str, tuple[tuple[str, Half], ...]]:
    """Every spelling of a stacked tensor -> the published tensors in it, the expert still as `*`."""
    endings = {"": "weight", ".weight": "weight", ".scale": "scale", "_scale_inv": "scale"}
    out = {}
    for block, ffn, (stack, parts), (ending, suffix) in product(
        ("layers.#", "mtp.#"), _CONTAINERS["ffn"], _STACKS.items(), endings.items()
    ):
        out[f"{block}.{ffn}.experts.{stack}{ending}"] = tuple(
            (f"{block}.ffn.experts.*.{name}.{suffix}", half) for name, half in parts
        )
    return out


_V41_BLOCK = (
    "main_proj.weight", "main_proj.scale", "main_norm.weight", "markov_head.embed.weight",
    "markov_head.head.weight", "confidence_head.proj.weight", "attn.indexer.wk.weight",
    "attn.indexer.k_norm.weight", "ffn.gate.bias_vl", "engram.embed.weight", "engram.embed.scale",
    "engram.wkv.weight", "engram.wkv.scale", "engram.q_weight", "engram.k_weight",
)  # fmt: skip
_V41_VISION = (
    "norm1.weight", "norm2.weight", "attn.wqkv.weight", "attn.wqkv.bias", "attn.wo.weight", "attn.wo.bias",
    "mlp.w1.weight", "mlp.w2.weight",
)  # fmt: skip
_V41_TOP = (
    "image_start", "image_newline", "image_end", "vision.patch_embed.proj.weight",
    "vision.patch_embed.proj.bias", "vision.norm.weight", "aligner.w1.weight", "aligner.w1.bias",
    "aligner.w2.weight", "aligner.w2.bias",
)  # fmt: skip
"""What V4.1 has beyond the names of V4: in a block, in a block of the image encoder, and beside them."""

_V41_PARTS = {
    "self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale", "e_score_correction_bias": "bias",
}  # fmt: skip
"""Part of a name -> the published one, in V4.1 outside of the image encoder."""


@cache
def _v41_names() -> frozenset[str]:
    """Every published name of V4.1, numbers as `#`, and those of V4, which its table then has no use for."""
    blocks = {f"{block}.{name}" for block, name in product(("layers.#", "mtp.#"), _V41_BLOCK)}
    return frozenset(
        {*_aliases().values(), *blocks, *_V41_TOP, *(f"vision.blocks.#.{name}" for name in _V41_VISION)}
    )


def resolve(
    names: Iterable[str], experts: int, generation: Generation = Generation.V4
) -> tuple[dict[str, Origin], list[str]]:
    """Published name -> where it lies, and the stored names that mean nothing to this compiler.

    `experts` is the number of published names one stacked tensor stands for.

    Raises:
        CheckpointError: two stored tensors claim one published name.
    """
    found: dict[str, Origin] = {}
    unknown: list[str] = []
    for stored in names:
        pattern, numbers = _split(stored.removeprefix("model."))
        if pattern in _IGNORED:
            continue
        meant = _meant_v41(pattern) if generation is Generation.V41 else _aliases().get(pattern)
        if meant is not None:
            _put(found, _fill(meant, numbers), Origin(stored))
        elif generation is Generation.V4 and pattern in _stacks():
            for template, half in _stacks()[pattern]:
                whole = _fill(template, numbers)
                for e in range(experts):
                    _put(found, whole.replace("*", str(e)), Origin(stored, True, half))
        else:
            unknown.append(stored)
    return found, unknown


def _meant_v41(pattern: str) -> str | None:
    parts = pattern.split(".")
    if parts[0] != "vision":
        parts = [_V41_PARTS.get(part, part) for part in parts]
    name = ".".join(parts)
    return name if name in _v41_names() else None


def _put(found: dict[str, Origin], name: str, origin: Origin) -> None:
    if name in found:
        raise CheckpointError(
            f"tensors {found[name].name!r} and {origin.name!r} both are {name!r}",
            allowed="one naming per tensor",
        )
    found[name] = origin


def _split(name: str) -> tuple[str, list[str]]:
    """`layers.3.x` -> (`layers.#.x`, [`3`]); numbers with leading zeros stay as they are."""
    parts, numbers = name.split("."), []
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit() and str(int(part)) == part:
            numbers.append(part)
            parts[i] = "#"
    return ".".join(parts), numbers


def _fill(template: str, numbers: list[str]) -> str:
    for number in numbers:
        template = template.replace("#", number, 1)
    return template


def transformers_name(published: str) -> str:
    """The module name of transformers for a published tensor of V4; a single expert keeps its number.

    Raises:
        KeyError: the name is not a published one.
    """
    pattern, numbers = _split(published)
    name = _fill(_module_names()[pattern], numbers)
    return name if name == "lm_head.weight" else f"model.{name}"


@cache
def _module_names() -> dict[str, str]:
    return {name: alias for alias, name in _aliases().items()}  # the last spelling of each stays


_SAVED = {
    "head.weight": "head.weight",
    "embed.weight": "model.embed_tokens.weight",
    **{f"hc_head_{p}": f"model.hc_head.hc_{p}" for p in _HC},
    "layers.#.attn.kv_norm.weight": "model.layers.#.attn.norm.weight",
}


def saved_name(published: str) -> str:
    """The name `save_pretrained` of transformers 5.23 writes for a published tensor."""
    pattern, numbers = _split(published)
    return _fill(_SAVED.get(pattern, f"model.{pattern}"), numbers)
