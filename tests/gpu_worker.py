"""A process that runs launch plans in Triton's interpreter, for tests: requests come pickled, one after
another.

A request is (path of an artifact, [(inputs, states)], name of a part or ""); the answer is [(outputs,
states)], or the text of an error. Triton is imported with its interpreter on, which cannot be undone in a
process; hence this one.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

from dsv4c.runtime.container import Artifact
from dsv4c.runtime.gpu_backend import GpuBackend, read_plan
from dsv4c.targets.gpu.interpret import InterpreterDevice  # switches the interpreter on


def answer(path: str, calls: list[tuple[dict[str, Any], dict[str, Any]]], part: str) -> list[Any]:
    """Every call on one backend, states updated in place; those of calls that share one stay on the devices
    between them.
    """
    artifact = Artifact.open(path)
    devices = [InterpreterDevice() for _ in read_plan(artifact).stages]
    backend, out = GpuBackend(artifact, devices, check=True, resident=True), []
    for number, (inputs, state) in enumerate(calls, 1):
        found = backend.call_part(part, list(inputs.values())) if part else backend.call(inputs, state)
        if number == len(calls) or calls[number][1] is not state:
            backend.bring()
        out.append((found, state))
    return out


def main() -> None:
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print must not get between the answers
    while True:
        try:
            path, calls, part = pickle.load(source)
        except EOFError:
            return
        try:
            found: Any = answer(path, calls, part)
        except Exception:
            found = traceback.format_exc()
        pickle.dump(found, sink)
        sink.flush()


if __name__ == "__main__":
    main()
