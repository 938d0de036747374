"""Takes an artifact of fixed shapes apart into what a vendor's converter reads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dsv4c.errors import ArtifactError, UsageError

from .container import Artifact
from .onnx_backend import placed_model

WEIGHTS = "weights.dsv4"
FILES = "file:"
"""Sections of this prefix are files for the device, by name."""


def unpack(artifact: Artifact, directory: Path, link: bool = False) -> list[Path]:
    """Write the models, `weights.dsv4` and the scripts of the artifact into a new directory.

    The weights are the artifact itself, to which the models refer by offset. The directory appears whole or
    not at all.

    Args:
        link: the weights become a second name of the artifact, which takes no space, where the file system
            can; the checker of the onnx package refuses such a file.

    Returns:
        The files, as they lie.

    Raises:
        ArtifactError: the artifact holds no models of fixed shapes.
        UsageError: the directory exists, or cannot be written.
    """
    static = artifact.meta.get("onnx", {}).get("static")
    if not static:
        raise ArtifactError(
            "holds nothing that a converter reads", where=str(artifact.path),
            hint="compile for a target of fixed shapes: dsv4c targets",
        )  # fmt: skip
    if directory.exists():
        raise UsageError("exists already", where=str(directory), allowed="a directory to make")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unpack-") as made:
            work = Path(made) / "files"
            work.mkdir()
            for name in [p["name"] for bucket in static["buckets"] for p in bucket["programs"]]:
                model = placed_model(artifact, WEIGHTS, f"onnx.{name}")
                (work / f"step.{name}.onnx").write_bytes(model)
            for name in artifact.sections:
                if name.startswith(FILES):
                    _write_file(work / name.removeprefix(FILES), artifact.section(name))
            (_link if link else shutil.copyfile)(artifact.path, work / WEIGHTS)
            os.rename(work, directory)
    except OSError as error:
        raise UsageError(f"cannot be written: {error}", where=str(directory)) from None
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if path.suffix == ".sh":
        path.chmod(0o755)


def _link(source: Path, target: Path) -> None:
    """A second name, or a copy where there can be none."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
