"""ONNX as CANN's converter takes it, and the nodes of domain `npu` with their meaning.

The table of nodes is read from `nodes.json`. A vendor node is used where it does the whole of an op; its body
in standard nodes is what any other consumer of the file runs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from dsv4c.targets.onnx.dialect import Dialect, VendorNode, load_nodes

OPSET = 16
"""Within the converter's 11 to 18, and the last at which it knows the product of INT8 codes."""

OPSET_950 = 18
"""The converter's last. The 950 has products of 8-bit floats, which no node of the table makes."""

_RMS_NORM = """  eps = Constant <value_float: float = @epsilon> ()
  square = Mul(x, x)
  {mean}
  shifted = Add(mean, eps)
  root = Sqrt(shifted)
  rstd = Reciprocal(root)
  unit = Mul(x, rstd)
  y = Mul(unit, gamma)"""


def _rms_norm(mean: str) -> VendorNode:
    """y = gamma x / sqrt(mean(x^2) + epsilon) over the last axis; rstd is the factor."""
    body = _RMS_NORM.format(mean=mean)
    return VendorNode("npu", "NPURmsNorm", ("x", "gamma"), ("y", "rstd"), {"epsilon": ""}, body)


RMS_NORM = _rms_norm("mean = ReduceMean <axes = [-1], keepdims = 1> (square)")
RMS_NORM_18 = _rms_norm(
    "last = Constant <value_ints = [-1]> ()\n  mean = ReduceMean <keepdims = 1> (square, last)"
)
"""The same where axes are an input."""

ROTARY = VendorNode(
    "npu", "NPURotaryPositionEmbedding", ("x", "cos", "sin"), ("y",), {"mode": ""},
    """  pairs = Constant <value_ints = [0, 0, 0, -1, 2]> ()
  halves = Reshape(x, pairs)
  ones = Constant <value_ints = [1, 1]> ()
  even, odd = Split <axis = -1> (halves, ones)
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


DYNAMIC_QUANT = VendorNode(
    "npu", "NPUDynamicQuant", ("x",), ("y", "scale"), {},
    """  wide = Cast <to = 1> (x)
  size = Abs(wide)
  top = ReduceMax <axes = [-1], keepdims = 1> (size)
  steps = Constant <value_float = 127.0> ()
  column = Div(top, steps)
  zero = Constant <value_float = 0.0> ()
  one = Constant <value_float = 1.0> ()
  some = Greater(column, zero)
  safe = Where(some, column, one)
  ratio = Div(wide, safe)
  whole = Round(ratio)
  y = Cast <to = 3> (whole)
  last = Constant <value_ints = [-1]> ()
  scale = Squeeze(column, last)""",
)  # fmt: skip
"""x BFLOAT16 [N,K] -> INT8 codes [N,K] and FLOAT scales [N], the largest magnitude of a row by 127."""

INT8_MATMUL = VendorNode(
    "ai.onnx", "QuantBatchMatMul", ("x1", "x2", "scale", "offset", "bias", "pertoken"), ("y",),
    {"dtype": "", "transpose_x1": "", "transpose_x2": ""},
    """  a = Cast <to = 1> (x1)
  b = Cast <to = 1> (x2)
  bt = Transpose <perm = [1, 0]> (b)
  dots = MatMul(a, bt)
  by_column = Mul(dots, scale)
  last = Constant <value_ints = [-1]> ()
  rows = Unsqueeze(pertoken, last)
  wide = Mul(by_column, rows)
  y = Cast <to = 16> (wide)""",
)  # fmt: skip
"""x1 INT8 [M,K], x2 INT8 [N,K], scale FLOAT [N], pertoken FLOAT [M] -> BFLOAT16 [M,N]; no offset, no bias.

CANN knows it in the standard domain up to opset 16, though ONNX has no such node. So the domain is written
out, and to run the body elsewhere our runtime renames it, letter for letter, when it reads the file."""


VENDOR = {
    "rms_norm": RMS_NORM,
    "rotary": ROTARY,
    "dynamic_quant": DYNAMIC_QUANT,
    "int8_matmul": INT8_MATMUL,
}


@cache
def ascend_dialect() -> Dialect:
    """What the converter takes for the 910."""
    return Dialect(
        name="ascend",
        opset=OPSET,
        ir_version=8,
        nodes=load_nodes(Path(__file__).with_name("nodes.json")),
        elements=frozenset({"f32", "f16", "bf16", "i8", "u8", "i32", "i64", "bool"}),
        vendor=VENDOR,
    )


@cache
def ascend950_dialect() -> Dialect:
    """What it takes for the 950: 8-bit floats besides, which ONNX has from 19 on.

    Its parser maps FLOAT8E4M3FN and reads nodes by name; ONNX Runtime asks for a version that declares them.
    """
    return replace(
        ascend_dialect(),
        name="ascend:950",
        opset=OPSET_950,
        ir_version=9,
        runs_as=19,
        elements=ascend_dialect().elements | {"f8e4m3"},
        vendor={"rms_norm": RMS_NORM_18, "rotary": ROTARY},
    )
