"""ONNX as CANN's converter takes it, and the nodes of domain `npu` with their meaning.

The table of nodes is read from `nodes.json`. A vendor node is used where it does the whole of an op; its body
in standard nodes is what any other consumer of the file runs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dsv4c.targets.onnx.dialect import Dialect, VendorNode, load_nodes

OPSET = 16
"""Within the converter's 11 to 18. At 16 reductions still take their axes as attributes, which every version
of the converter's plugins reads."""

RMS_NORM = VendorNode(
    "npu", "NPURmsNorm", ("x", "gamma"), ("y", "rstd"), {"epsilon": ""},
    """  eps = Constant <value_float: float = @epsilon> ()
  square = Mul(x, x)
  mean = ReduceMean <axes = [-1], keepdims = 1> (square)
  shifted = Add(mean, eps)
  root = Sqrt(shifted)
  rstd = Reciprocal(root)
  unit = Mul(x, rstd)
  y = Mul(unit, gamma)""",
)  # fmt: skip
"""y = gamma x / sqrt(mean(x^2) + epsilon) over the last axis; rstd is the factor."""

ROTARY = VendorNode(
    "npu", "NPURotaryPositionEmbedding", ("x", "cos", "sin"), ("y",), {"mode": ""},
    """  pairs = Constant <value_ints = [0, 0, 0, -1, 2]> ()
  halves = Reshape(x, pairs)
  even, odd = Split <axis = -1> (halves)
  negative = Neg(odd)
  crossed = Concat <axis = -1> (negative, even)
  whole = Constant <value_ints = [0, 0, 0, -1]> ()
  turned = Reshape(crossed, whole)
  kept = Mul(x, cos)
  moved = Mul(turned, sin)
  y = Add(kept, moved)""",
)  # fmt: skip
"""x, y [B,N,H,R], cos and sin [B,N,1,R] with every angle twice; mode 1 pairs neighbouring channels, which is
what the body does. No other mode is emitted."""


@cache
def ascend_dialect() -> Dialect:
    """What the converter takes for every Ascend of the table."""
    return Dialect(
        name="ascend",
        opset=OPSET,
        ir_version=8,
        nodes=load_nodes(Path(__file__).with_name("nodes.json")),
        elements=frozenset({"f32", "f16", "bf16", "i8", "u8", "i32", "i64", "bool"}),
        vendor={"rms_norm": RMS_NORM, "rotary": ROTARY},
    )
