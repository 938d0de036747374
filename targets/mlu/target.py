"""The MLU target as a value: products, legal ops, pipelines, formats."""

from __future__ import annotations

from dsv4c.targets.base import Arch, Emitter, Format, Target
from dsv4c.targets.onnx.ops import INT8, INT8_WEIGHTS, OPS, PIPELINE

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
    formats=(Format("onnx", PIPELINE, {"onnx": "onnx"}, _load, INT8, shows_blocks=True),),
    default_arch=lambda: "590",
    numerics={"fast": INT8_WEIGHTS + ',quantise_activations{rule="int8_token"}', "exact": ""},
    dialect=mlu_dialect,
)
