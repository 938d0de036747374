"""What executes the steps of an artifact: one backend per format, chosen after checking the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ToolchainError, UsageError

from .container import Artifact
from .engram.options import TableOptions
from .images.rows import ImageRows
from .undo import Undo

Logits = npt.NDArray[np.float32]


class Backend(Protocol):
    """What executes a step; one class per artifact format. With `undo`, a step may fail in its middle."""

    undo: Undo | None

    def step(
        self,
        tokens: npt.NDArray[np.int32],
        n_valid: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        state: dict[str, npt.NDArray[Any]],
        images: ImageRows | None = None,
    ) -> Logits: ...

    def call_part(self, part: str, inputs: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Results by name of another program of the artifact, one of meta["parts"]."""
        ...


@runtime_checkable
class Resident(Protocol):
    """A backend that may keep a state elsewhere between steps."""

    def bring(self) -> None:
        """Make the arrays of that state current, and look at them again in the next step."""
        ...


def dimension(text: str, sizes: dict[str, int]) -> int:
    """A state dimension from the manifest: a number, a symbol, or `symbol//number`."""
    symbol, _, divisor = text.partition("//")
    value = sizes[symbol] if symbol in sizes else int(symbol)
    return value // int(divisor) if divisor else value


def load_backend(artifact: Artifact, threads: int | None, tables: TableOptions | None = None) -> Backend:
    """The backend of an artifact's format; where it is for processors, of one that `archs.select` gave."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}", where="Session", allowed="1 or more")
    if "static" in artifact.meta.get("onnx", {}):
        from .static_backend import StaticBackend

        return StaticBackend(artifact, threads)
    if artifact.meta["format"] == "onnx":
        from .onnx_backend import OnnxBackend

        return OnnxBackend(artifact, threads)
    if artifact.meta["format"] == "plan":
        from .gpu_backend import GpuBackend

        if tables is not None and (tables.tier == "disk" or tables.cache_bytes is not None):
            raise UsageError(
                "a launch plan holds its tables in device memory", where=str(artifact.path),
                hint="leave out --tables disk and --table-cache, or compile for cpu",
            )  # fmt: skip
        return GpuBackend(artifact, resident=True)
    try:
        from .tvm_backend import TvmBackend
    except ImportError as error:
        raise ToolchainError(f"{error}", hint="pip install apache-tvm-ffi") from error
    return TvmBackend(artifact, threads, tables)
