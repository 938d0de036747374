"""A session's state on disk: an .npz whose first entry says of which model, batch and context it is."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import SessionError

_IDENTITY = "identity"
State = dict[str, npt.NDArray[Any]]


def save(path: Path, state: State, identity: dict[str, Any]) -> None:
    """Write atomically: a temporary name beside `path`, then a rename.

    Raises:
        SessionError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            text = np.frombuffer(json.dumps(identity, sort_keys=True).encode(), np.uint8)
            np.savez(file, **{_IDENTITY: text}, **{f"state.{k}": v for k, v in state.items()})  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SessionError(f"cannot be written: {error}", where=str(path)) from None


def load(path: Path, like: State, identity: dict[str, Any]) -> State:
    """The arrays of a saved session, checked against the session they go into.

    Raises:
        SessionError: unreadable, damaged, or of another model, batch or context.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            found = dict(json.loads(bytes(file[_IDENTITY])))
            arrays = {name: file[f"state.{name}"] for name in like} if found == identity else {}
    except Exception as error:  # zip and npy readers raise anything over damaged bytes
        raise SessionError(f"is not a saved session: {error}", where=str(path)) from None
    if found != identity:
        differs = [k for k in identity if found.get(k) != identity[k]]
        raise SessionError(
            f"was saved by another {' and '.join(differs)}: {[found.get(k) for k in differs]}",
            where=str(path),
            allowed=f"{[identity[k] for k in differs]}",
        )
    for name, array in arrays.items():
        if array.shape != like[name].shape or array.dtype != like[name].dtype:
            raise SessionError(f"state {name!r} is {array.dtype}{list(array.shape)}", where=str(path))
    return arrays
