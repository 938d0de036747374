"""dsv4c: a compiler for DeepSeek-V4 models.

The names of the public API are imported when first used, so that the runtime does not pay for the
compiler and works where the compiler is not installed.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dsv4c.api import compile, evaluate, export, load_checkpoint
    from dsv4c.runtime import Artifact, SamplingParams, Session

__all__ = ["Artifact", "SamplingParams", "Session", "compile", "evaluate", "export", "load_checkpoint"]

_HOME = {
    "compile": "dsv4c.api", "evaluate": "dsv4c.api", "export": "dsv4c.api", "load_checkpoint": "dsv4c.api",
    "Artifact": "dsv4c.runtime", "SamplingParams": "dsv4c.runtime", "Session": "dsv4c.runtime",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4c' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
