"""What a user runs where the card is: ONNX Runtime with MIGraphX, and the check of an artifact."""

from __future__ import annotations

from dsv4c.targets.base import Arch
from dsv4c.targets.onnx.scripts import provider_script


def run_script(arch: Arch) -> str:
    """`run.sh`: the golden vectors on a card of the arch."""
    return provider_script(
        device=f"an AMD card of {arch.name} ({arch.attributes['card']})",
        provider="MIGraphXExecutionProvider",
        package="onnxruntime-migraphx",
        needs="ROCm 7 with MIGraphX (libmigraphx_c.so.3, libamdhip64.so.7), glibc 2.34 or later",
    )
