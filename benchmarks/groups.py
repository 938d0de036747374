"""What is compared with what: number formats of weights, and the programs that hold the model in them.

One literal table. Everything the run compiles, starts, judges and draws is read from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CLASSES = ("experts", "shared", "linears", "compressor", "embedding", "head")


def everywhere(scheme: str) -> str:
    """The pipeline that stores every matrix in one scheme; the router and vectors stay as they are."""
    chosen = ", ".join(f'{kind}="{scheme}"' for kind in CLASSES)
    return f"before(fuse_swiglu, requantise{{{chosen}, samples=0}})"


PUBLISHED = 'before(fuse_swiglu, requantise{experts="mxfp4", shared="fp8", linears="fp8", samples=0})'
"""As the released models are stored: FP4 routed experts, FP8 linear maps, the rest in BF16."""

PIPELINES = {
    "f32": 'with(narrow_weights{storage="f32"})',
    "bf16": "",
    "int8": everywhere("int8"),
    "published": PUBLISHED,
    "int4": everywhere("int4"),
}
"""Storage -> `--passes` of `dsv4c compile` that makes it of the BF16 checkpoint."""

PAIRS = (
    ("f32", "exact"),
    ("bf16", "exact"),
    ("bf16", "bf16"),
    ("int8", "int8"),
    ("published", "exact"),
    ("published", "bf16"),
    ("published", "int8"),
    ("int4", "int8"),
)
"""(storage, numerics) of the artifacts; those whose numerics the target does not offer are left out."""


@dataclass(frozen=True)
class Group:
    """Programs that hold the weights in formats of about the same size.

    Attributes:
        name: as tables and charts call it.
        storages: keys of `PIPELINES`.
        gguf: the kind of file for llama.cpp, see `to_gguf`.
        transformers: pairs of dtype and implementation of the experts.
        error: largest root mean square difference of a program's logits from float32, over the root mean
            square of the logits: beyond it the file is another model, and nothing is compared. Wide, because
            the weights are random: a route that falls the other way changes everything behind it, and what
            has nothing to do with the model is off by 1.4.
    """

    name: str
    storages: tuple[str, ...]
    gguf: str
    transformers: tuple[str, ...]
    error: float


GROUPS = (
    Group("F32", ("f32",), "F32", ("float32:eager", "float32:grouped_mm"), 0.02),
    Group("BF16", ("bf16",), "BF16", ("bfloat16:eager", "bfloat16:grouped_mm"), 0.6),
    Group("8 bits", ("int8",), "Q8_0", (), 0.8),
    Group("FP4 and FP8", ("published",), "MXFP4", (), 1.1),
    Group("4 bits", ("int4",), "Q4_0", (), 1.2),
)


def pairs_of(group: Group, offered: Sequence[str]) -> list[tuple[str, str]]:
    """(storage, numerics) of a group's artifacts, for a target that offers these numerics."""
    return [(s, n) for s, n in PAIRS if s in group.storages and n in offered]


def chosen(names: str) -> tuple[Group, ...]:
    """The groups of a comma-separated list; all of an empty one.

    Raises:
        SystemExit: a name is unknown.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {g.name: g for g in GROUPS}
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"unknown groups {unknown}; there are: {', '.join(known)}")
    return tuple(g for g in GROUPS if g.name in wanted or not wanted)
