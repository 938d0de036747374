"""Passes from outside: files named on the command line, and entry points of installed packages.

Owns what makes a stranger's class acceptable and the errors where it is not. Knows no particular pass.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType

from dsv4c.errors import Dsv4cError, PassError

from .base import Pass
from .table import PASSES

GROUP = "dsv4c.passes"
"""The entry point group; an entry is a `Pass` class or a module that defines some."""


def known_passes(plugins: Sequence[str | os.PathLike[str]] = ()) -> dict[str, type[Pass]]:
    """The passes of the project, of installed packages, and of the given files, by name.

    Raises:
        PassError: a file or entry cannot be imported, holds no pass, holds one that is not a frozen
            dataclass with `name` and `doc`, or uses a name that is taken.
    """
    found = dict(PASSES)
    for entry in importlib.metadata.entry_points(group=GROUP):
        origin = f"entry point {entry.name} = {entry.value}"
        try:
            loaded = entry.load()
        except Exception as error:
            raise _failed(origin, error) from error
        _add(found, [loaded] if isinstance(loaded, type) else _defined_in(loaded, origin), origin)
    for path in plugins:
        _add(found, _defined_in(_load(Path(path)), str(path)), str(path))
    return found


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise PassError("no such file", where=str(path), allowed="a Python file that defines passes")
    name = "dsv4c_plugin_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PassError("is no Python file", where=str(path), allowed="*.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Dsv4cError:
        raise
    except BaseException as error:  # a plugin that calls sys.exit must not end the compiler
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _failed(str(path), error) from error
    return module


def _failed(origin: str, error: BaseException) -> PassError:
    line = ""
    trace = error.__traceback__
    while trace is not None:
        line, trace = (
            f"line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name}",
            trace.tb_next,
        )
    return PassError(
        f"cannot be imported: {type(error).__name__}: {error}", where=origin, hint=f"raised at {line}"
    )


def _defined_in(module: ModuleType, origin: str) -> list[type[Pass]]:
    """The passes that `module` defines itself, not those that it imports."""
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, Pass) and hasattr(c, "name")]
    if not found:
        raise PassError(
            "defines no pass", where=origin, allowed="subclasses of dsv4c.passes.Pass"
        )
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
    if c.run is Pass.run:
        return "does not implement run(module)"
    return ""
