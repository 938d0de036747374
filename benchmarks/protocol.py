"""How the benchmark talks to its workers: `prefill N` or `decode N` in, one JSON line out.

Workers load once and then measure in turn, so that every program meets the same moods of the machine.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(prefill: Callable[[int], None], decode: Callable[[int], None]) -> None:
    """Run commands from standard input until it closes. Seconds are wall clock; memory is peak resident."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        what, count = line.split()
        start = time.perf_counter()
        {"prefill": prefill, "decode": decode}[what](int(count))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "tokens": int(count), "peak_bytes": peak}), flush=True)


class Worker:
    """A program under measurement, in a process of its own."""

    def __init__(self, name: str, script: str, *arguments: str) -> None:
        self.name = name
        path = Path(__file__).with_name(script)
        self._process = subprocess.Popen(
            [sys.executable, str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def measure(self, what: str, count: int) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
