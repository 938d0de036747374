"""What reaches the emitter of launch plans, and by which passes; imports no toolchain."""

from __future__ import annotations

from dsv4c.targets.base import Emitter, Format
from dsv4c.targets.onnx.ops import BF16, FUSE, INT8_WEIGHTS

PLAN_PIPELINE = (
    FUSE + ',fuse_norm_rotary,fuse_rotary_write,narrow_weights{storage="packed"},fold_shared_expert'
    ",merge_projections,spread_layers{devices=1, batch=1, context=8192},plan_memory{tokens=256, batch=1}"
)
"""From MODEL to TARGET: weights stay codes and scales, which kernels decode in registers."""

PLAN_OPS = frozenset({
    "weight", "embed", "repeat_streams", "linear", "grouped_linear", "rms_norm", "unit_norm", "split_heads",
    "merge_heads", "split_columns", "add", "scale", "clamp", "swiglu", "clamped_swiglu", "gather_rows",
    "positions", "entry_positions", "advance", "ring_write", "rope_angles", "rotary", "norm_rotary",
    "position_bias", "entries_close", "index_select", "attention", "hc_mix", "hc_collapse", "hc_expand",
    "hc_head_mix", "sqrt_softplus", "route_topk", "route_hash", "route_weights", "add_route", "expert_mlp",
    "round_values", "compress_tokens", "ngram_rows", "ngram_history", "engram_rows", "engram_gate",
    "stream_norm", "short_conv", "compress", "entries_append", "index_candidates", "merge_images",
    "add_bias", "gelu", "grid_angles", "gather_cells", "image_span", "full_attention",
})  # fmt: skip
"""Every op that `emit_plan` takes."""

_CODES = (
    'default,before(merge_projections, quantise_activations{{rule="{}"}})'
    ',before(merge_projections, quantise_activations{{rule="bf16"}})'
)

PLAN_NUMERICS = {
    "bf16": BF16, "fp8": _CODES.format("e4m3"), "int8": INT8_WEIGHTS + "," + _CODES.format("w8a8"),
    "exact": "",
}  # fmt: skip
"""What matrices are multiplied by: BF16 rows; E4M3 rows in blocks of 128 where weights are stored in FP8 or
FP4, as the published code has it, and BF16 rows elsewhere; INT8 rows, of INT8 weights; and FP32 rows, by
three products for one."""

PLAN_ROUNDINGS = frozenset({"none", "bf16", "bf16_rows", "e4m3", "e4m3_rows", "int8", "int8_token"})
"""How they may round; see `Format.roundings`."""


_TABLES = "leave out layout_engram: a plan holds tables in device memory; --target cpu reads them from disk"

PLAN_HINTS = {"engram_prefetch": _TABLES, "engram_fetch": _TABLES}
"""What to do about ops that have no kernel here, and will have none."""


def _load() -> Emitter:
    from .emit import emit_plan

    return emit_plan


PLAN = Format(
    "plan", PLAN_PIPELINE, {"triton": "triton"}, _load, PLAN_OPS, roundings=PLAN_ROUNDINGS,
    numerics=PLAN_NUMERICS, emits_parts=True, hints=PLAN_HINTS,
)  # fmt: skip
"""The format of both vendors: machine code and a launch plan."""
