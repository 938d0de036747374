"""What a user runs where the card is: ONNX Runtime with its CUDA provider, and the check of an artifact."""

from __future__ import annotations

from dsv4c.targets.base import Arch
from dsv4c.targets.onnx.scripts import provider_script


def run_script(arch: Arch) -> str:
    """`run.sh`: verify, then measure, on a card of the arch."""
    return provider_script(
        device=f"an NVIDIA card of {arch.name} ({arch.attributes['card']})",
        provider="CUDAExecutionProvider",
        package="onnxruntime-gpu",
        needs="the driver of the card, CUDA 13 and cuDNN 9",
    )
