"""ONNX as MIGraphX takes it: standard nodes up to opset 19, 64-bit indices, 8-bit floats only of FNUZ kind.

The table of nodes is read from `nodes.json`. No node of another domain is used: `README.md` says why.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dsv4c.targets.onnx.dialect import Dialect, load_nodes

OPSET = 19
"""The last it takes, and the first with FLOAT8E4M3FNUZ."""


@cache
def rocm_dialect() -> Dialect:
    """What its parser takes, whatever the card. `Mod` of INT32 has an open issue on GPUs, hence INT64."""
    return Dialect(
        name="rocm",
        opset=OPSET,
        ir_version=9,
        nodes=load_nodes(Path(__file__).with_name("nodes.json")),
        elements=frozenset({"f32", "f16", "bf16", "f8e4m3fnuz", "i8", "u8", "i32", "i64", "bool"}),
        index="i64",
        provider="MIGraphXExecutionProvider",
    )
