"""The V4.1 walk-through: every command of it works, and its report shows the tables of a whole model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from dsv4c.runtime import Artifact

EXAMPLE = Path(__file__).parents[1] / "examples" / "v41"
SCRIPT = EXAMPLE / "walk.py"
COMMANDS = ("inspect", "compile", "verify", "run", "run", "bench", "bench", "report")


def test_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "walk"
    arguments = ["--output", str(output), "--tokens", "1500", "--hot-kib", "256", "--cache-kib", "128"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert tuple(re.findall(r"^\$ dsv4c (\w+)", printed, re.M)) == COMMANDS
    assert "vision rows" in printed and re.search(r"^ok: \d+ checks", printed, re.M)
    shares = r"(layers\.\d\.engram\.embed): (\d+) lookups, ([\d.]+)% hot, ([\d.]+)% cached"
    found = [
        (name, int(rows), float(hot), float(cached))
        for name, rows, hot, cached in re.findall(shares, printed)
    ]
    random, text = found[:2], found[2:]
    assert [name for name, *_ in text] == ["layers.1.engram.embed", "layers.3.engram.embed"]
    assert {rows for _, rows, *_ in text} == {500 * 12} and {rows for _, rows, *_ in random} == {289 * 12}
    for (*_, of_noise, repeated), (*_, hot, cached) in zip(random, text, strict=True):
        assert hot > of_noise and cached > 1, "a text asks for rows that another text asked for"
        assert repeated > cached, "the benchmark repeats itself"

    artifact = Artifact.open(output / "m.dsv4", check="full")
    notes = artifact.meta["report"]["notes"]["layout_engram"]
    assert [t["loc"] for t in notes["tables"]] == [name for name, *_ in text]
    assert all(t["hot_rows"] > 100 and t["expected_hit_rate"] > 0.1 for t in notes["tables"])
    assert sum(t["hot_bytes"] + t["directory_bytes"] for t in notes["tables"]) <= 256 << 10
    assert sum(t["cache_bytes"] for t in notes["tables"]) <= 128 << 10
    classes = {row["class"] for row in artifact.meta["report"]["weights"]["after"]}
    assert {"vision", "engram", "experts"} <= classes
    page = (output / "report.html").read_text(encoding="utf-8")
    section = page[page.index("Engram tables") :]
    for words in ("layers.3.engram.embed", "directory", "cold", "in memory, MiB", "most asked-for rows"):
        assert words in section, words

    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "is not empty" in capsys.readouterr().err


def test_the_readme_names_what_there_is() -> None:
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    options = set(re.findall(r"walk\.py (--[\w-]+)", text))
    source = SCRIPT.read_text(encoding="utf-8")
    assert options and all(f'"{option}"' in source for option in options)
    for command in set(COMMANDS):
        assert f"dsv4c {command}" in text, command
