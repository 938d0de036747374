"""`dsv4c opt`: IR text in, a pipeline of passes, IR text out. The tool for one pass at a time."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.errors import UsageError

from .base import Command, check_directory_of, load_compiler, plugin_option, read_text

if TYPE_CHECKING:
    from dsv4c.ir.graph import Module
    from dsv4c.passes import Pass


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="IR text, e.g. from compile --dump-ir; - is standard input"
    )
    parser.add_argument(
        "-p", "--passes", default="", metavar="P,...", help='e.g. "fuse_swiglu,narrow_weights"'
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write there instead of standard output")
    parser.add_argument(
        "--verify-each", action=argparse.BooleanOptionalAction, default=True,
        help="check the graph before and after every pass (default); without, see what a broken pass left",
    )  # fmt: skip
    parser.add_argument(
        "--verify-passes", action="store_true",
        help="evaluate the graph on random inputs and weights around every pass",
    )  # fmt: skip
    parser.add_argument(
        "--explain", action="store_true",
        help="say on standard error where a pass does not apply, and why",
    )  # fmt: skip
    plugin_option(parser)


def _run(args: argparse.Namespace) -> int:
    load_compiler()  # complains where the compiler is not installed
    from dsv4c.ir.text import parse_module, print_module
    from dsv4c.ir.verify import verify
    from dsv4c.passes import known_passes, parse_pipeline, run_pipeline
    from dsv4c.passes.check import ResultCheck

    if args.output:
        check_directory_of(args.output, "the output")
    passes = parse_pipeline(args.passes, known_passes(args.plugin))
    module = parse_module(read_text(args.file), args.file)
    if args.verify_each:
        verify(module)
        check = ResultCheck(module) if args.verify_passes else None
        for one in passes:
            if args.explain:
                sys.stderr.writelines(f"{one.name}: {line}\n" for line in one.explain(module))
            run_pipeline(module, (one,), check=check)
    else:
        _run_unchecked(module, passes)
    _write(args.output, print_module(module))
    return 0


def _run_unchecked(module: Module, passes: tuple[Pass, ...]) -> None:
    """The passes alone: no check of levels or graph, no clean-up between them."""
    for one in passes:
        one.run(module)
        module.level = one.gives or module.level


def _write(output: str | None, text: str) -> None:
    """A regular file appears whole or not at all; anything else (a pipe, a device) is written through.

    Raises:
        UsageError: it cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        return
    path = Path(output)
    through = path.exists() and not path.is_file()
    temporary = path if through else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        if not through:
            temporary.replace(path)
    except OSError as error:
        if not through:
            temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot be written: {error.strerror or error}", where=output) from None


OPT = Command(
    name="opt",
    summary="run passes over IR text",
    about="Parse IR text, run a pipeline of passes over it, and print what they leave. Without passes the\n"
    "text is checked and printed in its canonical form.",
    examples=(
        'dsv4c opt 00-model.ir -p "fuse_swiglu,fuse_expert_gemms"',
        "dsv4c opt 00-model.ir -p 'narrow_weights{storage=\"f32\"}' -o out.ir",
        "dsv4c opt 00-model.ir",
    ),
    arguments=_arguments,
    run=_run,
)
