"""The memory that a process holds for itself: resident pages that are no mapped file."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

PERIOD = 0.02
"""Seconds between two looks."""


def resident(kind: str) -> int:
    """Bytes of this process: `kind` is "RssAnon" (its own) or "RssFile" (mapped files)."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class PeakMemory:
    """While it is entered, a thread keeps the largest `RssAnon` in `own_bytes`."""

    def __init__(self) -> None:
        self.own_bytes = resident("RssAnon")
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(PERIOD):
            self.own_bytes = max(self.own_bytes, resident("RssAnon"))

    def __enter__(self) -> PeakMemory:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._watcher.join()
        self.own_bytes = max(self.own_bytes, resident("RssAnon"))
