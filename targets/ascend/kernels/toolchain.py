"""Finds the environment of the Ascend kernels and calls the programs that live in it.

The compiler is a package of its own that cannot be installed beside dsv4c, so nothing here imports Triton:
`lower.py` and `interpret.py` run there as subprocesses, and their answers come back as frozen values.

    python -m dsv4c.targets.ascend.kernels.toolchain install build/ascend-env
    python -m dsv4c.targets.ascend.kernels.toolchain tiles    # what fits, on which SoC
"""

from __future__ import annotations

import argparse
import enum
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import CompileError, ToolchainError, UsageError, unknown

from .table import KERNELS, SOCS, Kernel, Numbers, kernel

HERE = Path(__file__).resolve().parent
DEFAULT = Path("build/ascend-env")
"""Where the environment is looked for, relative to the working directory."""

TIMEOUT = 120.0
"""Seconds for one program; a kernel takes well under ten."""

INSTALL = "python -m dsv4c.targets.ascend.kernels.toolchain install"


class Stage(enum.IntEnum):
    """How far a kernel came: Triton's IR, linalg, HIVM with its memory planned, an object of CANN's hivmc."""

    NONE = 0
    TTIR = 1
    LINALG = 2
    HIVM = 3
    BINARY = 4


@dataclass(frozen=True)
class Overflow:
    """A memory of one core that is too small; sizes in bytes."""

    memory: str
    required: int
    available: int


@dataclass(frozen=True)
class Request:
    """One kernel to compile: dtype of its arrays, model sizes, tiles, SoC, more options of the compiler."""

    kernel: Kernel
    soc: str
    tiles: Numbers
    dtype: str = "bf16"
    sizes: Numbers = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def text(self) -> dict[str, Any]:
        """What `lower.py` reads, without the places of its files."""
        if self.soc not in SOCS:
            raise unknown("SoC", self.soc, SOCS, UsageError, self.kernel.name)
        constants = self.kernel.constants({**self.kernel.sizes, **self.sizes}, self.tiles)
        return {
            "action": "lower", "module": self.kernel.module, "function": self.kernel.name, "soc": self.soc,
            "signature": self.kernel.signature(self.dtype), "constants": constants,
            "options": list(self.options),
        }  # fmt: skip


