"""The Ascend target as a value: products, legal ops, pipelines, formats."""

from __future__ import annotations

from dsv4c.targets.base import Arch, Emitter, Format, Target
from dsv4c.targets.onnx.ops import HALF, INT8_WEIGHTS, MX, OPS, PIPELINE, ROUNDED, ROUNDINGS

from .dialect import ascend950_dialect, ascend_dialect

ARCHS = (
    Arch("910c", {"soc": "Ascend910_9391", "product": "Atlas A3"}, machine="", device="ascend-910c-die"),
    Arch("910b", {"soc": "Ascend910B1", "product": "Atlas A2"}, machine="", device="ascend-910b2"),
    Arch("910b3", {"soc": "Ascend910B3", "product": "Atlas A2"}, machine="", device="ascend-910b3"),
    Arch(
        "950",
        {"soc": "Ascend950PR_9599", "product": "Ascend 950PR"},
        machine="",
        device="ascend-950pr",
        numerics={"fast": MX, "half": HALF, "exact": ""},
        dialect=ascend950_dialect,
    ),
)
"""What `atc --soc_version` is told. A 910C card holds two dies, and a program runs on one. The
950 multiplies 8-bit floats, so it takes the released formats as they are."""


def _load() -> Emitter:
    from .emit import emit_ascend

    return emit_ascend


ASCEND = Target(
    name="ascend",
    doc="Huawei Ascend NPUs, by ONNX for the ATC converter of CANN",
    archs=ARCHS,
    ops=OPS,
    formats=(
        Format("onnx", PIPELINE, {"onnx": "onnx"}, _load, ROUNDED, shows_blocks=True, roundings=ROUNDINGS),
    ),
    default_arch=lambda: "910c",
    numerics={
        "fast": INT8_WEIGHTS + ',quantise_activations{rule="int8_token_bf16"}',
        "half": HALF,
        "exact": "",
    },
    dialect=ascend_dialect,
)
