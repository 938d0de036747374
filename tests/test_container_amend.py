"""Amending the meta data of a finished artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container import Artifact, ArtifactWriter, amend_meta


def artifact(path: Path) -> Path:
    with ArtifactWriter(path) as writer:
        writer.set_meta("kept", [1, 2])
        writer.set_meta("report", {"a": 1})
        writer.add_section("code", b"x" * 5000)
        writer.add_tensor("w", "f32", (3,), [np.arange(3, dtype=np.float32)])
    return path


@pytest.mark.parametrize("value", [{"a": 1, "more": ["x"] * 500}, {}])
def test_only_the_meta_data_changes(tmp_path: Path, value: object) -> None:
    path = artifact(tmp_path / "m.dsv4")
    amend_meta(path, {"report": value, "new": 3})
    opened = Artifact.open(path, check="full")
    assert opened.meta == {"kept": [1, 2], "report": value, "new": 3}
    assert opened.section("code") == b"x" * 5000 and opened.array("w").tolist() == [0, 1, 2]


def test_what_is_no_artifact_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.dsv4"
    path.write_bytes(b"hello" * 100)
    with pytest.raises(ArtifactError, match="not a dsv4c artifact"):
        amend_meta(path, {})
    assert path.read_bytes() == b"hello" * 100
