"""The folder that is carried to a GPU, with real objects: packed by the command, run dry from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.mark.parametrize(
    ("arch", "numerics"),
    [
        ("sm_90a", "bf16"), pytest.param("gfx942", "bf16", marks=pytest.mark.slow),
        pytest.param("sm_90a", "fp8", marks=pytest.mark.slow),
        pytest.param("gfx942", "fp8", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_four_layers_of_flash_are_packed_and_run_dry(tmp_path: Path, arch: str, numerics: str) -> None:
    output = tmp_path / "gpu"
    pack = [sys.executable, str(FOLDER), "pack", "--arch", arch, "--layers", "4", "-o", str(output)]
    assert subprocess.run([*pack, "--numerics", numerics], check=False).returncode == 0
    assert sum(f.stat().st_size for f in output.rglob("*") if f.is_file()) < 64 << 20
    run = [sys.executable, str(output), "run", "--dry-run"]
    found = subprocess.run(run, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "4 of 4 layers, 16.4 GB of weights" in found.stdout and "not measured" in found.stdout
    assert f"of the {numerics.upper()} matrix peak" in found.stdout
