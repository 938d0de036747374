"""The Ascend target as a value: products, legal ops, pipelines, formats."""

from __future__ import annotations

from dsv4c.targets.base import Arch, Emitter, Format, Target
from dsv4c.targets.onnx.ops import INT8, INT8_WEIGHTS, OPS, PIPELINE

from .dialect import ascend_dialect

ARCHS = (
    Arch("910c", {"soc": "Ascend910_9391", "product": "Atlas A3"}, machine="", device="ascend-910c-die"),
    Arch("910b", {"soc": "Ascend910B1", "product": "Atlas A2"}, machine="", device="ascend-910b2"),
    Arch("910b3", {"soc": "Ascend910B3", "product": "Atlas A2"}, machine="", device="ascend-910b3"),
    Arch("950", {"soc": "Ascend950PR_9599", "product": "Ascend 950PR"}, machine="", device="ascend-950pr"),
)
"""What `atc --soc_version` is told. A 910C card holds two dies, and a program runs on one."""


def _load() -> Emitter:
    from .emit import emit_ascend

    return emit_ascend


ASCEND = Target(
    name="ascend",
    doc="Huawei Ascend NPUs, by ONNX for the ATC converter of CANN",
    archs=ARCHS,
    ops=OPS,
    formats=(Format("onnx", PIPELINE, {"onnx": "onnx"}, _load, INT8, shows_blocks=True),),
    default_arch=lambda: "910c",
    numerics={"fast": INT8_WEIGHTS + ',quantise_activations{rule="int8_token_bf16"}', "exact": ""},
    dialect=ascend_dialect,
)
