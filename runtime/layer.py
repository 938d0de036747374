"""Steps an artifact that is no language model: any named inputs, outputs and states, such as one layer.

Owns the check of inputs against the artifact and the state of one batch. Knows no op, no tokens, no logits.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, SessionError, UsageError, unknown

from . import buffers
from .archs import select
from .backends import dimension, load_backend
from .container import Artifact
from .engram.options import TableOptions

Arrays = dict[str, npt.NDArray[Any]]


class LayerSession:
    """A loaded artifact with its state.

    Args:
        path: an artifact file of format tvm, or an open `Artifact`.
        batch: sequences run side by side.
        context: what the symbol `ctx` stands for, where a state has it.
        threads: worker threads; None takes every core.
        tables: how looked-up tables are read; None keeps what the artifact says.
        arch: which code to take, see `Session`.

    Raises:
        ArtifactError: the file is damaged, does not fit this machine, or does not name its inputs.
        UsageError: the batch is out of range.
    """

    def __init__(
        self, path: str | os.PathLike[str] | Artifact, batch: int = 1, context: int = 0,
        threads: int | None = None, tables: TableOptions | None = None, arch: str = "",
    ) -> None:  # fmt: skip
        opened = path if isinstance(path, Artifact) else Artifact.open(path)
        code = opened.meta.get("tvm", {})
        if "inputs" not in code:
            raise ArtifactError(
                "does not name its inputs", where=str(opened.path), hint="compile again, to format tvm"
            )
        if batch < 1:
            raise UsageError(f"batch = {batch}", where="LayerSession", allowed="1 or more")
        self.artifact = select(opened, arch)
        self.inputs: dict[str, dict[str, Any]] = code["inputs"]
        self.outputs: list[str] = code["outputs"]
        self.sizes = {"B": batch, "ctx": context}
        self.backend = load_backend(self.artifact, threads, tables)
        self.state = {
            name: buffers.zeros(tuple(dimension(d, self.sizes) for d in s["shape"]), np.dtype(s["dtype"]))
            for name, s in self.artifact.meta["step"]["states"].items()
        }

    def step(self, **inputs: npt.ArrayLike) -> Arrays:
        """One step; the state moves on.

        Args:
            inputs: every input of the artifact by name. Symbols such as `T` are read off the shapes.

        Returns:
            Every output that is no state. What belongs to padding is unspecified.

        Raises:
            SessionError: an input is missing, unknown, or of another shape or kind; the state stays.
        """
        for name in inputs.keys() - self.inputs.keys():
            raise unknown("input", name, self.inputs, SessionError, "LayerSession")
        sizes = dict(self.sizes)
        given = [self._input(name, inputs, sizes) for name in self.inputs]
        self._check_valid(dict(zip(self.inputs, given, strict=True)), sizes)
        results = self.backend.call(given, self.state, len(self.outputs))  # type: ignore[attr-defined]
        return dict(zip(self.outputs, results, strict=True))

    def _input(self, name: str, inputs: dict[str, npt.ArrayLike], sizes: dict[str, int]) -> npt.NDArray[Any]:
        wanted, dtype = self.inputs[name]["shape"], np.dtype(self.inputs[name]["dtype"])
        allowed = f"{dtype}[{', '.join(wanted)}]"
        if name not in inputs:
            raise SessionError(f"input {name!r} is missing", where="LayerSession", allowed=allowed)
        array = np.asarray(inputs[name])
        fits = array.ndim == len(wanted) and all(
            _size(d, n, sizes) == n for d, n in zip(wanted, array.shape, strict=True)
        )
        kinds = "iu" if dtype.kind in "iu" else "iuf"
        if not fits or array.dtype.kind not in kinds:
            found = f"{array.dtype}{list(array.shape)}"
            known = ", ".join(f"{k} = {v}" for k, v in sizes.items() if k in " ".join(wanted))
            raise SessionError(
                f"input {name!r} is {found}", where="LayerSession", allowed=f"{allowed} with {known}"
            )
        return array.astype(dtype, copy=False)

    def _check_valid(self, given: Arrays, sizes: dict[str, int]) -> None:
        """`n_valid` counts real tokens of `T`; compiled code trusts it."""
        count = given.get("n_valid")
        if count is not None and "T" in sizes and not ((count >= 0) & (count <= sizes["T"])).all():
            raise SessionError(
                f"n_valid = {count.tolist()}", where="LayerSession", allowed=f"0..{sizes['T']} for each row"
            )

    def reset(self) -> None:
        """Forget everything; the session is as new."""
        for array in self.state.values():
            array[...] = 0


def _size(text: str, found: int, sizes: dict[str, int]) -> int:
    """What a dimension must be; a symbol that stands for nothing yet stands for `found` from now on."""
    if text.isidentifier():
        return sizes.setdefault(text, found)
    return dimension(text, sizes)
