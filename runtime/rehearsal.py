"""A rehearsal of a launch plan: the calls of the golden prompt on a device that computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4c.errors import ArtifactError

from .container import Artifact
from .gpu.dry_run import DryRunDevice
from .gpu_backend import GpuBackend
from .session import Session


@dataclass(frozen=True)
class Rehearsal:
    """What was checked.

    Attributes:
        steps: calls of the golden prompt.
        launches: of all steps together.
        kernels: distinct ones among them.
    """

    steps: int
    launches: int
    kernels: int


def rehearse(artifact: Artifact) -> Rehearsal:
    """Check every launch of the golden prompt: bounds, alignment, grid, shared memory, order, lives.

    Needs neither a device nor a driver, and says nothing about numbers.

    Raises:
        ArtifactError: a launch would go wrong, or the artifact has no golden prompt.
    """
    if "golden" not in artifact.meta:
        raise ArtifactError(
            "has no golden prompt", where=str(artifact.path), hint="compile without --no-golden"
        )
    device, tokens, at = DryRunDevice(), artifact.array("golden.tokens"), 0
    session = Session(artifact, context=len(tokens), backend=GpuBackend(artifact, device, check=True))
    calls = artifact.meta["golden"]["calls"]
    for count in calls:
        session.step(np.array(tokens[None, at : at + count]))
        at += count
    return Rehearsal(len(calls), len(device.launches), len({name for name, _ in device.launches}))
