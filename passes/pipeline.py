"""Pipelines: a list of passes that prints as a string, parses back, and runs with checks in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dsv4c.errors import Dsv4cError, PassError, VerifyError, unknown
from dsv4c.ir.graph import Module
from dsv4c.ir.lexer import Cursor
from dsv4c.ir.verify import verify

from .base import Pass
from .cleanup import EliminateDeadCode
from .table import PASSES


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: changes made, ops before and after, seconds."""

    name: str
    changes: int
    ops_before: int
    ops_after: int
    seconds: float


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """`a,b{k=v}` -> passes; the inverse of `print_pipeline`.

    Raises:
        PassError: unknown pass or option.
        ParseError: malformed text.
    """
    cursor, passes = Cursor(text, "pipeline"), []
    while cursor.peek():
        name = cursor.next()
        if name not in PASSES:
            raise unknown("pass", name, PASSES, PassError, "pipeline")
        passes.append(PASSES[name].with_options(cursor.attrs()))
        if cursor.peek():
            cursor.expect(",")
    return tuple(passes)


def print_pipeline(passes: tuple[Pass, ...]) -> str:
    return ",".join(str(p) for p in passes)


def run_pipeline(
    module: Module, passes: tuple[Pass, ...], after: Callable[[Pass, Module], None] | None = None
) -> list[PassRecord]:
    """Run passes in order, in place; the graph is verified and dead code removed after each.

    Args:
        after: called with each pass and the module it left, e.g. to dump the text.

    Raises:
        PassError: a pass does not take the module's level, or broke the graph (named, with the op).
    """
    records = []
    for p in passes:
        if module.level not in p.takes:
            allowed = ", ".join(sorted(level.value for level in p.takes))
            raise PassError(f"does not take level {module.level.value}", where=p.name, allowed=allowed)
        start, before = time.perf_counter(), len(module.ops)
        changes = p.run(module)
        module.level = p.gives or module.level
        EliminateDeadCode().run(module)
        _verify_after(p, module)
        records.append(PassRecord(str(p), changes, before, len(module.ops), time.perf_counter() - start))
        if after:
            after(p, module)
    return records


def _verify_after(p: Pass, module: Module) -> None:
    try:
        verify(module)
    except VerifyError as error:
        raise PassError(f"left a broken graph: {error}", where=p.name) from error
    except Dsv4cError as error:
        raise PassError(f"left ops that do not type-check: {error}", where=p.name) from error
