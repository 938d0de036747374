"""Replays an artifact's golden vectors where it runs and names the first thing that differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError

from .container import Artifact
from .session import Session


@dataclass(frozen=True)
class Check:
    """One comparison: a state buffer after the golden prompt, or the logits.

    Attributes:
        error: largest difference over the range of the expected values.
    """

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


def verify(artifact: Artifact, threads: int | None = None) -> list[Check]:
    """Run the golden prompt; the state of every layer in order, then the logits.

    The state a layer leaves depends on nothing but the layers before it, so the first failing check
    names the layer where the difference began.

    Raises:
        ArtifactError: the artifact was compiled without golden vectors.
    """
    if "golden" not in artifact.meta:
        raise ArtifactError(
            "has no golden vectors", where=str(artifact.path), hint="compile without --no-golden"
        )
    tolerance = float(artifact.meta["golden"]["tolerance"])
    tokens = artifact.array("golden.tokens")
    session = Session(artifact, context=len(tokens), threads=threads)
    logits, at = [], 0
    for count in artifact.meta["golden"]["calls"]:
        logits.append(session.step(tokens[None, at : at + count])[0])
        at += count
    checks = [
        Check(
            f"state {name}",
            difference(session.state[name], artifact.array(f"golden.state.{name}")),
            tolerance,
        )
        for name in artifact.meta["step"]["states"]
        if f"golden.state.{name}" in artifact.tensors  # not what a pass has added to the model
    ]
    return [
        *checks,
        Check("logits", difference(np.concatenate(logits), artifact.array("golden.logits")), tolerance),
    ]


def difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest absolute difference over the expected range; inf where the result is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    span = float(np.ptp(expected)) if expected.size else 0.0
    worst = float(np.abs(found.astype(np.float64) - expected).max()) if expected.size else 0.0
    return worst / span if span else worst
