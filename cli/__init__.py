"""The command line: `main` parses, dispatches, and turns every way to fail into its exit code.

It must stay importable with the run-time dependencies alone: commands import the compiler when they run.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from dsv4c import __version__
from dsv4c.errors import Dsv4cError, UsageError, unknown

from .base import Command, Parser, examples
from .show import as_json
from .table import COMMANDS

FAILED, MISUSED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit codes: a check failed; an error with a message; Ctrl-C and a closed pipe as a shell counts them."""

_EXAMPLES = (
    "dsv4c compile CHECKPOINT --target cpu -o m.dsv4",
    'dsv4c run m.dsv4 --prompt "In the beginning" --max-new-tokens 60',
    "dsv4c verify m.dsv4",
)


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name); returns the exit code.

    An exception that is no `Dsv4cError` is a bug of dsv4c and keeps its traceback.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except Dsv4cError as error:
        _report(error, "--json" in words)
        return MISUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except SystemExit as done:  # argparse, after --help and --version
        return int(done.code or 0)


def _dispatch(words: list[str]) -> int:
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise unknown("command", name, COMMANDS, UsageError)
    args = build_parser().parse_args(words)
    if args.command is None:
        raise UsageError("no command", allowed=", ".join(COMMANDS), hint="dsv4c --help")
    return COMMANDS[args.command].run(args)


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="dsv4c",
        description="A compiler for DeepSeek-V4 models: checkpoint in, one artifact out, and its runtime.",
        epilog=examples(_EXAMPLES) + "\n\ndsv4c COMMAND --help explains one command.",
    )
    parser.add_argument("--version", action="version", version=f"dsv4c {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS.values():
        _add(commands, command)
    return parser


def _add(commands: object, command: Command) -> None:
    parser = commands.add_parser(  # type: ignore[attr-defined]
        command.name, help=command.summary, description=command.about, epilog=examples(command.examples)
    )
    command.arguments(parser)


def _report(error: Dsv4cError, as_object: bool) -> None:
    print(f"dsv4c: error: {error}", file=sys.stderr)
    if as_object:
        fields = {key: getattr(error, key) for key in ("what", "where", "allowed", "hint")}
        print(as_json({"error": {"type": type(error).__name__, **fields}}))


def _silence_stdout() -> None:
    """The reader is gone: what is still buffered must not complain again when the interpreter exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["build_parser", "main"]
