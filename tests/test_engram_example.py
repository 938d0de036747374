"""The hit-rate example: it runs, its curves rise with the cache, and the hot region helps."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "engram" / "hit_rate.py"


def test_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "curve.json"
    arguments = ["--table-mib", "2", "--hot-mib", "0.25", "--tokens", "150", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "hot rows" in capsys.readouterr().out
    plain, hot = json.loads(output.read_text())["curves"].values()
    rates = [p["hit_rate"] for p in plain["points"]]
    assert rates[0] == 0 and rates[-1] > 0.1
    assert all(b >= a - 0.02 for a, b in itertools.pairwise(rates))  # sets are not one big cache
    assert plain["points"][0]["pages_per_token"] > plain["points"][-1]["pages_per_token"]
    assert hot["layout"]["hot_rows"] > 0 and hot["points"][0]["hit_rate"] == hot["points"][0]["hot"] > 0
