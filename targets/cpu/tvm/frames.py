"""Quick answers for TVMScript's parser, which asks who called it once a kernel and once a macro.

`inspect` finds the module of every frame by a walk over all modules there are, and reads the disk for its
source: a fifth of the time that a model takes to compile, more where much is imported. What the parser reads
of a frame needs neither. Knows nothing of kernels.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import sys
from types import FrameType, ModuleType
from typing import Any

ASKING = ("tvm.script.parser.core.parser", "tvm.tirx.script.parser.entry")
"""The modules that ask."""


def outer_frames(frame: FrameType | None, context: int = 1) -> list[inspect.FrameInfo]:
    """A frame and all that wait for it, like `inspect.getouterframes`; of the source the line at most."""
    found = []
    while frame is not None:
        code, number = frame.f_code, frame.f_lineno
        line = linecache.getline(code.co_filename, number, frame.f_globals) if context else ""
        known = ([line], 0) if line else (None, None)
        found.append(inspect.FrameInfo(frame, code.co_filename, number, code.co_name, *known))
        frame = frame.f_back
    return found


class QuickInspect(ModuleType):
    """The module `inspect` but for the walk over the stack."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    @staticmethod
    def getouterframes(frame: FrameType, context: int = 1) -> list[inspect.FrameInfo]:
        return outer_frames(frame, context)

    @staticmethod
    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        """From the caller outwards."""
        return outer_frames(sys._getframe(1), context)


def install() -> None:
    """Let the parser ask here; what it does not find, it would ask `inspect` for."""
    for name in ASKING:
        importlib.import_module(name).inspect = QuickInspect("inspect")  # type: ignore[attr-defined]
