"""How results look: aligned tables, sizes and rates for people, JSON for programs. Knows no command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = (), right: Iterable[int] = ()) -> str:
    """Columns two spaces apart; `right` names those that are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    flush = set(right)
    lines = (
        "  ".join(
            c.rjust(w) if i in flush else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def section(title: str, body: str) -> str:
    """A titled block to append, indented; nothing when there is nothing to say."""
    return f"\n\n{title}\n" + "\n".join(f"  {line}" for line in body.splitlines()) if body else ""


def size(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.4g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def amount(count: int) -> str:
    """A count for people: 284.3 B is billions."""
    value = float(count)
    for unit in ("", " K", " M", " B", " T"):
        if value < 1000 or unit == " T":
            break
        value /= 1000
    return f"{value:.4g}{unit}"


def rate(tokens: int, seconds: float) -> float:
    """Tokens per second; 0 when there was nothing to time."""
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


def as_json(value: Any) -> str:
    """Strict JSON, indented; numbers that JSON lacks (infinite, NaN) become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {str(k): _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case _:
            return value
