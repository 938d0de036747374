"""The ONNX dialect of the CPU target: a TARGET-level module as a model for ONNX Runtime's CPU provider."""

from .emit import emit_onnx
from .table import LOWERINGS

__all__ = ["LOWERINGS", "emit_onnx"]
