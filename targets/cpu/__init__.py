"""The CPU target: TVM kernels compiled by LLVM, or ONNX for ONNX Runtime."""

from .target import CPU

__all__ = ["CPU"]
