"""Artifacts for MLU: the models in its dialect, kernels in BANG C, and the script that compiles those."""

from __future__ import annotations

from dsv4c.ir.graph import Module
from dsv4c.ir.weights import TensorStore
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.targets.base import Arch, Progress
from dsv4c.targets.onnx.emit_static import Shapes, emit_static

from .dialect import mlu_dialect
from .scripts import device_files


def emit_mlu(
    module: Module, store: TensorStore, writer: ArtifactWriter, arch: Arch, progress: Progress
) -> None:
    """Write the module for one product; see `emit_static`."""
    emit_static(module, store, writer, mlu_dialect(), progress)
    files, left = device_files(module, arch, Shapes.of(module).tokens[-1])
    for name, text in files.items():
        writer.add_section(f"file:{name}", text.encode())
    module.notes["bang_kernels"] = {"left_out": left}
