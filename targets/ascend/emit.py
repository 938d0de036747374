"""Artifacts for Ascend: the models in its dialect, and the scripts that take them to the device."""

from __future__ import annotations

from dsv4c.ir.graph import Module
from dsv4c.ir.weights import TensorStore
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.targets.base import Arch, Progress
from dsv4c.targets.onnx.emit_static import Shapes, emit_static, program_names

from .dialect import ascend_dialect
from .scripts import build_script


def emit_ascend(
    module: Module, store: TensorStore, writer: ArtifactWriter, arch: Arch, progress: Progress
) -> None:
    """Write the module for one product; see `emit_static`."""
    emit_static(module, store, writer, (arch.dialect or ascend_dialect)(), progress)
    script = build_script(arch, program_names(Shapes.of(module)))
    writer.add_section("file:build.sh", script.encode())
