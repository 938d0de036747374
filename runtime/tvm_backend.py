"""Runs a TVM artifact: its own copy of TVM's runtime, the compiled step, and the mapped weights.

Needs `tvm_ffi` and nothing else of TVM. State and weights are handed over without copying.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from dsv4c.errors import ArtifactError

from .buffers import aligned
from .container import Artifact

_CPU, _POOLED = 1, 2
_loaded: dict[str, Any] = {}
"""TVM's runtime may be loaded once per process: content hash -> library."""


class TvmBackend:
    """The compiled step function of one artifact.

    Args:
        threads: worker threads; None takes every core.

    Raises:
        ArtifactError: the code does not load on this machine.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self.artifact = artifact
        cores = len(os.sched_getaffinity(0))
        # The pool is sized once per process, from this variable; by default it is half of the cores.
        os.environ.setdefault("TVM_NUM_THREADS", str(max(cores, threads or 1)))
        _load_runtime(artifact)
        configure = tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True)
        if configure is not None:
            configure(1, threads or cores)
        with tempfile.TemporaryDirectory(prefix="dsv4c-") as directory:
            path = Path(directory) / "step.so"
            path.write_bytes(artifact.section("code"))
            try:
                self._library = tvm_ffi.load_module(str(path))
                self._vm = self._library["vm_load_executable"]()
                self._vm["vm_initialization"](_CPU, 0, _POOLED)
            except Exception as error:
                raise ArtifactError(
                    f"the compiled code does not load: {error}", where=str(artifact.path)
                ) from error
        self._step = self._vm["step"]
        self._weights = [tvm_ffi.from_dlpack(artifact.array(n)) for n in artifact.meta["tvm"]["weights"]]
        self._bound: tuple[object, list[Any]] = (None, [])

    def step(
        self,
        tokens: npt.NDArray[np.int32],
        n_valid: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        state: dict[str, npt.NDArray[Any]],
    ) -> npt.NDArray[np.float32]:
        """One step: tokens i32 [B,T], n_valid i32 [B], rows i32 [B,L] -> logits f32 [B,L,V].

        `state` is updated in place; its arrays must be 64-byte aligned.
        """
        if self._bound[0] is not state:
            names: Sequence[str] = list(self.artifact.meta["step"]["states"])
            self._bound = (state, [tvm_ffi.from_dlpack(state[name]) for name in names])
        inputs = [tvm_ffi.from_dlpack(aligned(np.asarray(a, np.int32))) for a in (tokens, n_valid, rows)]
        result = self._step(*inputs, *self._bound[1], *self._weights)
        return np.array(np.from_dlpack(result[0]))


def _load_runtime(artifact: Artifact) -> None:
    """Load the TVM runtime that the artifact carries, unless one is there."""
    if _loaded or tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is not None:
        return
    if "tvm_runtime" not in artifact.sections:
        raise ArtifactError(
            "it was cross-compiled and carries no TVM runtime",
            where=str(artifact.path),
            hint="build libtvm_runtime.so for this machine and put it on LD_PRELOAD",
        )
    with tempfile.TemporaryDirectory(prefix="dsv4c-") as directory:
        path = Path(directory) / "libtvm_runtime.so"
        path.write_bytes(artifact.section("tvm_runtime"))
        try:
            _loaded["tvm"] = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(f"TVM's runtime does not load: {error}", where=str(artifact.path)) from error
