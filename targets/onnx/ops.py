"""What reaches an ONNX emitter, and by which passes: shared by the targets that have one."""

from __future__ import annotations

OPS = frozenset({
    "weight", "embed", "repeat_streams", "linear", "grouped_linear", "rms_norm", "unit_norm",
    "split_heads", "add", "scale", "gather_rows", "clamped_swiglu", "positions", "entry_positions",
    "advance", "ring_write", "entries_append", "rope_angles", "rotary", "position_bias", "compress",
    "index_select", "attention", "hc_mix", "hc_collapse", "hc_expand", "hc_head_mix", "sqrt_softplus",
    "route_topk", "route_hash", "route_weights", "expert_mlp",
})  # fmt: skip
"""Experts are grouped and index scores are never kept."""

INT8 = frozenset({"round_values"})
"""What INT8 numerics bring with them."""

FUSE = "merge_common_subexpressions,fuse_swiglu,fuse_index_select,fuse_expert_gemms"
"""What every target runs first."""

PIPELINE = (
    FUSE + ',narrow_weights{storage="int8"}'
    ',bind_shapes{tokens="1,128", batch=1, context=4096, stages=1}'
)
"""For consumers of fixed shapes: numbers, but for what a pass has made INT8."""

INT8_WEIGHTS = (
    'requantise{experts="int8", shared="int8", linears="int8", compressor="int8", embedding="", head="int8"}'
)
"""In front of it, for INT8 numerics: matrices with a scale per row."""
