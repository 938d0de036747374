"""One process may run an artifact first and compile afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from test_model_harness import Models

GOLDEN = Path(__file__).parent / "data" / "golden" / "v4_r16"
SCRIPT = """
import sys, dsv4c
first = dsv4c.Session(sys.argv[1]).generate([1, 2, 3], 4)
assert "tvm" not in sys.modules
dsv4c.compile(sys.argv[2], output=sys.argv[3], golden=False)
assert dsv4c.Session(sys.argv[3]).generate([1, 2, 3], 4) == first
print("both")
"""


def test_run_then_compile(models: Models, tmp_path: Path) -> None:
    """The runtime that an artifact brings and that of the compiler must be one library."""
    artifact = models.artifact(GOLDEN.name, "tvm")
    command = [sys.executable, "-c", SCRIPT, str(artifact), str(GOLDEN), str(tmp_path / "b.dsv4")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1] / ".pkg")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "both"
