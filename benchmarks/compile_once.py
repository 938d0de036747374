"""Compiles one checkpoint; prints, as JSON, the peak of the process's own memory, mapped files left out."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path

import dsv4c


def own_bytes() -> int:
    """Anonymous resident memory of this process."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def main() -> None:
    checkpoint, output, name = sys.argv[1:4]
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own_bytes())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    format_, _, storage = name.partition("-")
    passes = None
    if storage == "f32" and format_ == "tvm":
        passes = (
            "merge_common_subexpressions,fuse_swiglu,fuse_index_select,fuse_expert_gemms,"
            + 'narrow_weights{storage="f32"}'
        )
    try:
        dsv4c.compile(checkpoint, output=output, format=format_, passes=passes)
    finally:
        done.set()
        watcher.join()
    print(json.dumps({"peak_own_bytes": peak[0]}))


if __name__ == "__main__":
    main()
