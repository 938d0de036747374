"""The pass table. One literal; `tests/test_passes.py` keeps it honest against the files."""

from __future__ import annotations

from .base import Pass
from .cleanup import EliminateDeadCode, MergeCommonSubexpressions
from .fuse_elementwise import FuseIndexSelect, FuseSwiglu
from .fuse_expert_gemms import FuseExpertGemms
from .narrow_weights import NarrowWeights

PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (
        EliminateDeadCode,
        MergeCommonSubexpressions,
        FuseSwiglu,
        FuseIndexSelect,
        FuseExpertGemms,
        NarrowWeights,
    )
}
