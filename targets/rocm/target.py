"""The ROCm target as a value: cards, legal ops, pipelines, formats."""

from __future__ import annotations

from dsv4c.targets.base import Arch, Emitter, Format, Target
from dsv4c.targets.gpu.ops import PLAN, PLAN_OPS
from dsv4c.targets.onnx.ops import FNUZ, HALF, OPS, PIPELINE, ROUNDED, ROUNDINGS

from .dialect import rocm_dialect

ARCHS = (
    Arch("gfx90a", {"gfx": "gfx90a", "card": "MI250X"}, machine="", device="mi250x-die"),
    Arch(
        "gfx942", {"gfx": "gfx942", "card": "MI300X"}, machine="", device="mi300x",
        numerics={"fast": FNUZ, "half": HALF, "exact": ""},
    ),
    Arch("gfx950", {"gfx": "gfx950", "card": "MI355X"}, machine="", device="mi355x"),
)  # fmt: skip
"""What the compiler of AMD calls them. Only gfx942 has the FNUZ kind of 8-bit floats, the only one that
MIGraphX reads; gfx950 has that of OCP, which it does not."""


def _load_onnx() -> Emitter:
    from .emit import emit_rocm_onnx

    return emit_rocm_onnx


ONNX = Format(
    "onnx", PIPELINE, {"onnx": "onnx"}, _load_onnx, OPS | ROUNDED, shows_blocks=True, roundings=ROUNDINGS
)

ROCM = Target(
    name="rocm",
    doc="AMD GPUs, by machine code with a launch plan, or ONNX for MIGraphX",
    archs=ARCHS,
    ops=OPS & PLAN_OPS,
    formats=(PLAN, ONNX),
    default_arch=lambda: "gfx942",
    numerics={"fast": HALF, "half": HALF, "exact": ""},
    dialect=rocm_dialect,
)
