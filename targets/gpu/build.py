"""Objects of kernels: from the cache where it has them, else from the compiler, and what is wrong with them.

Calls `compiler` in processes of its own. The key of an object covers the text of all kernels, what is
compiled into it, the architecture and the version of Triton; so a cache is never stale, and may be deleted at
any time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv4c.errors import CompileError, ToolchainError
from dsv4c.runtime.container.plan import Kernel

from .arch import Gpu
from .occupancy import occupancy
from .table import source

KERNELS = Path(__file__).parent / "kernels"
TIMEOUT = 1200
"""Seconds for one process; a kernel takes about one."""


def default_cache() -> Path:
    """Where objects are kept: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4c" / "gpu"


@dataclass(frozen=True)
class Built:
    """Kernels with their entries, sizes and facts, and their objects one behind the other."""

    kernels: tuple[Kernel, ...]
    code: bytes
    toolkit: int
    compiled: int
    """How many were not in the cache."""


def build(
    kernels: Sequence[Kernel], gpu: Gpu, cache: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Built:  # fmt: skip
    """Every kernel as an object for one GPU.

    Raises:
        ToolchainError: Triton is missing, or a compiler process was killed.
        CompileError: a kernel does not compile or does not fit, or a hot one spills or leaves the matrix
        units.
    """
    version = triton_version()
    directory = (cache or default_cache()) / gpu.name
    directory.mkdir(parents=True, exist_ok=True)
    text = b"".join(p.name.encode() + p.read_bytes() for p in sorted(KERNELS.glob("*.py")))
    base = hashlib.sha256(text + f"{version} {gpu}".encode()).hexdigest()
    chosen, compiled = _choose(list(kernels), gpu, directory, base, progress or _quiet)
    out, code, toolkit = [], bytearray(), 0
    for kernel in chosen:
        made, blob = _finished(kernel, gpu, directory, _key(base, kernel))
        toolkit = max(toolkit, int(made.facts.get("toolkit", 0)))
        out.append(replace(made, offset=len(code), nbytes=len(blob)))
        code += blob + bytes(-len(blob) % 16)
    return Built(tuple(out), bytes(code), toolkit, compiled)


def _quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def _choose(
    kernels: list[Kernel], gpu: Gpu, directory: Path, base: str, progress: Callable[[str, int, int], None]
) -> tuple[list[Kernel], int]:
    """Every kernel in the first of its variants whose object does not spill, and how many were compiled.

    What no variant saves stays as it was; `_finished` complains.
    """
    variants = [_variants(kernel, gpu) for kernel in kernels]
    chosen, compiled, left = list(kernels), 0, list(range(len(kernels)))
    for attempt in range(max(len(v) for v in variants) if variants else 0):
        tried = {_key(base, variants[i][attempt]): variants[i][attempt] for i in left}
        missing = {key: k for key, k in tried.items() if not (directory / f"{key}.json").is_file()}
        progress("kernels", len(kernels) - len(missing), len(kernels))
        if missing:
            _compile(missing, gpu, directory)
        compiled += len(missing)
        spilling = {key for key in tried if _spills(directory / f"{key}.json")}
        for i in left:
            if _key(base, variants[i][attempt]) not in spilling:
                chosen[i] = variants[i][attempt]
        left = [
            i for i in left
            if _key(base, variants[i][attempt]) in spilling and len(variants[i]) > attempt + 1
        ]  # fmt: skip
        if not left:
            break
    progress("kernels", len(kernels), len(kernels))
    return chosen, compiled


def _variants(kernel: Kernel, gpu: Gpu) -> list[Kernel]:
    """What may be tried where a hot kernel spills: the same grid with other registers per thread."""
    out = [kernel]
    if source(kernel.name).hot:
        out += [replace(kernel, stages=1)] if kernel.stages > 1 else []
        other = (kernel.warps // 2, 2 * kernel.warps)
        out += [replace(kernel, warps=n) for n in other if 1 <= n <= 1024 // gpu.warp]
    return out


def _spills(path: Path) -> bool:
    """Whether an object in the cache spills registers; what did not compile does not count."""
    facts = json.loads(path.read_text(encoding="utf-8")).get("facts")
    return bool(facts and facts["spilled"])


def triton_version() -> str:
    """Of the installed Triton.

    Raises:
        ToolchainError: there is none.
    """
    try:
        if importlib.util.find_spec("triton") is not None:
            return importlib.metadata.version("triton")
    except (ImportError, ValueError):
        pass
    raise ToolchainError(
        "the package triton is missing",
        where="GPU kernels",
        hint='pip install "dsv4c[gpu]", or pip install triton',
    )


def _key(base: str, kernel: Kernel) -> str:
    facts = json.dumps([base, *_request(kernel, "").items()], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _request(kernel: Kernel, key: str) -> dict[str, Any]:
    """What `compiler` reads of a kernel."""
    return {
        "key": key, "module": kernel.module, "name": kernel.name, "constants": kernel.constants,
        "types": {p.name: p.type for p in kernel.parameters},
        "divisible": [p.name for p in kernel.parameters if p.divisible], "warps": kernel.warps,
        "stages": kernel.stages, "matrix": source(kernel.name).matrix,
    }  # fmt: skip


def _compile(missing: dict[str, Kernel], gpu: Gpu, directory: Path) -> None:
    """Fill the cache, by a process per core; kernels with matrix products take longest and are dealt out
    first.
    """
    cores = min(len(os.sched_getaffinity(0)), len(missing))
    ordered = sorted(missing, key=lambda key: (not source(missing[key].name).matrix, key))
    with tempfile.TemporaryDirectory(prefix="dsv4c-gpu-") as scratch:
        parts = [{key: missing[key] for key in ordered[i::cores]} for i in range(cores)]
        running = [_start(part, gpu, directory, Path(scratch) / str(i)) for i, part in enumerate(parts)]
        for process, part in zip(running, parts, strict=True):
            _wait(process, part, directory)


def _start(kernels: dict[str, Kernel], gpu: Gpu, directory: Path, scratch: Path) -> subprocess.Popen[str]:
    """A compiler process for some kernels; Triton's own cache is thrown away with `scratch`."""
    scratch.mkdir()
    request = scratch / "request.json"
    asked = {
        "target": [gpu.vendor, gpu.compiler, gpu.warp], "matrix": gpu.matrix, "directory": str(directory),
        "kernels": [_request(k, key) for key, k in kernels.items()],
    }  # fmt: skip
    request.write_text(json.dumps(asked), encoding="utf-8")
    environment = {n: v for n, v in os.environ.items() if not n.startswith("TRITON_")} | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_CACHE_DIR": str(scratch / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "dsv4c.targets.gpu.compiler", str(request)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _wait(process: subprocess.Popen[str], kernels: dict[str, Kernel], directory: Path) -> None:
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    left = [kernel.name for key, kernel in kernels.items() if not (directory / f"{key}.json").is_file()]
    if left:
        raise ToolchainError(
            f"the compiler ended with {process.returncode}: {said[-1500:].strip()}",
            where=f"kernel {left[0]}",
            hint="a kernel that crashes the compiler may pass with other tiles (targets/gpu/tiles.py)",
        )  # fmt: skip


def _finished(kernel: Kernel, gpu: Gpu, directory: Path, key: str) -> tuple[Kernel, bytes]:
    """A kernel as the cache has it; what must not be shipped is an error."""
    path = directory / f"{key}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    where = f"{kernel.name} on {gpu.name}, {kernel.constants}"
    if "error" in result:
        path.unlink()
        raise CompileError(
            result["error"], where=where, hint="the kernels' sizes come from targets/gpu/tiles.py"
        )
    facts = result["facts"]
    made = replace(
        kernel, entry=result["entry"], shared=result["shared"], warps=result["warps"], warp=result["warp"],
        facts=facts | {"occupancy": occupancy(gpu, facts, result["shared"], result["warps"])},
    )  # fmt: skip
    complain(made, gpu, where)
    return made, (directory / f"{key}.bin").read_bytes()


def complain(kernel: Kernel, gpu: Gpu, where: str) -> None:
    """CompileError where a kernel does not fit, or a hot one spills or does without the matrix units."""
    declared, facts = source(kernel.name), kernel.facts
    if kernel.shared > gpu.shared:
        raise CompileError(
            f"it needs {kernel.shared} bytes of shared memory", where=where, allowed=f"{gpu.shared} at most",
            hint="choose smaller tiles or fewer stages in targets/gpu/tiles.py",
        )  # fmt: skip
    if declared.hot and facts["spilled"]:
        raise CompileError(
            f"it spills {facts['spilled']} bytes of registers", where=where, allowed="none in a hot kernel",
            hint="choose smaller tiles or more warps in targets/gpu/tiles.py",
        )  # fmt: skip
    if declared.matrix and not facts["matrix"]:
        raise CompileError(
            "its code has no matrix instruction", where=where, allowed=", ".join(gpu.matrix),
            hint="see that its products have at least 16 rows, columns and terms",
        )  # fmt: skip
