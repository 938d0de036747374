"""The pass table. One literal; `tests/test_passes.py` keeps it honest against the files."""

from __future__ import annotations

from .allow_replay import AllowReplay
from .base import Pass
from .bind_shapes import BindShapes
from .cleanup import EliminateDeadCode, MergeCommonSubexpressions
from .fold_shared_expert import FoldSharedExpert
from .fold_weights import FoldConstants, FoldNormScale
from .fuse_elementwise import FuseIndexSelect, FuseSwiglu
from .fuse_expert_gemms import FuseExpertGemms
from .fuse_hyper import FuseHyper
from .fuse_rotary import FuseNormRotary, FuseRotaryWrite
from .instrument import InstrumentExperts, InstrumentInputs
from .layout_engram import LayoutEngram
from .merge_projections import MergeProjections
from .narrow_weights import NarrowWeights
from .plan_memory import PlanMemory
from .prune_experts import PruneExperts
from .quantise_activations import QuantiseActivations
from .reference_rounding import ApplyReferenceRounding
from .requantise import Requantise
from .spread_layers import SpreadLayers

PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (
        EliminateDeadCode,
        MergeCommonSubexpressions,
        FuseSwiglu,
        FuseIndexSelect,
        FuseExpertGemms,
        FoldSharedExpert,
        MergeProjections,
        FuseNormRotary,
        FuseRotaryWrite,
        FuseHyper,
        FoldNormScale,
        FoldConstants,
        InstrumentExperts,
        InstrumentInputs,
        LayoutEngram,
        AllowReplay,
        NarrowWeights,
        PlanMemory,
        BindShapes,
        SpreadLayers,
        PruneExperts,
        ApplyReferenceRounding,
        Requantise,
        QuantiseActivations,
    )
}
