"""Runs every python block of README.md and docs/*.md, in order, each file in a namespace of its own.

A block that opens with the name of a file, as a comment, is written to that file too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\w+\.py)\n")
FILES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if BLOCK.search(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path", FILES, ids=[p.name for p in FILES])
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # the README's paths are of the repository
    (tmp_path / "build").mkdir()
    text = path.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in BLOCK.finditer(text):
        if named := NAMED.match(block.group(1)):
            (tmp_path / named.group(1)).write_text(block.group(1), encoding="utf-8")
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(path), "exec", dont_inherit=True), names)


def test_there_is_something_to_run() -> None:
    assert {"README.md", "adding-a-target.md", "writing-passes.md"} <= {path.name for path in FILES}
