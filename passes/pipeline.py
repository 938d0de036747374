"""Pipelines: a list of passes that prints as a string, parses back, and runs with checks in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from dsv4c.errors import Dsv4cError, PassError, UsageError, unknown
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.lexer import Cursor
from dsv4c.ir.text import around
from dsv4c.ir.verify import verify

from .base import Pass
from .cleanup import EliminateDeadCode
from .table import PASSES

Pipeline = tuple[Pass, ...]


class Check(Protocol):
    """Looks at a module around every pass; see `ResultCheck`."""

    def before(self, p: Pass, module: Module) -> None: ...

    def after(self, p: Pass, module: Module) -> dict[str, float]: ...


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: changes made, ops before and after, seconds.

    Attributes:
        changed: output or state -> its largest change relative to its range; empty unless it was checked.
        measure: for a pass that is meant to change results, how that is measured.
    """

    name: str
    changes: int
    ops_before: int
    ops_after: int
    seconds: float
    changed: Mapping[str, float] = field(default_factory=dict)
    measure: str = ""


# -------------------------------------------------------------------------------------- text


def parse_pipeline(
    text: str, known: Mapping[str, type[Pass]] = PASSES, default: str | Pipeline = ()
) -> Pipeline:
    """`a,b{k=v}` -> passes; the inverse of `print_pipeline`.

    The word `default` stands for the pipeline of that name, and these edit what stands before them:
    `without(a)`, `with(a{k=v})` (other options), `before(a, b{k=v})` and `after(a, b{k=v})`. A text of
    edits alone edits the default.

    Args:
        known: the passes that may be named.
        default: what `default` stands for.

    Raises:
        PassError: unknown pass or option; an edit of a pass that is not there.
        ParseError: malformed text.
    """
    cursor, passes, first = Cursor(text, "pipeline"), list[Pass](), True
    base = parse_pipeline(default, known) if isinstance(default, str) else default
    while cursor.peek():
        word = cursor.next()
        if word == "default":
            passes += base
        elif word in _EDITS and cursor.peek() == "(":
            if first:
                passes += base
            _edit(word, cursor, passes, known)
        else:
            passes.append(_one(word, cursor, known))
        first = False
        if cursor.peek():
            cursor.expect(",")
    return tuple(passes)


_EDITS = ("without", "with", "before", "after")


def _one(name: str, cursor: Cursor, known: Mapping[str, type[Pass]]) -> Pass:
    if name not in known:
        raise unknown("pass", name, known, PassError, "pipeline")
    return known[name].with_options(cursor.attrs())


def _edit(word: str, cursor: Cursor, passes: list[Pass], known: Mapping[str, type[Pass]]) -> None:
    cursor.expect("(")
    name = cursor.next()
    at = [i for i, p in enumerate(passes) if p.name == name]
    if not at:
        there = [p.name for p in passes] or ["none"]
        raise unknown("pass", name, there, PassError, f"pipeline, {word}({name})")
    match word:
        case "without":
            passes[:] = [p for p in passes if p.name != name]
        case "with":
            passes[at[0]] = _one(name, cursor, known)
        case _:
            cursor.expect(",")
            place = at[0] if word == "before" else at[-1] + 1
            passes.insert(place, _one(cursor.next(), cursor, known))
    cursor.expect(")")


def print_pipeline(passes: Pipeline) -> str:
    return ",".join(str(p) for p in passes)


def over_devices(pipeline: Sequence[Pass], devices: int | None) -> tuple[Pass, ...]:
    """The pipeline with the pass that cuts a model told to cut it over so many devices; None changes nothing.

    Raises:
        UsageError: no pass of the pipeline cuts a model.
    """
    if devices is None:
        return tuple(pipeline)
    if not any(p.spreads for p in pipeline):
        able = ", ".join(name for name, p in sorted(PASSES.items()) if p.spreads)
        raise UsageError(
            f"{devices} devices for a pipeline that cuts no model", where="compile",
            allowed=f"a pipeline with one of {able}", hint="cuda, rocm, ascend and mlu have one",
        )  # fmt: skip
    return tuple(replace(p, **{p.spreads: devices}) if p.spreads else p for p in pipeline)


# ----------------------------------------------------------------------------------- running


def run_pipeline(
    module: Module,
    passes: Pipeline,
    after: Callable[[Pass, Module], None] | None = None,
    check: Check | None = None,
) -> list[PassRecord]:
    """Run passes in order, in place; the graph is verified and dead code removed after each.

    Args:
        after: called with each pass and the module it left, e.g. to dump the text.
        check: asked around each pass whether results are what the pass promises.

    Raises:
        PassError: a pass does not take the module's level, raised, broke the graph, or changed results that
            it promised to keep; with the pass, the op, and the IR around it.
    """
    records = []
    for p in passes:
        if module.level not in p.takes:
            allowed = ", ".join(sorted(level.value for level in p.takes))
            raise PassError(f"does not take level {module.level.value}", where=p.name, allowed=allowed)
        if check:
            check.before(p, module)
        start, before = time.perf_counter(), len(module.ops)
        changes = _run(p, module)
        module.level = p.gives or module.level
        _verify_after(p, module)
        seconds = time.perf_counter() - start
        changed = check.after(p, module) if check else {}
        records.append(
            PassRecord(
                str(p), changes, before, len(module.ops), seconds, changed,
                p.effect().measure if p.effect().changes else "",
            )
        )  # fmt: skip
        if after:
            after(p, module)
    return records


def _run(p: Pass, module: Module) -> int:
    """`p.run`, with whatever a pass from anywhere may do wrong turned into an error that names it."""
    try:
        changes = p.run(module)
    except Dsv4cError as error:
        if isinstance(error, PassError):
            raise
        raise _raised(p, module, error, error.__traceback__) from error
    except Exception as error:
        raise _raised(p, module, error, error.__traceback__) from error
    if isinstance(changes, bool) or not isinstance(changes, int):
        raise PassError(
            f"run returned {changes!r}", where=p.name, allowed="how many places it changed, an int"
        )
    return changes


def _raised(p: Pass, module: Module, error: Exception, trace: TracebackType | None) -> PassError:
    """The last op that a frame held when it raised says where in the graph it was."""
    op, line, ops, own = None, 0, set(module.ops), type(p).run.__code__.co_filename
    while trace is not None:
        frame, number = trace.tb_frame, trace.tb_lineno
        held = [v for v in frame.f_locals.values() if isinstance(v, Op) and v in ops]
        op, trace = (held[-1] if held else op), trace.tb_next
        line = number if frame.f_code.co_filename == own else line
    at = f" at {op.name} @{op.loc}" if op is not None else ""
    shown = f"; the graph around it:\n{around(module, op)}" if op is not None else ""
    return PassError(
        f"raised {type(error).__name__}{at}: {error}",
        where=p.name,
        hint=f"raised below line {line} of {Path(own).name}{shown}",
    )


def _verify_after(p: Pass, module: Module) -> None:
    try:
        EliminateDeadCode().run(module)
        verify(module)
    except Exception as error:
        what = str(error) if isinstance(error, Dsv4cError) else f"{type(error).__name__}: {error}"
        op = getattr(error, "op", None)
        raise PassError(
            f"left a broken graph: {what}", where=p.name,
            hint=f"the graph around it:\n{around(module, op)}" if isinstance(op, Op) else "",
        ) from error  # fmt: skip
