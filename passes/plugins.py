"""Passes from outside: files named on the command line, and entry points of installed packages.

Owns how such files and entries are imported, whatever they bring, what makes a stranger's class acceptable,
and the errors where it is not. Knows no particular pass.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv4c.errors import Dsv4cError, PassError

from .base import Pass
from .table import PASSES

GROUP = "dsv4c.passes"
"""The entry point group; an entry is a `Pass` class or a module that defines some."""


def known_passes(
    plugins: Sequence[str | os.PathLike[str]] = (), required: bool = True
) -> dict[str, type[Pass]]:
    """The passes of the project, of installed packages, and of the given files, by name.

    Args:
        required: whether a file without a pass is an error; not where it may bring something else.

    Raises:
        PassError: a file or entry cannot be imported, holds no pass, holds one that is not a frozen
            dataclass with `name` and `doc`, or uses a name that is taken.
    """
    found = dict(PASSES)
    for origin, loaded in entries(GROUP, PassError):
        _add(found, [loaded] if isinstance(loaded, type) else _required(loaded, origin), origin)
    for path in plugins:
        module = load_plugin(path, PassError)
        _add(found, _required(module, str(path)) if required else passes_in(module), str(path))
    return found


def entries(group: str, error: type[Dsv4cError]) -> Iterator[tuple[str, Any]]:
    """What installed packages offer in an entry point group, each with its origin in words.

    Raises:
        error: an entry cannot be imported.
    """
    for entry in importlib.metadata.entry_points(group=group):
        origin = f"entry point {entry.name} = {entry.value}"
        try:
            loaded = entry.load()
        except Exception as raised:
            raise _failed(origin, raised, error) from raised
        yield origin, loaded


def load_plugin(path: str | os.PathLike[str], error: type[Dsv4cError]) -> ModuleType:
    """The module in a file; imported once as long as the file stays the same, so that its values do too.

    Raises:
        error: there is no such file, it is not Python, or it raises.
    """
    file = Path(path)
    if not file.is_file():
        raise error("no such file", where=str(path), allowed="a Python file that defines passes or targets")
    if file.suffix != ".py":
        raise error("is no Python file", where=str(path), allowed="*.py")
    facts = file.stat()
    try:
        return _executed(file.resolve(), facts.st_mtime_ns, facts.st_size)
    except (Dsv4cError, KeyboardInterrupt):
        raise
    except BaseException as raised:  # a plugin that calls sys.exit must not end the compiler
        raise _failed(str(path), raised, error) from raised


@cache
def _executed(path: Path, changed: int, size: int) -> ModuleType:
    """The module of a file; `changed` and `size` tell one state of it from the next."""
    name = "dsv4c_plugin_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look annotations up that are text
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failed(origin: str, raised: BaseException, error: type[Dsv4cError]) -> Dsv4cError:
    line = ""
    trace = raised.__traceback__
    while trace is not None:
        line, trace = (
            f"line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name}",
            trace.tb_next,
        )
    return error(
        f"cannot be imported: {type(raised).__name__}: {raised}", where=origin, hint=f"raised at {line}"
    )


def passes_in(module: ModuleType) -> list[type[Pass]]:
    """The passes that `module` defines itself, not those that it imports."""
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return [c for c in classes if issubclass(c, Pass) and hasattr(c, "name")]


def _required(module: ModuleType, origin: str) -> list[type[Pass]]:
    found = passes_in(module)
    if not found:
        raise PassError("defines no pass", where=origin, allowed="subclasses of dsv4c.passes.Pass")
    return found


def _add(known: dict[str, type[Pass]], classes: Iterable[type[Pass]], origin: str) -> None:
    for c in classes:
        wrong = _wrong_with(c)
        if wrong:
            raise PassError(
                f"{c.__name__} {wrong}", where=origin, hint="docs/writing-passes.md shows a whole pass"
            )
        if known.setdefault(c.name, c) is not c:
            raise PassError(
                f"a pass is already called {c.name!r}", where=origin, allowed="a name of its own",
                hint=f"the other one is {known[c.name].__module__}.{known[c.name].__name__}",
            )  # fmt: skip


def _wrong_with(c: type) -> str:
    if not issubclass(c, Pass):
        return "is no Pass"
    if not (is_dataclass(c) and "__dataclass_params__" in vars(c) and c.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        return "is not a frozen dataclass"
    if not isinstance(getattr(c, "name", None), str) or not re.fullmatch(r"[a-z_]\w*", c.name):
        return f"has name {getattr(c, 'name', None)!r}, allowed are words like fold_scales"
    if not isinstance(getattr(c, "doc", None), str):
        return "has no `doc`, one sentence about what it does"
    if c.run is Pass.run and not c.rules:
        return "does not implement run(module), and has no rules"
    return ""
