"""Tests that are text files: a module, the passes to run over it, and the module or the error that comes out.

    // RUN: fuse_swiglu,narrow_weights{storage = "f32"}
    module "m" level MODEL { ... }
    // EXPECT
    module "m" level FUSED { ... }

Nothing after `RUN:` only parses, verifies and prints. A case that must be refused has the line
`// ERROR: ...` below its `RUN:`, with the first line of the message, and no `// EXPECT`. Cases of one file
stand apart by a line `// ---`. `pytest tests/test_filetests.py --bless` rewrites expectations and messages;
read the diff before you commit it.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from dsv4c.errors import Dsv4cError
from dsv4c.ir.text import parse_module, print_module
from dsv4c.ir.verify import verify
from dsv4c.passes import PASSES, parse_pipeline, run_pipeline

FOLDER = Path(__file__).parent / "filetests"
FILES = sorted(FOLDER.glob("*.ir"))
SEPARATOR, RUN, ERROR, EXPECT = "// ---\n", "// RUN:", "// ERROR:", "// EXPECT\n"


def cases(text: str) -> list[tuple[int, str]]:
    """(number of lines before it, text) of every case of a file."""
    out, before = [], 0
    for case in text.split(SEPARATOR):
        out.append((before, case))
        before += case.count("\n") + 1
    return out


def outcome(source: str, lines_before: int, name: str) -> tuple[str, str]:
    """(module text, "") or ("", first line of the error) of one case."""
    pipeline = next(line for line in source.splitlines() if line.startswith(RUN)).removeprefix(RUN)
    try:
        module = parse_module("\n" * lines_before + source, where=name)
        verify(module)
        run_pipeline(module, parse_pipeline(pipeline.strip()))
        return print_module(module), ""
    except Dsv4cError as error:
        return "", str(error).splitlines()[0]


def blessed(case: str, lines_before: int, name: str) -> str:
    """The case as it should stand in the file."""
    source = case.partition(EXPECT)[0]
    found, error = outcome(source, lines_before, name)
    lines = [line for line in source.splitlines(keepends=True) if not line.startswith(ERROR)]
    if not error:
        return "".join(lines) + EXPECT + found
    if ERROR not in source:  # the new line would move every line number after it
        at = next(i for i, line in enumerate(lines) if line.startswith(RUN)) + 1
        return blessed("".join([*lines[:at], f"{ERROR}\n", *lines[at:]]), lines_before, name)
    return "".join(
        f"{ERROR} {error}\n" if line.startswith(ERROR) else line for line in source.splitlines(keepends=True)
    )


def bless(text: str, name: str) -> str:
    out: list[str] = []
    for case in text.split(SEPARATOR):
        before = sum(c.count("\n") + 1 for c in out)
        out.append(blessed(case, before, name))
    return SEPARATOR.join(out)


@pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])
def test_file(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    wanted = bless(text, path.name)
    if request.config.getoption("--bless"):
        path.write_text(wanted, encoding="utf-8")
        return
    diff = difflib.unified_diff(
        text.splitlines(),
        wanted.splitlines(),
        f"{path.name}, expected",
        f"{path.name}, found",
        lineterm="",
        n=1,
    )
    lines = list(diff)
    assert not lines, "\n" + "\n".join(lines) + "\n(pytest tests/test_filetests.py --bless rewrites it)"


@pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])
def test_expectations_are_a_fixed_point(path: Path) -> None:
    """What is printed reads back and prints the same."""
    for before, case in cases(path.read_text(encoding="utf-8")):
        expected = case.partition(EXPECT)[2]
        if expected:
            assert print_module(parse_module("\n" * before + expected)) == expected


def test_every_pass_has_a_file() -> None:
    used = {p.name for path in FILES for p in pipelines(path)}
    assert used == set(PASSES), f"without a file: {sorted(set(PASSES) - used)}"


def pipelines(path: Path) -> list[object]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(RUN):
            try:
                found += parse_pipeline(line.removeprefix(RUN).strip())
            except Dsv4cError:
                continue  # a file about pipelines that are refused
    return found


# ------------------------------------------------------------------------------ the runner itself

GOOD = """// RUN: eliminate_dead_code
module "m" level MODEL {
  input %x : f32[B, T, 4]
  %1 = scale(%x) {factor = 2.0} : f32[B, T, 4]
  output y = %x
}
// EXPECT
module "m" level MODEL {
  input %x : f32[B, T, 4]
  output y = %x
}
"""


def test_the_runner_accepts_what_is_right() -> None:
    assert bless(GOOD, "good.ir") == GOOD


def test_the_runner_notices_a_wrong_expectation() -> None:
    source, mark, expected = GOOD.partition(EXPECT)
    wrong = source + mark + expected.replace("output y", "output z")
    assert bless(wrong, "wrong.ir") == GOOD != wrong


def test_the_runner_blesses_errors_with_their_final_line() -> None:
    bad = '// RUN:\nmodule "m" level MODEL {\n  output y = %x\n}\n'
    once = bless(bad, "bad.ir")
    assert "// ERROR: bad.ir:4: value %x is not defined\n" in once
    assert bless(once, "bad.ir") == once
    second = bless(GOOD + SEPARATOR + bad, "bad.ir")
    assert "// ERROR: bad.ir:16: value %x is not defined\n" in second
