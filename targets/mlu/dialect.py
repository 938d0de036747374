"""ONNX as conservative as it can be for Cambricon's MagicMind, whose list of operators is not public."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dsv4c.targets.onnx.dialect import Dialect, load_nodes


@cache
def mlu_dialect() -> Dialect:
    """Opset 13 and nothing but standard nodes that four other consumers take; see `nodes.json`."""
    return Dialect(
        name="mlu",
        opset=13,
        ir_version=8,
        nodes=load_nodes(Path(__file__).with_name("nodes.json")),
        elements=frozenset({"f32", "f16", "i8", "i32", "i64", "bool"}),
    )
