"""The MLU target as a value: products, legal ops, pipelines, formats."""

from __future__ import annotations

from dsv4c.targets.base import Arch, Emitter, Format, Target
from dsv4c.targets.onnx.ops import HALF, INT8_WEIGHTS, OPS, PIPELINE, ROUNDED, ROUNDINGS

from .dialect import mlu_dialect

ARCHS = (
    Arch("590", {"bang": "mtp_592", "product": "MLU590"}, machine="", device="mlu590"),
    Arch("370", {"bang": "mtp_372", "product": "MLU370"}, machine="", device="mlu370-x8"),
)
"""`bang` is what `cncc --bang-mlu-arch` is told."""


def _load() -> Emitter:
    from .emit import emit_mlu

    return emit_mlu


MLU = Target(
    name="mlu",
    doc="Cambricon MLU, by ONNX in a conservative subset",
    archs=ARCHS,
    ops=OPS,
    formats=(
        Format("onnx", PIPELINE, {"onnx": "onnx"}, _load, ROUNDED, shows_blocks=True, roundings=ROUNDINGS),
    ),
    default_arch=lambda: "590",
    numerics={
        "fast": INT8_WEIGHTS + ',quantise_activations{rule="int8_token"}',
        "half": HALF,
        "exact": "",
    },
    dialect=mlu_dialect,
)
