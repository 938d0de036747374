"""Runs a TVM artifact: its own copy of TVM's runtime, the compiled step, and the mapped weights.

Needs `tvm_ffi` and nothing else of TVM. State and weights are handed over without copying.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError

from .buffers import aligned
from .container import Artifact
from .engram import TableOptions
from .engram.calls import Tables
from .ffi import tvm_ffi
from .images.rows import ImageRows, no_images
from .one_token import OneToken
from .undo import Undo

_CPU, _POOLED = 1, 2
_loaded: dict[str, Any] = {}
"""TVM's runtime may be loaded once per process: content hash -> library."""


class TvmProgram:
    """One compiled function of an artifact with its weights.

    Args:
        machine: the loaded code.
        part: a name in meta["tvm"]["parts"]; "" is the step.
    """

    def __init__(self, artifact: Artifact, machine: Any, part: str = "") -> None:
        facts = artifact.meta["tvm"]["parts"][part] if part else artifact.meta["tvm"]
        self.inputs: dict[str, dict[str, Any]] = facts["inputs"]
        self.outputs: list[str] = facts["outputs"]
        self.name = part or "step"
        self._states: list[str] = facts.get("states", list(artifact.meta["step"]["states"]))
        self._function = machine[self.name]
        self._weights = [tvm_ffi.from_dlpack(artifact.array(n)) for n in facts["weights"]]
        self._tables: list[str] = facts["tables"]
        self._bound: tuple[object, list[Any]] = (None, [])
        self._one = OneToken(facts, machine) if "one" in facts else None

    def run(
        self, inputs: Sequence[npt.NDArray[Any]], state: dict[str, npt.NDArray[Any]], tables: Tables
    ) -> Any:
        """The results, still TVM's: inputs in order, in their own dtypes; `state` is updated in place."""
        if self._bound[0] is not state:
            given = [tvm_ffi.from_dlpack(state[name]) for name in self._states]
            self._bound = (state, [*given, *self._weights, *(tables.handle(name) for name in self._tables)])
        if self._one is not None and self._one.fits(inputs):
            return self._one.run(inputs, self._bound[1])
        return self._function(*(tvm_ffi.from_dlpack(aligned(a)) for a in inputs), *self._bound[1])


