"""The levels of the pipeline and which ops may exist at each, as tables.

MODEL says what the checkpoint says; FUSED is what passes make of it; TARGET is what a target declares
legal (its own table, given to the verifier by the target).
"""

from __future__ import annotations

import enum


class Level(enum.Enum):
    MODEL = "MODEL"
    FUSED = "FUSED"
    TARGET = "TARGET"


FUSED_ONLY = frozenset({
    "expert_mlp", "expert_statistics", "input_statistics", "index_select", "clamped_swiglu",
    "split_columns", "norm_rotary", "entries_close", "hc_pre", "hc_post_pre", "add_route",
    "engram_prefetch", "engram_fetch", "index_candidates",
})  # fmt: skip
"""Ops that exist only after a pass has made them."""


def allows(level: Level, op: str, target_ops: frozenset[str] | None = None) -> bool:
    """Whether `op` may stand in a graph at `level`."""
    match level:
        case Level.MODEL:
            return op not in FUSED_ONLY
        case Level.FUSED:
            return True
        case Level.TARGET:
            return target_ops is None or op in target_ops
