"""Where the published code rounds, and to what in each generation; knows no graph.

Sources: section 6 of the V4 specification, with 3 and 4 for the precision of what lies between; section 3 of
the V4.1 specification, and section 6 of the Engram specification.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.errors import PassError
from dsv4c.ir.attrs import Attr

Step = tuple[str, dict[str, Attr]]
"""An op behind a value, by name and attributes."""

POINTS: dict[str, str] = {
    "linear_input": "input of FP8 and FP4 linears: E4M3 in blocks of 128; V4.1: of 32",
    "linear_output": "results of linears other than the FP32 ones: BF16",
    "hidden": "SwiGLU times the routing weight, before w2: BF16",
    "experts_sum": "routed plus shared experts: BF16",
    "norm": "RMS norms: BF16",
    "query_norm": "the norm of each head, step by step: BF16; V4.1 has none",
    "rotary": "rotated channels and the rest of their row: BF16",
    "kv": "keys and entries without their rotary channels: E4M3 in blocks of 64; V4.1: keys whole, E4M3 in"
    " blocks of 32, and entries whole, E2M1 in blocks of 16 under a scale in E4M3",
    "entries": "pooled entries before their norm: BF16",
    "index": "index queries and keys: Hadamard, BF16, then E2M1 in blocks of 32; V4.1: without Hadamard",
    "index_weights": "head weights of the indexer: BF16",
    "index_scores": "dot products, weighted products and their sum: BF16",
    "index_order": "V4.1: selected entries in the order of their ids, which blocks of attention follow",
    "probabilities": "softmax of attention before the values: BF16, online in blocks of 64",
    "attention": "result of attention: BF16",
    "streams": "hyper-connections, collapsed and expanded: BF16",
    "route_eps": "no epsilon in the sum of routing scores; V4.1 has one",
    "images": "V4.1: embeddings with the rows of images among them: BF16",
    "engram": "V4.1: streams behind what Engram adds, which is FP32 inside: BF16",
}
"""Every rounding point, by the word that `without` takes."""


@dataclass(frozen=True)
class Codes:
    """Rows through codes with a scale for every block.

    Attributes:
        rotated: whether the channels that a rotary turned go too.
    """

    rule: str
    block: int
    rotated: bool = True


@dataclass(frozen=True)
class Rules:
    """What one generation's code rounds to where generations differ.

    Attributes:
        linear_input: of inputs of FP8 and FP4 linears, and of what enters w2 of an expert.
        keys: of key-values in the window.
        entries: of compressed entries.
        index: behind the rotary of index queries and keys.
        ascending: whether attention meets selected entries by id instead of by score.
        route_eps: whether the sum of routing scores has its epsilon.
    """

    linear_input: Codes
    keys: Codes
    entries: Codes
    index: tuple[Step, ...]
    ascending: bool
    route_eps: bool


_BF16: Step = ("round_values", {"rule": "bf16"})
_E2M1: Step = ("round_values", {"rule": "e2m1", "block": 32})

_RULES = {
    "deepseek_v4": Rules(
        linear_input=Codes("e4m3", 128),
        keys=Codes("e4m3", 64, rotated=False),
        entries=Codes("e4m3", 64, rotated=False),
        index=(("hadamard", {}), _BF16, _E2M1),
        ascending=False,
        route_eps=False,
    ),
    "deepseek_v41": Rules(
        linear_input=Codes("e4m3", 32),
        keys=Codes("e4m3", 32),
        entries=Codes("e2m1_e4m3", 16),
        index=(_E2M1,),
        ascending=True,
        route_eps=True,
    ),
}
"""`meta["generation"]` of a module -> its rules. Attention's running maximum starts at -1e30 in V4.1 and
at -inf before; that changes no number, as a block without keys is passed over."""


def rules_of(generation: object) -> Rules:
    """The rules of what a module calls its generation; V4's where it says nothing.

    Raises:
        PassError: nobody has said how that generation rounds.
    """
    name = "deepseek_v4" if generation is None else str(generation)
    if name not in _RULES:
        where = "apply_reference_rounding"
        raise PassError(f"no rounding points of generation {name!r}", where=where, allowed=", ".join(_RULES))
    return _RULES[name]
