"""The C++ compiler of this machine, which the emulation is built with; knows nothing of kernels."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv4c.errors import ToolchainError

# C++11 is what cncc is told to take; -ffp-contract=off so that sums do not depend on the host having FMA.
FLAGS = ("-std=c++11", "-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-sanitize=undefined", "-w")


def find_compiler(find: Callable[[str], str | None] = shutil.which) -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, c++, g++, clang++, or the ziglang wheel.

    Raises:
        ToolchainError: there is none; names what to install.
    """
    for words in (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if words and find(words[0]):
            return tuple(words)
    if importlib.util.find_spec("ziglang") is not None:
        return sys.executable, "-m", "ziglang", "c++"
    raise ToolchainError(
        "no C++ compiler found",
        allowed="$CXX, c++, g++ or clang++ on PATH, or the ziglang package",
        hint='pip install "dsv4c[link]"',
    )


def compile_shared(source: Path, output: Path, options: Sequence[str], kind: str = "-shared") -> None:
    """Compile one C++ source into a shared object, or with `kind=""` into a program.

    The output appears whole or not at all, so that several processes may build the same file.

    Raises:
        ToolchainError: there is no compiler, or it refuses the source; carries what it printed.
    """
    command = find_compiler()
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    fixed = [*FLAGS, *([kind, "-fPIC", "-fvisibility=hidden"] if kind else [])]
    line = [*command, *fixed, *options, str(source), "-o", str(partial), "-lm"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolchainError(f"compiling failed: {done.stderr.strip()}", where=source.name)
    partial.replace(output)
