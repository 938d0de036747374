"""Compiles one checkpoint; prints, as JSON, seconds, the peak of own memory, and what a token costs.

    python benchmarks/compile_once.py CHECKPOINT OUTPUT FORMAT NUMERICS [PASSES]

Costs are those of the artifact's own report: bytes of weights in their stored formats that a token reads, and
multiplications and additions of a prompt of 512 tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from own_memory import PeakMemory

import dsv4c
from dsv4c.runtime import Artifact


def main() -> None:
    checkpoint, output, format_, numerics, *passes = sys.argv[1:]
    started = time.perf_counter()
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as nothing:
        os.environ["XDG_CACHE_HOME"] = nothing  # code is compiled, not found
        dsv4c.compile(
            checkpoint, output=output, format=format_, numerics=numerics, passes=passes[0] if passes else None
        )
    seconds = time.perf_counter() - started
    cost = Artifact.open(output).meta["report"]["cost"]
    facts = {
        "path": output,
        "bytes": Path(output).stat().st_size,
        "seconds": seconds,
        "peak_own_bytes": memory.own_bytes,
        "token_bytes": sum(op["weight_bytes"] for op in cost["decode"]["ops"].values()),
        "prompt_tokens": cost["prefill"]["tokens"],
        "prompt_flops": sum(op["flops"] for op in cost["prefill"]["ops"].values()),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
