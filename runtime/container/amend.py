"""Changing what a finished artifact says about itself, without touching its bytes of code and weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4c.errors import ArtifactError

from .layout import Header, Manifest
from .reader import Artifact


def amend_meta(path: str | os.PathLike[str], changes: Mapping[str, Any]) -> None:
    """Replace values of the meta data; the manifest stands last in the file, so only that is written.

    Not atomic: call it on a file under a private name, and rename that when all is done.

    Args:
        changes: key of the meta data -> its new value, which must survive JSON.

    Raises:
        ArtifactError: the file is no artifact, is damaged, or cannot be written.
    """
    opened = Artifact.open(path)
    manifest = Manifest({**opened.meta, **changes}, opened.sections, opened.tensors).encode()
    try:
        with Path(path).open("r+b") as file:
            offset = Header.unpack(file.read(64), os.fstat(file.fileno()).st_size, str(path)).offset
            file.truncate(offset)
            file.seek(offset)
            file.write(manifest)
            file.seek(0)
            file.write(Header.of(manifest, offset).pack())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ArtifactError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
