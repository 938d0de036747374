"""What reaches an ONNX emitter, and by which passes: shared by the targets that have one."""

from __future__ import annotations

OPS = frozenset({
    "weight", "embed", "repeat_streams", "linear", "grouped_linear", "rms_norm", "unit_norm",
    "split_heads", "add", "scale", "gather_rows", "clamped_swiglu", "positions", "entry_positions",
    "advance", "ring_write", "entries_append", "rope_angles", "rotary", "position_bias", "compress",
    "index_select", "attention", "hc_mix", "hc_collapse", "hc_expand", "hc_head_mix", "sqrt_softplus",
    "route_topk", "route_hash", "route_weights", "expert_mlp", "index_candidates", "merge_images",
    "engram_gate", "compress_tokens", "ngram_rows", "ngram_history", "engram_rows",
})  # fmt: skip
"""Experts are grouped and index scores are never kept. The last four are those of the host."""

HOST_OPS = frozenset({"compress_tokens", "ngram_rows", "ngram_history", "engram_rows"})
"""What the host computes in front of a program, see `host`."""

VISION = frozenset({
    "merge_heads", "add_bias", "swiglu", "grid_angles", "full_attention", "gelu", "gather_cells",
    "image_span",
})  # fmt: skip
"""What an image encoder is made of besides, of any size only."""

ROUNDED = frozenset({"round_values"})
"""What numerics with rounding points bring with them."""

ROUNDINGS = frozenset({"none", "bf16", "fp16", "e4m3", "int8", "mxfp8"})
"""How those may round, as far as a dialect has the types."""

FUSE = "merge_common_subexpressions,fuse_swiglu,fuse_index_select,fuse_expert_gemms"
"""What every target runs first."""

PIPELINE = (
    FUSE + ',narrow_weights{storage="int8"},bind_shapes{tokens="1,128", batch=1, context=4096, stages=1}'
)
"""For consumers of fixed shapes: numbers, but for what a pass has made INT8."""

INT8_WEIGHTS = (
    'requantise{experts="int8", shared="int8", linears="int8", compressor="int8", embedding="", head="int8"}'
)
"""In front of it, for INT8 numerics: matrices with a scale per row."""

MX = (
    'requantise{experts="mxfp4", shared="mxfp8", linears="mxfp8", compressor="", embedding="", head="",'
    ' plain_only=true},quantise_activations{rule="mxfp8"},default,with(narrow_weights{storage="fp8"})'
)
"""Numerics of the released checkpoints: FP8 and FP4 codes stay what they are, matrices that are numbers
become MXFP8 and MXFP4, and inputs are rounded to MXFP8. Compressors and the head, which are released in BF16,
stay numbers."""

FP8_BF16 = (
    'requantise{experts="mxfp4", shared="fp8", linears="fp8", compressor="", embedding="", head="",'
    ' plain_only=true},quantise_activations{rule="bf16_fp8"},default,with(narrow_weights{storage="fp8"})'
)
"""The released codes with inputs and results of FP8 matrices in BF16: products of BF16 numbers by decoded
ones. Matrices that are numbers become FP8 in blocks of 128 x 128, and MXFP4."""

FNUZ = (
    'requantise{experts="mxfp4", shared="", linears="", compressor="", embedding="", head="",'
    " plain_only=true},"
    'requantise{experts="", shared="fp8_fnuz", linears="fp8_fnuz", compressor="", embedding="", head=""},'
    'default,with(narrow_weights{storage="fp8"})'
)
"""The released numbers in the FNUZ kind of E4M3: the same bits stand for half, so scales are doubled, and
nothing is rounded. Experts stay FP4; products are FP32."""

HALF = (
    'requantise{experts="fp16", shared="fp16", linears="fp16", compressor="fp16", embedding="", head="fp16"}'
    ',quantise_activations{rule="fp16"},default,with(narrow_weights{storage="fp16"})'
)
"""Matrices in FP16, and FP16 products of them."""

BF16 = 'default,before(merge_projections, quantise_activations{rule="bf16"})'
"""Numerics, for formats that join projections: what matrices are multiplied by is rounded to BF16."""

INT8 = (
    'default,before(merge_projections, quantise_activations{rule="int8"}),'
    'before(merge_projections, quantise_activations{rule="bf16"})'
)
"""The same, to INT8 in blocks of 32 where a matrix is stored as integers or FP4, to BF16 elsewhere."""
