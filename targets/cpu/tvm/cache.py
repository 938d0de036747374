"""Compiled code on disk, by what it was compiled from: models of equal shapes have one code.

A key covers the text and the structure of all functions, the processor, the linker and the version of TVM. So
an entry is never stale, and the folder may be deleted at any time. It stays within a size: entries that were
not asked for the longest go.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from .link import Linker

_DIGEST = 32
"""Bytes in front of the code: its SHA-256."""
LIMIT = 1 << 30
"""Bytes of all entries, beyond which the oldest go."""


def default_cache() -> Path:
    """Where code is kept: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4c" / "cpu"


def key_of(relax_module: Any, cpu: Mapping[str, Any], link: Linker) -> str:
    """What the code of a module depends on, as hexadecimal digits; the same in every process.

    Args:
        cpu: attributes of the LLVM target.
    """
    around = [tvm.__version__, platform.system(), platform.machine(), dict(cpu), link.command]
    # the text leaves out what constants hold, the structure has it
    found = [json.dumps(around), hex(tvm_ffi.structural_hash(relax_module)), relax_module.script()]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def kept(key: str, make: Callable[[], bytes], folder: Path | None = None) -> bytes:
    """The code of that key, from the cache or made and put there.

    An entry that is damaged counts as absent. Where nothing can be written, nothing is kept.
    """
    path = (folder or default_cache()) / f"{key}.so"
    with suppress(OSError):
        held = path.read_bytes()
        if hashlib.sha256(held[_DIGEST:]).digest() == held[:_DIGEST]:
            with suppress(OSError):
                os.utime(path)  # the last time that it was asked for
            return held[_DIGEST:]
    code = make()
    with suppress(OSError):
        _write(path, hashlib.sha256(code).digest() + code)
        _trim(path)
    return code


def _trim(newest: Path) -> None:
    """Delete the oldest entries beside the newest one, until all are within `LIMIT`."""
    entries = sorted((e.stat().st_mtime_ns, e.stat().st_size, e) for e in newest.parent.glob("*.so"))
    size = sum(nbytes for _, nbytes, _ in entries)
    for _, nbytes, entry in entries:
        if size > LIMIT and entry != newest:
            entry.unlink(missing_ok=True)
            size -= nbytes


def _write(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
