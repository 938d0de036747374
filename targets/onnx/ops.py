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

FUSE = "merge_common_subexpressions,fuse_swiglu,fuse_index_select,fuse_expert_gemms"
"""What every target runs first."""

PIPELINE = FUSE + ',narrow_weights{storage="f32"},bind_shapes{tokens="1,128", batch=1, context=4096}'
"""For consumers of fixed shapes, exact numerics."""
