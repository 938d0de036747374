"""An artifact for a GPU through the command line, where there is no GPU: compiled, rehearsed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gpu_support import GOLDEN

from dsv4c import Session, cli
from dsv4c.errors import SessionError, ToolchainError
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.gpu.dry_run import DryRunDevice
from dsv4c.runtime.gpu_backend import GpuBackend

pytest.importorskip("triton", reason="Triton is not installed: make oracle")
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module", params=["v4", "v41"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / f"{request.param}.dsv4"
    assert cli.main(["compile", str(GOLDEN / request.param), "--target", "cuda:sm_90a", "-o", str(path)]) == 0
    return path


def test_the_first_format_is_machine_code(artifact: Path) -> None:
    meta = Artifact.open(artifact).meta
    assert (meta["format"], meta["numerics"], meta["target"]) == ("plan", "bf16", "cuda")
    kernels = meta["plan"]["kernels"]
    assert kernels and all(k["registers"] <= 255 for k in kernels)


def test_verify_checks_every_launch_here(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and not found["computed"] and found["steps"] == 5
    assert found["launches"] > found["kernels"] > 20
    assert cli.main(["verify", str(artifact)]) == 0
    assert "nothing computed" in capsys.readouterr().out


def test_the_rehearsal_has_images_and_their_encoder(artifact: Path) -> None:
    """A session on a device that computes nothing encodes an image and takes its rows; text models refuse."""
    opened = Artifact.open(artifact)
    device = DryRunDevice()
    session = Session(opened, context=64, backend=GpuBackend(opened, device, check=True))
    picture = np.zeros((60, 80, 3), np.uint8)
    if artifact.stem == "v4":
        with pytest.raises(SessionError, match="takes no images"):
            session.with_images([5], [picture])
        return
    ids, images = session.with_images([5, session.image_token, 6], [picture])
    assert len(images[0]) == ids.count(session.image_token) > 1
    session.prefill([ids], images=images)
    assert {"full_attention", "image_span", "merge_images"} <= {name for name, _ in device.launches}


def test_without_a_driver_nothing_runs(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has the driver")
    with pytest.raises(ToolchainError, match="driver"):
        Session(artifact)
    assert cli.main(["verify", str(artifact), "--on", "device"]) == 2
    assert "driver" in capsys.readouterr().err


def test_the_report_has_its_kernels(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As compiled: registers and matrix instructions of each, and the least time of a step."""
    assert cli.main(["inspect", str(artifact)]) == 0
    printed = capsys.readouterr().out
    assert "HGMMA" in printed and "Least times by the published figures of h200" in printed
    pytest.importorskip("matplotlib")
    page = tmp_path / "r.html"
    assert cli.main(["report", str(artifact), "-o", str(page), "--ceilings", "500,40"]) == 0
    assert "Kernels of the launch plan" in page.read_text() and "HGMMA" in page.read_text()


@pytest.mark.parametrize("name", ["v4", "v41"])
def test_an_artifact_for_several_devices(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled, rehearsed on as many devices, refused without them, and shown device by device."""
    path = tmp_path / "m.dsv4"
    command = ["compile", str(GOLDEN / name), "--target", "rocm:gfx942", "--devices", "3", "-o", str(path)]
    assert cli.main(command) == 0
    meta = Artifact.open(path).meta
    assert len(meta["plan"]["memory"]["devices"]) == meta["report"]["estimate"]["devices"] == 3
    assert "spread_layers{devices=3," in meta["report"]["pipeline"]
    capsys.readouterr()
    assert cli.main(["verify", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["devices"] == 3 and found["launches"] > 5 * found["kernels"] / 2
    assert cli.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Handed over: layers." in printed and "Estimated, not measured, for 3 x mi300x" in printed
    pytest.importorskip("matplotlib")
    page = tmp_path / "r.html"
    assert cli.main(["report", str(path), "-o", str(page), "--ceilings", "500,40"]) == 0
    assert "Devices of the launch plan" in page.read_text()