def _load_code(artifact: Artifact) -> tuple[Any, Any]:
    """The library, which must be kept, and the virtual machine with its functions.

    Raises:
        ArtifactError: the code does not load on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="dsv4c-") as directory:
        path = Path(directory) / "step.so"
        path.write_bytes(artifact.section("code"))
        try:
            library = tvm_ffi.load_module(str(path))
            machine = library["vm_load_executable"]()
            machine["vm_initialization"](_CPU, 0, _POOLED)
        except Exception as error:
            raise ArtifactError(
                f"the compiled code does not load: {error}", where=str(artifact.path)
            ) from error
    return library, machine


class TvmBackend:
    """The compiled step function of one artifact.

    Args:
        threads: worker threads; None takes every core.
        tables: how looked-up tables are read; None keeps what the artifact says.

    Attributes:
        undo: takes back a step that failed in its middle; None where no step can, because none reads a file.

    Raises:
        ArtifactError: the code does not load on this machine, or a table does not fit.
    """

    def __init__(
        self, artifact: Artifact, threads: int | None = None, tables: TableOptions | None = None
    ) -> None:
        self.artifact = artifact
        cores = len(os.sched_getaffinity(0))
        # The pool is sized once per process, from this variable; by default it is half of the cores.
        os.environ.setdefault("TVM_NUM_THREADS", str(max(cores, threads or 1)))
        _load_runtime(artifact)
        configure = tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True)
        if configure is not None:
            configure(1, threads or cores)
        self._library, self._machine = _load_code(artifact)
        self._program = TvmProgram(artifact, self._machine)
        self._parts: dict[str, TvmProgram] = {}
        self._watch: Callable[..., None] | None = None
        self.tables = Tables(artifact, tables)
        self.undo = Undo(artifact.meta["tvm"]["writes"]) if self.tables.fallible else None

    def step(
        self,
        tokens: npt.NDArray[np.int32],
        n_valid: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        state: dict[str, npt.NDArray[Any]],
        images: ImageRows | None = None,
    ) -> npt.NDArray[np.float32]:
        """One step: tokens i32 [B,T], n_valid i32 [B], rows i32 [B,L] -> logits f32 [B,L,V].

        `state` is updated in place; its arrays must be 64-byte aligned. `images` are the rows of this call's
        image tokens; without them such tokens take their row of the embedding.
        """
        logits: npt.NDArray[np.float32]
        inputs: list[npt.NDArray[Any]] = [np.asarray(a, np.int32) for a in (tokens, n_valid, rows)]
        inputs += self._images(images, len(tokens))
        (logits,) = self.call(inputs, state, 1)
        return logits

    def call(
        self, inputs: Sequence[npt.NDArray[Any]], state: dict[str, npt.NDArray[Any]], results: int
    ) -> list[npt.NDArray[Any]]:
        """One step of any graph: its inputs in order, in their own dtypes -> copies of the first `results`.

        `state` is updated in place; its arrays must be 64-byte aligned.

        Raises:
            SessionError: a looked-up table could not be read; `state` is as it was.
        """
        result = self._run(self._program, inputs, state)
        return [np.array(np.from_dlpack(result[i])) for i in range(results)]

    def call_part(
        self,
        part: str,
        inputs: Sequence[npt.NDArray[Any]],
        state: dict[str, npt.NDArray[Any]] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """The results of another program of the artifact by name, copies; it is made when first called.

        `state` is updated in place by a part that shares the step's.
        """
        if part not in self._parts:
            self._parts[part] = TvmProgram(self.artifact, self._machine, part)
        program = self._parts[part]
        result = self._run(program, inputs, {} if state is None else state)
        return {name: np.array(np.from_dlpack(result[i])) for i, name in enumerate(program.outputs)}

    def encode(
        self,
        tokens: npt.NDArray[np.int32],
        n_valid: npt.NDArray[np.int32],
        state: dict[str, npt.NDArray[Any]],
        images: ImageRows | None = None,
    ) -> None:
        """Feed tokens to the encoder layers alone; arguments as those of `step`."""
        inputs: list[npt.NDArray[Any]] = [np.asarray(a, np.int32) for a in (tokens, n_valid)]
        self.call_part("encoder", [*inputs, *self._images(images, len(tokens))], state)

    def _images(self, images: ImageRows | None, batch: int) -> list[npt.NDArray[Any]]:
        """The inputs that a model with a vision tower takes besides tokens."""
        if "images" not in self._program.inputs:
            return []
        given = images or no_images(batch, int(self._program.inputs["images"]["shape"][2]))
        return [given.rows, given.counts]

    def _run(
        self, program: TvmProgram, inputs: Sequence[npt.NDArray[Any]], state: dict[str, npt.NDArray[Any]]
    ) -> Any:
        if self._watch is not None:
            self._watch(program, inputs, state)
        names = list(program.inputs)
        counts = inputs[names.index("n_valid")] if "n_valid" in names else None
        try:
            with nullcontext() if self.undo is None else self.undo.guard(state, counts):
                return program.run(inputs, state, self.tables)
        except Exception as error:
            failure = self.tables.clear()
            if failure is None:
                raise
            raise failure from error

    def probe(self, name: str) -> Any:
        """A function of the code that no program calls; `profile` measures with them."""
        return self._library.get_function(name, query_imports=True)

    def watch(self, begin: Callable[..., None] | None, instrument: Any) -> None:
        """From now on call `begin(program, inputs, state)` before runs and `instrument` around calls."""
        self._watch = begin
        self._machine["set_instrument"](instrument)


def _load_runtime(artifact: Artifact) -> None:
    """Load the TVM runtime that the artifact carries, unless one is there."""
    if _loaded or tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is not None:
        return
    if "tvm_runtime" not in artifact.sections:
        _load_installed(artifact)
        return
    code = artifact.section("tvm_runtime")
    with tempfile.TemporaryDirectory(prefix="dsv4c-") as directory:
        # the installed one where it is the same: the compiler loads that, and two copies abort a process
        path = _installed_runtime()
        if path is None or path.read_bytes() != code:
            path = Path(directory) / "libtvm_runtime.so"
            path.write_bytes(code)
        _load(path, artifact)


def _load(path: Path, artifact: Artifact) -> None:
    try:
        _loaded["tvm"] = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"TVM's runtime does not load: {error}", where=str(artifact.path)) from error


def _load_installed(artifact: Artifact) -> None:
    """Load the runtime of an installed TVM, for code that was compiled on a machine of another kind.

    Raises:
        ArtifactError: there is none of the version that compiled the code.
    """
    wanted, path = artifact.meta["tvm"].get("version", ""), _installed_runtime()
    if path is None or _version() != wanted:
        package = f"apache-tvm=={wanted}" if wanted else "apache-tvm"
        raise ArtifactError(
            "it was compiled on a machine of another kind and carries no TVM runtime for this one",
            where=str(artifact.path), allowed=f"one that is installed: {package}",
            hint=f'pip install "{package}"; of it the runtime library is loaded, not the compiler',
        )  # fmt: skip
    _load(path, artifact)


def _version() -> str:
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _installed_runtime() -> Path | None:
    """TVM's runtime library where the compiler is installed too, or None."""
    try:
        found = importlib.util.find_spec("tvm")
    except ImportError:  # whoever looks modules up may refuse this one
        return None
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "lib" / "libtvm_runtime.so"
    return path if path.is_file() else None
