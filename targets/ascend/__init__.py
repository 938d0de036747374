"""Huawei Ascend: the target, its ONNX dialect, its scripts, and kernels for what ONNX cannot say."""

from .target import ASCEND

__all__ = ["ASCEND"]
