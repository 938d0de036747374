"""Artifacts for ROCm: the models in its dialect, and the script that checks them on the card."""

from __future__ import annotations

from dsv4c.ir.graph import Module
from dsv4c.ir.weights import TensorStore
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.targets.base import Arch, Progress
from dsv4c.targets.onnx.emit_static import emit_static

from .dialect import rocm_dialect
from .scripts import run_script


def emit_rocm_onnx(
    module: Module, store: TensorStore, writer: ArtifactWriter, arch: Arch, progress: Progress
) -> None:
    """Write the module for one kind of card; see `emit_static`."""
    emit_static(module, store, writer, (arch.dialect or rocm_dialect)(), progress)
    writer.add_section("file:run.sh", run_script(arch).encode())