@dataclass(frozen=True)
class Lowered:
    """What became of a request.

    Attributes:
        stage: the last one that was reached.
        mode: `aiv` (vector cores only), `aic` (cube only) or `mix`.
        memory: bytes in use of `ub`, `l1` and `l0c`, by the compiler's memory plan.
        files: the text of each stage, in the directory that was given.
        notes: what the compiler changed to make it fit, such as giving up double buffers.
        overflow, error: why it went no further.
    """

    request: Request
    stage: Stage
    mode: str
    memory: Mapping[str, int]
    files: Mapping[str, Path]
    notes: tuple[str, ...]
    overflow: Overflow | None
    error: str
    seconds: float

    @property
    def fits(self) -> bool:
        return self.stage >= Stage.HIVM

    def require(self) -> Lowered:
        """Itself, or CompileError with what the compiler said."""
        if self.fits:
            return self
        where = f"{self.request.kernel.name} on {self.request.soc}, tiles {dict(self.request.tiles)}"
        if self.overflow:
            o = self.overflow
            raise CompileError(
                f"{o.memory} holds {o.available} bytes and {o.required} are needed", where=where,
                hint="choose smaller tiles; tiles_that_fit tries them in order",
            )  # fmt: skip
        raise CompileError(
            f"the compiler stopped after {self.stage.name.lower()}: {self.error.strip() or 'no message'}",
            where=where, hint="the texts of the stages lie in the directory of the request",
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The first tiles that the compiler takes, with every answer on the way there; the last is theirs."""

    tiles: Numbers
    tried: tuple[Lowered, ...]


def pinned() -> dict[str, str]:
    """The packages of the environment and the versions these kernels were proved with."""
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name: version for name, _, version in pins if version}


@dataclass(frozen=True)
class Toolchain:
    """A checked Python with the compiler installed; make one with `find`."""

    python: Path
    timeout: float = TIMEOUT

    @classmethod
    def find(cls, python: Path | None = None, *, timeout: float = TIMEOUT) -> Toolchain:
        """The environment of `python`, or of build/ascend-env under the working directory.

        Raises:
            ToolchainError: there is none, or its packages are not those of requirements.txt.
        """
        chosen = python or DEFAULT / "bin" / "python"
        if not chosen.is_file():
            raise ToolchainError(
                f"no environment of the Ascend compiler ({', '.join(pinned())})", where=str(chosen),
                hint=f"{INSTALL} {DEFAULT}, or name the Python of another environment",
            )  # fmt: skip
        made = cls(chosen.absolute(), timeout)
        found = made._call("lower.py", {"action": "versions"})
        wrong = [f"{n} is {found.get(n) or 'missing'}" for n, v in pinned().items() if found.get(n) != v]
        if wrong:
            raise ToolchainError(
                "; ".join(wrong), where=str(chosen),
                allowed=", ".join(f"{n} {v}" for n, v in pinned().items()),
                hint=f"{INSTALL} {DEFAULT}",
            )  # fmt: skip
        return made

    def lower(self, request: Request, directory: Path) -> Lowered:
        """Compile one kernel; the texts of all stages go to `directory`. A kernel that fails is an answer.

        Raises:
            ToolchainError: the program did not end in time or broke.
        """
        where = {"directory": str(directory.absolute())}
        answer = self._call("lower.py", request.text() | where)
        overflow = answer["overflow"]
        return Lowered(
            request, Stage[answer["stage"].upper()], answer["mode"], answer["memory"],
            {stage: Path(path) for stage, path in answer["files"].items()}, tuple(answer["notes"]),
            Overflow(**overflow) if overflow else None, answer["error"], answer["seconds"],
        )  # fmt: skip

    def tiles_that_fit(
        self, name: str, soc: str, directory: Path, *, dtype: str = "bf16", sizes: Numbers | None = None
    ) -> Choice:
        """The first of the kernel's tiles that the compiler takes for `soc`.

        Raises:
            CompileError: none fits, or one fails for another reason than a full memory.
        """
        found, tried = kernel(name), list[Lowered]()
        for index, tiles in enumerate(found.tiles):
            request = Request(found, soc, tiles, dtype, sizes or {})
            tried.append(self.lower(request, directory / f"{name}-{index}"))
            if tried[-1].overflow is None:
                tried[-1].require()
                return Choice(tiles, tuple(tried))
        tried[-1].require()
        raise AssertionError("an overflow that did not raise")

    def interpret(
        self, calls: Sequence[Mapping[str, Any]], arrays: Mapping[str, npt.NDArray[Any]]
    ) -> dict[str, npt.NDArray[Any]]:
        """Run kernels one after another in Triton's interpreter; returns all arrays as they are then.

        A call has `module`, `function`, `grid`, `constants` and `arguments`, where text names an array. BF16
        is uint16 with its bits.
        """
        with tempfile.TemporaryDirectory() as scratch:
            path, result = Path(scratch, "in.npz"), Path(scratch, "out.npz")
            np.savez(path, **arrays)  # type: ignore[arg-type, unused-ignore]
            request = {"arrays": str(path), "calls": [dict(call) for call in calls]}
            self._run("interpret.py", request | {"result": str(result)}, Path(scratch))
            with np.load(result) as stored:
                return {name: stored[name] for name in stored.files}

    def _call(self, program: str, request: dict[str, Any]) -> dict[str, Any]:
        """A program that answers in JSON."""
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch, "result.json")
            self._run(program, request | {"result": str(result)}, Path(scratch))
            answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return answer

    def _run(self, program: str, request: dict[str, Any], scratch: Path) -> None:
        """Run a program of this folder to its end; what it started dies with it when the time is over."""
        path = scratch / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        command = [str(self.python), str(HERE / program), str(path)]
        where = f"{program} of {self.python}"
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=scratch, start_new_session=True
            )
        except OSError as error:
            raise ToolchainError(f"cannot be started: {error}", where=where) from error
        try:
            said, _ = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise ToolchainError(
                f"did not end within {self.timeout:g} seconds", where=where, hint="give it a longer timeout"
            ) from None
        if process.returncode or not Path(request["result"]).is_file():
            text = said.decode(errors="replace").strip()[-2000:]
            raise ToolchainError(f"ended with status {process.returncode}: {text}", where=where)


def install(directory: Path) -> None:
    """Create the environment in `directory` with the Python that runs this, and install what is pinned.

    Raises:
        ToolchainError: there is no package for this machine or this Python, or nothing to create it with.
    """
    python, wanted = str(directory / "bin" / "python"), str(HERE / "requirements.txt")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
    except subprocess.CalledProcessError as error:
        raise ToolchainError(
            f"could not be made: {error}", where=str(directory), allowed=", ".join(pinned()),
            hint="the packages are published for Linux and CPython 3.11 was proved; delete the folder first",
        ) from error  # fmt: skip


def _print_tiles(tools: Toolchain, dtype: str) -> None:
    """One line per kernel and SoC: the tiles, and bytes of each memory."""
    with tempfile.TemporaryDirectory() as scratch:
        for soc in SOCS:
            for each in KERNELS:
                choice = tools.tiles_that_fit(each.name, soc, Path(scratch), dtype=dtype)
                last = choice.tried[-1]
                print(soc, each.name, dict(choice.tiles), last.mode, dict(last.memory), *last.notes[-1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="toolchain", description="the environment of the Ascend kernels")
    parser.add_argument("action", choices=("install", "tiles"))
    parser.add_argument("directory", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--dtype", default="bf16")
    options = parser.parse_args()
    if options.action == "install":
        install(options.directory)
    else:
        _print_tiles(Toolchain.find(options.directory / "bin" / "python"), options.dtype)


if __name__ == "__main__":
    main()
