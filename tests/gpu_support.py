"""What tests of launch plans share: plans of small modules, and the process that interprets them."""

from __future__ import annotations

import ctypes
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
from dsv4c.targets import parse_target
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


def in_numerics(numerics: str, target: str, checkpoint: str = "v4") -> Module:
    """A golden checkpoint at level TARGET as `--numerics` makes it."""
    family, arch = parse_target(target)
    _, passes = api.in_numerics(family, arch, family.format("plan"), numerics)
    return api.lower(api.load_checkpoint(GOLDEN / checkpoint), target, "plan", passes=passes).module


def write_draft(module: Module, store: Any, path: Path, arch: str = "sm_90a") -> Path:
    """The plan of a module, without code."""
    with ArtifactWriter(path) as writer:
        emit_draft(module, store, writer, Arch(arch, {}), quiet)
    return path


class FakeDriver:
    """A driver's library that keeps its memory in Python and notes every call."""

    def __init__(
        self, version: int = 13000, capability: tuple[int, int] = (9, 0), name: bytes = b"gfx942",
        devices: int = 1,
    ) -> None:  # fmt: skip
        self.version, self.capability, self.name, self.devices = version, capability, name, devices
        self.calls: list[str] = []
        self.launches: list[tuple[tuple[int, ...], int]] = []
        self.memory: dict[int, Any] = {}
        self.clock = 0.0

    def __getattr__(self, symbol: str) -> Any:
        if not symbol.startswith(("cu", "hip")):
            raise AttributeError(symbol)

        def call(*arguments: Any) -> int:
            self.calls.append(symbol)
            return int(
                getattr(self, f"_{symbol.removeprefix('cu').removeprefix('hip').lower()}", self._ok)(
                    *arguments
                )
            )

        return call

    def _ok(self, *arguments: Any) -> int:
        return 0

    def _drivergetversion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0

    def _devicegetcount(self, out: Any) -> int:
        out._obj.value = self.devices
        return 0

    _getdevicecount = _devicegetcount

    def _devicecanaccesspeer(self, out: Any, device: Any, peer: Any) -> int:
        out._obj.value = int(device.value != peer.value)
        return 0

    def _devicegetattribute(self, out: Any, attribute: Any, device: Any) -> int:
        out._obj.value = self.capability[attribute.value - 75]
        return 0

    def _getdevicepropertiesr0600(self, out: Any, device: Any) -> int:
        ctypes.memmove(ctypes.addressof(out) + 1160, self.name, len(self.name))
        return 0

    def _memalloc_v2(self, out: Any, nbytes: Any) -> int:
        held = ctypes.create_string_buffer(nbytes.value + 256)
        out._obj.value = -(-ctypes.addressof(held) // 256) * 256
        self.memory[out._obj.value] = held
        return 0

    _malloc = _memalloc_v2

    def _memcpyhtodasync_v2(self, to: Any, source_: Any, nbytes: Any, stream: Any) -> int:
        ctypes.memmove(to.value, source_.value, nbytes.value)
        return 0

    def _memcpydtohasync_v2(self, to: Any, source_: Any, nbytes: Any, stream: Any) -> int:
        ctypes.memmove(to.value, source_.value, nbytes.value)
        return 0

    _memcpyhtodasync, _memcpydtohasync = _memcpyhtodasync_v2, _memcpydtohasync_v2

    def _launchkernel(self, function: Any, *rest: Any) -> int:
        self.launches.append((tuple(r.value for r in rest[:7]), len(rest[8])))
        return 0

    _modulelaunchkernel = _launchkernel

    def _getproblem(self) -> int:
        return 700

    # what measuring calls beside executing: events tick a millisecond each, named by their time

    def _eventcreate(self, out: Any, flags: Any) -> int:
        out._obj.value = 1
        return 0

    _eventcreatewithflags = _eventcreate

    def _eventrecord(self, event: Any, stream: Any) -> int:
        self.clock += 1.0
        event.value = int(self.clock)
        return 0

    def _eventelapsedtime(self, out: Any, first: Any, last: Any) -> int:
        out._obj.value = last.value - first.value
        return 0

    def _memcpydtodasync_v2(self, to: Any, source_: Any, nbytes: Any, stream: Any) -> int:
        ctypes.memmove(to.value, source_.value, nbytes.value)
        return 0

    _memcpydtodasync = _memcpydtodasync_v2

    def _memgetinfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 100 << 20, 200 << 20
        return 0

    _memgetinfo = _memgetinfo_v2

    def _devicegetname(self, out: Any, length: Any, device: Any) -> int:
        out.value = b"A card"
        return 0


class Interpreter:
    """The worker process; a call that fails there fails here, with its words."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def run(
        self, path: Path, calls: list[tuple[Mapping[str, Arr], Mapping[str, Arr]]], part: str = ""
    ) -> list[Any]:
        """[(outputs, states)] of calls of an artifact or of a part of it, one after the other.

        Calls may share a state, which then stays on the devices between them; it is that after the last.
        """
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
    "FakeDriver",
    "GpuBackend",
    "Interpreter",
    "check_case",
    "in_numerics",
    "interpreter",
    "lowered",
    "quiet",
    "write_draft",
]
