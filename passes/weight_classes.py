"""Which part of the model a weight belongs to; passes choose formats by it and reports group by it."""

from __future__ import annotations

import re

from dsv4c.ir.graph import Op

CLASSES = {
    "vision": r"^(vision|aligner)\.|^image_",
    "tables": r"\.engram\.embed(\.|$)",
    "experts": r"\.ffn\.experts\.",
    "shared": r"\.ffn\.shared_experts\.",
    "router": r"\.ffn\.gate(\.|$)",
    "compressor": r"\.attn\.(indexer\.)?compressor\.",
    "indexer": r"\.attn\.indexer\.",
    "engram": r"\.engram\.kv(\.|$)",
    "norms": r"(^|[._])norm(\.|$)|_norm(\.|$)",
    "attention": r"\.attn(\.|$)",
    "hyper": r"(^|\.)hc_",
    "embedding": r"^embed(\.|$)",
    "head": r"^head(\.|$)",
}  # fmt: skip
"""Class -> the locations of its weights; the first that matches counts."""


def weight_class(op: Op) -> str:
    """The class of a `weight` op by its location, a key of `CLASSES`, or "other" (rotary frequencies)."""
    return class_of(op.loc)


def class_of(loc: str) -> str:
    """The class of a location such as `layers.3.ffn.experts.0.w1`."""
    return next((name for name, pattern in CLASSES.items() if re.search(pattern, loc)), "other")
