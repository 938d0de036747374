"""How the benchmark talks to its workers: `COMMAND N` in, one JSON line out.

Workers load once and then measure in turn, so that every program meets the same moods of the machine. All
of them read the same token ids.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Result = dict[str, Any]
Command = Callable[[int], Result | None]


def token_ids(count: int, vocab: int, row: int = 0) -> list[int]:
    """`count` ids of 2..vocab-1, the same in every program; rows differ."""
    return [int(i) for i in np.random.default_rng(7 + row).integers(2, vocab, count)]


def serve(commands: Mapping[str, Command]) -> None:
    """Run commands from standard input until it closes.

    Each answer holds wall-clock `seconds`, the peak of resident memory, the page faults that had to read a
    file, and what the command itself returns.
    """
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        what, count = line.split()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        start = time.perf_counter()
        found = commands[what](int(count)) or {}
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_SELF)
        answer = {
            "seconds": seconds, "tokens": int(count), "peak_bytes": usage.ru_maxrss * 1024,
            "major_faults": usage.ru_majflt - faults, **found,
        }  # fmt: skip
        print(json.dumps(answer), flush=True)


def packed_logits(logits: npt.NDArray[np.float32]) -> Result:
    """Logits [vocab] as a command returns them; see `unpacked_logits`."""
    return {"logits": base64.b64encode(np.asarray(logits, np.float32).tobytes()).decode()}


def unpacked_logits(answer: Result) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(answer["logits"]), np.float32)


class Worker:
    """A program under measurement, in a process of its own.

    Args:
        script: a file of this folder.
        python: the interpreter of another environment.
        threads: of BLAS and OpenMP, which read them from the environment; None leaves it as it is.
    """

    def __init__(
        self, name: str, script: str, *arguments: str,
        python: str = sys.executable, threads: int | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        path = Path(__file__).with_name(script)
        count = {} if threads is None else dict.fromkeys(THREADS, str(threads))
        self._process = subprocess.Popen(
            [python, str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **count},
        )  # fmt: skip
        self._read()

    def measure(self, what: str, count: int) -> Result:
        assert self._process.stdin
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Result:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
