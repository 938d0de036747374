"""The lowering of every op this dialect has: one literal table."""

from __future__ import annotations

from . import attention, core, engram, hyper, moe, state, vision
from .lowering import Lowering

LOWERINGS: dict[str, Lowering] = {
    "embed": core.embed,
    "repeat_streams": core.repeat_streams,
    "linear": core.linear,
    "grouped_linear": core.grouped_linear,
    "rms_norm": core.rms_norm,
    "unit_norm": core.unit_norm,
    "split_heads": core.split_heads,
    "merge_heads": core.merge_heads,
    "add_bias": core.add_bias,
    "add": core.add,
    "scale": core.scale,
    "gather_rows": core.gather_rows,
    "clamped_swiglu": core.clamped_swiglu,
    "swiglu": core.swiglu,
    "positions": state.positions,
    "entry_positions": state.entry_positions,
    "advance": state.advance,
    "ring_write": state.ring_write,
    "entries_append": state.entries_append,
    "rope_angles": attention.rope_angles,
    "rotary": attention.rotary,
    "position_bias": attention.position_bias,
    "compress": attention.compress,
    "index_select": attention.index_select,
    "index_candidates": attention.index_candidates,
    "attention": attention.attention,
    "hc_mix": hyper.hc_mix,
    "hc_collapse": hyper.hc_collapse,
    "hc_expand": hyper.hc_expand,
    "hc_head_mix": hyper.hc_head_mix,
    "sqrt_softplus": moe.sqrt_softplus,
    "route_topk": moe.route_topk,
    "route_hash": moe.route_hash,
    "route_weights": moe.route_weights,
    "expert_mlp": moe.expert_mlp,
    "engram_gate": engram.engram_gate,
    "merge_images": vision.merge_images,
    "grid_angles": vision.grid_angles,
    "full_attention": vision.full_attention,
    "gelu": vision.gelu,
    "gather_cells": vision.gather_cells,
    "image_span": vision.image_span,
}
"""Op name -> lowering. `weight` is not here: weights are stored by the emitter."""
