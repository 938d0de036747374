"""NVIDIA CUDA: the target, its ONNX dialect, and what starts it on a machine with a card."""

from .target import CUDA

__all__ = ["CUDA"]
