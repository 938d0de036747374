"""What a command is, and the parsing of arguments that all commands share.

Knows no command. Every complaint about a command line leaves here as a `UsageError`, so that it reads
like every other error and so that `--json` can carry it.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from dsv4c.errors import ToolchainError, UsageError

if TYPE_CHECKING:
    from dsv4c.runtime.engram import TableOptions


@dataclass(frozen=True)
class Command:
    """One word after `dsv4c`.

    Attributes:
        summary: one line for the list of commands, without a full stop.
        about: what the command does and what it leaves behind, for its own --help.
        examples: command lines that work as they stand, one a line.
        arguments: declares options on the parser.
        run: carries the command out; returns the exit code.
    """

    name: str
    summary: str
    about: str
    examples: tuple[str, ...]
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, takes no abbreviations, and keeps the line breaks of its texts."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, hint=f"{self.prog} --help")


def examples(lines: tuple[str, ...]) -> str:
    """The epilog of a help text."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object; errors become one too")


def threads_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--threads", type=integer(1), metavar="N", help="worker threads (default: every core)"
    )


def arch_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--arch", default="", metavar="NAME",
        help="of an artifact for several processors, whose code to run (default: the best this machine has)",
    )  # fmt: skip


def table_options(parser: argparse._ActionsContainer) -> None:
    """How looked-up tables, such as those of Engram, are read; see `tables_of`."""
    parser.add_argument(
        "--tables", choices=("resident", "disk"),
        help="map tables into memory, or read rows from disk as they are needed (default: as compiled)",
    )  # fmt: skip
    parser.add_argument(
        "--table-cache", type=byte_count, metavar="SIZE",
        help="memory for rows read from disk, e.g. 512MiB (default: as compiled)",
    )  # fmt: skip


def tables_of(args: argparse.Namespace) -> TableOptions:
    """What `table_options` were given."""
    from dsv4c.runtime.engram import TableOptions

    return TableOptions(args.tables, args.table_cache)


def prefill_option(parser: argparse._ActionsContainer) -> None:
    """Which layers see the whole prompt; see `dsv4c.runtime.replay`."""
    parser.add_argument(
        "--prefill", default="full", metavar="HOW",
        help="full (default); replay: of DeepSeek-V4.1 the decoder layers over the end of the prompt, as many"
        " tokens as give exact results; replay=N: over the last N tokens, approximate for few",
    )  # fmt: skip


def plugin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py",
        help="a Python file that defines passes or targets; several allowed",
    )  # fmt: skip


def integer(at_least: int) -> Callable[[str], int]:
    """An argument type: an integer that is not too small."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {at_least}")
        return value

    return convert


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def byte_count(text: str) -> int:
    """An argument type: bytes, as `1048576`, `512MiB` or `2GB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if not found or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 512MiB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])


def number(text: str) -> float:
    """An argument type: what Python reads as a float; ranges are the business of who takes it."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def id_list(text: str) -> list[int]:
    """An argument type: `1,2,3` or `1 2 3` -> token ids."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids like 1,2,3")
    return [int(word) for word in words]


def read_text(path: str) -> str:
    """A text file as UTF-8; `-` is standard input.

    Raises:
        UsageError: it cannot be read or is not text.
    """
    try:
        return Path("/dev/stdin" if path == "-" else path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError("no such file", where=path) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", where=path) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"is not UTF-8 text: {error.reason} at byte {error.start}", where=path) from None


def check_directory_of(path: str, what: str) -> None:
    """Refuse an output whose directory is missing now, before long work.

    Raises:
        UsageError: the directory is missing, or `path` is a directory itself.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{what} is a directory", where=path, hint="name a file")
    if not target.parent.is_dir():
        raise UsageError(
            f"the directory of {what} does not exist", where=path, hint=f"mkdir -p {target.parent}"
        )


def load_compiler(module: str = "dsv4c.api") -> ModuleType:
    """A module that needs the compiler; late, because artifacts must run where it is not installed.

    Raises:
        ToolchainError: a package of the compiler is missing; names it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ToolchainError(
            f"the compiler is not installed: {error}", hint='pip install "dsv4c[compile]"'
        ) from error
