"""Cambricon MLU: the target, its ONNX dialect, its scripts, and kernels in BANG C."""

from .target import MLU

__all__ = ["MLU"]
