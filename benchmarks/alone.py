"""What is measured artifact by artifact, after the rounds: long prompts, the first token, memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from protocol import Worker, token_ids

from dsv4c.runtime import Artifact

SHORT, LONG = 512, 16384
"""Tokens of the prompts whose times per token are compared."""
FIRST = 32
"""Tokens of the prompt behind which the first token is awaited."""
STARTS = 5
CONTEXT = 1024

Facts = dict[str, Any]


def measure_all(artifacts: Mapping[str, Facts], long: Sequence[str], threads: int) -> dict[str, list[Facts]]:
    """Sections of the report, see `goals`; `long` names the artifacts that read a long prompt."""
    first = [first_token(name, a["path"], threads) for name, a in artifacts.items()]
    memory = [session_memory(name, a["path"], threads) for name, a in artifacts.items()]
    wanted = [name for name in long if name in artifacts]
    prompts = [long_prompt(name, artifacts[name]["path"], threads) for name in wanted]
    return {"first_token": first, "memory": memory, "long": prompts}


def first_token(name: str, path: str, threads: int) -> Facts:
    """Median seconds from the start of `dsv4c run` to the first byte it writes, with the file in memory."""
    vocab = int(Artifact.open(path).meta["model"]["vocab_size"])
    ids = ",".join(str(i) for i in token_ids(FIRST, vocab))
    command = ["-m", "dsv4c", "run", path, "--ids", ids, "--max-new-tokens", "2", "--threads", str(threads)]
    found = []
    for _ in range(1 + STARTS):
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        assert process.stdout
        first = process.stdout.read(1)
        found.append(time.perf_counter() - start)
        process.stdout.read()
        if process.wait() or not first:
            raise SystemExit(f"dsv4c run {path} failed")
    return {"name": name, "tokens": FIRST, "seconds": statistics.median(found[1:]), "rounds": found[1:]}


def session_memory(name: str, path: str, threads: int) -> Facts:
    """What `memory` of `worker_dsv4c` says of a fresh process."""
    worker = Worker(name, "worker_dsv4c.py", path, str(threads), str(CONTEXT))
    found = worker.measure("memory", SHORT)
    worker.close()
    return {"name": name, **{key: value for key, value in found.items() if key.endswith("_bytes")}}


def long_prompt(name: str, path: str, threads: int) -> Facts:
    """Seconds per token of a long prompt, and of short ones before and after it."""
    worker = Worker(name, "worker_dsv4c.py", path, str(threads), str(LONG))
    worker.measure("prefill", SHORT)
    seconds = [worker.measure("prefill", n)["seconds"] / n for n in (SHORT, SHORT, LONG, SHORT, SHORT)]
    worker.close()
    short = statistics.median(seconds[:2] + seconds[3:])
    return {"name": name, "tokens": LONG, "long": seconds[2], "short": short, "rounds": seconds}
