"""Finding and running a linker: the host's C compiler, or the ziglang wheel when there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv4c.errors import ToolchainError


@dataclass(frozen=True)
class Linker:
    """Links object files into a shared object; TVM calls it as its `fcompile`.

    Attributes:
        command: the compiler driver and its fixed arguments.
    """

    command: tuple[str, ...]

    def __call__(self, output: str, files: Sequence[str], options: Sequence[str] = (), **_: object) -> None:
        """Link `files` into `output`.

        Raises:
            ToolchainError: the linker fails; carries what it printed.
        """
        arguments = [*self.command, "-shared", "-fPIC", "-o", output, *files, *options]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolchainError(f"linking failed: {done.stderr.strip()}", where=self.command[0])


def find_linker(triple: str | None = None, find: Callable[[str], str | None] = shutil.which) -> Linker:
    """The linker for this host, or for `triple` when cross-compiling (which takes zig).

    Raises:
        ToolchainError: nothing that links was found; names what to install.
    """
    candidates = () if triple else (os.environ.get("CC", ""), "cc", "gcc", "clang")
    for name in candidates:
        if name and find(name):
            return Linker((name,))
    if importlib.util.find_spec("ziglang") is not None:
        target = ("-target", triple) if triple else ()
        return Linker((sys.executable, "-m", "ziglang", "cc", *target))
    raise ToolchainError(
        "no linker found",
        allowed="the ziglang package" if triple else "cc, gcc or clang on PATH, or the ziglang package",
        hint='pip install "dsv4c[link]"',
    )
