"""What tests of launch plans share: plans of small modules, and the process that interprets them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import Arr, Case, assert_close

from dsv4c import api
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.gpu_backend import GpuBackend
from dsv4c.targets.base import Arch
from dsv4c.targets.gpu.emit import emit_draft
from dsv4c.targets.gpu.ops import PLAN_PIPELINE

GOLDEN = Path(__file__).parent / "data" / "golden"


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def lowered(checkpoint: Path | Module, front: str = "") -> Module:
    """A checkpoint at level TARGET, as plans take it."""
    module = api.load_checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    run_pipeline(module, parse_pipeline((front + "," if front else "") + PLAN_PIPELINE))
    module.level = Level.TARGET
    for part in module.parts.values():
        run_pipeline(part, parse_pipeline(PLAN_PIPELINE.rpartition(",plan_memory")[0]))
        part.level = Level.TARGET
    return module


def write_draft(module: Module, store: Any, path: Path, arch: str = "sm_90a") -> Path:
    """The plan of a module, without code."""
    with ArtifactWriter(path) as writer:
        emit_draft(module, store, writer, Arch(arch, {}), quiet)
    return path


class Interpreter:
    """The worker process; a call that fails there fails here, with its words."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def run(
        self, path: Path, calls: list[tuple[Mapping[str, Arr], Mapping[str, Arr]]], part: str = ""
    ) -> list[Any]:
        """[(outputs, states)] of calls of an artifact or of a part of it, one after the other."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((str(path), calls, part), self._process.stdin)
        self._process.stdin.flush()
        found = pickle.load(self._process.stdout)
        assert not isinstance(found, str), found
        return list(found)


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """The worker, until the end of the block."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_worker.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Interpreter(process)
        assert process.stdin is not None
        process.stdin.close()


def check_case(
    case: Case, inputs: Mapping[str, Arr], worker: Interpreter, path: Path, tolerance: float = 2e-6,
    only: Arr | None = None, arch: str = "sm_90a",
) -> dict[str, Arr]:  # fmt: skip
    """Launches against meaning: integers equal, floats within `tolerance` of the expected range.

    `only` [B,T] is the mask of the rows to compare, for outputs that start with those axes.
    """
    write_draft(case.module, case.store, path, arch)
    state = {name: inputs[name].copy() for name in case.module.states}
    given = {name: inputs[name] for name in case.module.inputs}
    ((found, left),) = worker.run(path, [(given, state)])
    for name, want in case.meaning(inputs).items():
        got = {**found, **left}[name]
        assert got.shape == want.shape, f"{name}: {got.shape} instead of {want.shape}"
        if only is not None and want.shape[:2] == only.shape:
            got, want = got[only], want[only]
        assert_close(name, got, want, tolerance)
    return {**found, **left}


__all__ = [
    "GOLDEN",
    "GpuBackend",
    "Interpreter",
    "check_case",
    "interpreter",
    "lowered",
    "quiet",
    "write_draft",
]
