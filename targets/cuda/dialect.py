"""ONNX as the CUDA provider of ONNX Runtime takes it, and its own nodes with their meaning.

The table of nodes is read from `nodes.json`. Nodes of `com.microsoft` are used where they do the whole of an
op; `README.md` says which do not, and why. Where the provider has a kernel it ignores the body, which is what
runs anywhere else.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dsv4c.targets.onnx.dialect import Dialect, VendorNode, load_nodes

OPSET = 23
"""The first with `RMSNormalization` and `RotaryEmbedding`, and the last whose kernels were looked up."""

RMS_NORM = VendorNode("", "RMSNormalization", ("X", "scale"), ("Y",), {"epsilon": ""}, "")
"""Y = scale X / sqrt(mean(X^2) + epsilon) over the last axis, in FP32; a node of ONNX itself."""

ROTARY = VendorNode(
    "", "RotaryEmbedding", ("X", "cos_cache", "sin_cache"), ("Y",), {"interleaved": "", "num_heads": ""}, ""
)
"""X, Y [B,N,H R], cos_cache and sin_cache [B,N,R/2]; interleaved = 1 pairs neighbours. Of ONNX too."""

COLLAPSE = VendorNode(
    "com.microsoft", "HyperConnectionPreMix", ("streams", "pre_mix"), ("output",), {},
    """  last = Constant <value_ints = [-1]> ()
  weights = Unsqueeze(pre_mix, last)
  each = Mul(streams, weights)
  branches = Constant <value_ints = [-2]> ()
  output = ReduceSum <keepdims = 0> (each, branches)""",
)  # fmt: skip
"""streams [B,T,n,d], pre_mix [B,T,n] -> sum_j pre_mix_j streams_j [B,T,d]."""

EXPAND = VendorNode(
    "com.microsoft", "HyperConnectionPostMix", ("streams", "block_output", "post_mix", "stream_mix"),
    ("output",), {},
    """  by_target = Transpose <perm = [0, 1, 3, 2]> (stream_mix)
  kept = MatMul(by_target, streams)
  last = Constant <value_ints = [-1]> ()
  gates = Unsqueeze(post_mix, last)
  branches = Constant <value_ints = [-2]> ()
  row = Unsqueeze(block_output, branches)
  added = Mul(gates, row)
  output = Add(added, kept)""",
)  # fmt: skip
"""streams [B,T,n,d], block_output [B,T,d], post_mix [B,T,n], stream_mix [B,T,n,n] ->
post_mix_k block_output + sum_j stream_mix_jk streams_j [B,T,n,d]."""

FP8_MATMUL = VendorNode(
    "com.microsoft", "MatMulBlockQuantizedFp8Weight", ("A", "B", "b_scale"), ("Y",), {"block_size": ""},
    """  a = Cast <to = 1> (A)
  b = Cast <to = 1> (B)
  whole = Shape(b)
  rows = Shape <start = 0, end = 1> (b)
  columns = Shape <start = 1, end = 2> (b_scale)
  one = Constant <value_ints = [1]> ()
  size = Constant <value_int: int = @block_size> ()
  width = Reshape(size, one)
  tiled = Concat <axis = 0> (rows, columns, width)
  tiles = Reshape(b, tiled)
  last = Constant <value_ints = [-1]> ()
  each = Unsqueeze(b_scale, last)
  scaled = Mul(tiles, each)
  matrix = Reshape(scaled, whole)
  turned = Transpose <perm = [1, 0]> (matrix)
  y = MatMul(a, turned)
  Y = CastLike(y, A)""",
)  # fmt: skip
"""A BFLOAT16 [M,K], B FLOAT8E4M3FN [N,K], b_scale FLOAT [N,K/block_size] -> BFLOAT16 [M,N]: the numbers of B
are code times scale, sums are FP32, the result is rounded. Emitted only where blocks fill the rows, and where
scales are powers of two, so that a kernel that decodes to BFLOAT16 first decodes exactly."""

BF16_MATMUL = VendorNode(
    "com.microsoft", "FusedMatMul", ("A", "B"), ("Y",), {"transB": ""},
    """  a = Cast <to = 1> (A)
  b = Cast <to = 1> (B)
  y = Einsum <equation = "...ik,...jk->...ij"> (a, b)
  Y = CastLike(y, A)""",
)  # fmt: skip
"""A BFLOAT16 [...,M,K], B BFLOAT16 [...,N,K] -> A B^T BFLOAT16 [...,M,N]: transB = 1, which the body assumes.
The plain `MatMul` is a node of ONNX, so that a file cannot carry its meaning, and the processor has none for
BFLOAT16."""

VENDOR = {
    "rms_norm": RMS_NORM,
    "rotary_embedding": ROTARY,
    "collapse_streams": COLLAPSE,
    "expand_streams": EXPAND,
    "fp8_matmul": FP8_MATMUL,
    "bf16_matmul": BF16_MATMUL,
}


@cache
def cuda_dialect() -> Dialect:
    """What the provider takes, on every card. Left alone it multiplies FP32 in TF32, a rounding of no op."""
    return Dialect(
        name="cuda",
        opset=OPSET,
        ir_version=11,
        nodes=load_nodes(Path(__file__).with_name("nodes.json")),
        elements=frozenset({"f32", "f16", "bf16", "f8e4m3", "i8", "u8", "i32", "i64", "bool"}),
        vendor=VENDOR,
        provider="CUDAExecutionProvider",
        provider_options={"use_tf32": "0"},
    )
