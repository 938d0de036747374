"""Progress bars: only on a terminal, and only for what takes longer than two seconds."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

PATIENCE = 2.0
"""Seconds of silence before a bar appears."""


class Bars:
    """A context manager and a callable `(what, done, total)`; one bar per `what`, gone when it is done."""

    def __init__(self, wanted: bool = True) -> None:
        self._make = _tqdm() if wanted and sys.stderr.isatty() else None
        self._bar: Any = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._make is None:
            return
        if what != self._what or self._bar is None:
            self._close()
            self._bar = self._make(desc=what, total=total, leave=False, file=sys.stderr, **_style(total))
            self._what = what
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close()

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _style(total: int) -> dict[str, Any]:
    """A step without parts reports only its two ends: it is named at once, and no bar could move."""
    return {"unit_scale": True, "delay": PATIENCE} if total > 1 else {"bar_format": "{desc} ..."}


def _tqdm() -> Any:
    """The bar's class; None where tqdm is not installed: bars are a comfort, not a need."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
