"""AMD ROCm: the target, its ONNX dialect, and what starts it on a machine with a card."""

from .target import ROCM

__all__ = ["ROCM"]
