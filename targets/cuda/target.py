"""The CUDA target as a value: cards, legal ops, pipelines, formats."""

from __future__ import annotations

from dsv4c.targets.base import Arch, Emitter, Format, Target
from dsv4c.targets.gpu.ops import PLAN, PLAN_OPS
from dsv4c.targets.onnx.ops import FP8_BF16, HALF, OPS, PIPELINE, ROUNDED, ROUNDINGS

from .dialect import cuda_dialect

_WITHOUT_FP8 = {"fast": HALF, "half": HALF, "exact": ""}

ARCHS = (
    Arch("sm_80", {"sm": "80", "card": "A100"}, machine="", device="a100-80gb", numerics=_WITHOUT_FP8),
    Arch("sm_89", {"sm": "89", "card": "L40S, RTX 4090"}, machine="", device="l40s"),
    Arch("sm_90a", {"sm": "90a", "card": "H100, H200"}, machine="", device="h200"),
    Arch("sm_100a", {"sm": "100a", "card": "B200"}, machine="", device="b200"),
    Arch("sm_120", {"sm": "120", "card": "RTX 5090, RTX PRO 6000"}, machine="", device="rtx-5090"),
)
"""Compute capabilities; the `a` ones have instructions that no later card has. Each is estimated on one card
of it. FP8 products begin with 8.9."""


def _load_onnx() -> Emitter:
    from .emit import emit_cuda_onnx

    return emit_cuda_onnx


ONNX = Format(
    "onnx", PIPELINE, {"onnx": "onnx"}, _load_onnx, OPS | ROUNDED, shows_blocks=True, roundings=ROUNDINGS
)

CUDA = Target(
    name="cuda",
    doc="NVIDIA GPUs, by machine code with a launch plan, or ONNX for the CUDA provider",
    archs=ARCHS,
    ops=OPS & PLAN_OPS,
    formats=(PLAN, ONNX),
    default_arch=lambda: "sm_90a",
    numerics={"fast": FP8_BF16, "half": HALF, "exact": ""},
    dialect=cuda_dialect,
)
