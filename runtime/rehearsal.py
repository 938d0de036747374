"""A rehearsal of a launch plan: the golden prompt and image on a device that computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.errors import ArtifactError

from .container import Artifact
from .gpu.dry_run import DryRunDevice
from .gpu_backend import GpuBackend, read_plan
from .session import Session
from .verify import golden_calls, golden_tower


@dataclass(frozen=True)
class Rehearsal:
    """What was checked.

    Attributes:
        steps: calls of the golden prompt.
        launches: of all steps together, and of the image encoder where there is one.
        kernels: distinct ones among them.
        devices: on which they would run.
    """

    steps: int
    launches: int
    kernels: int
    devices: int = 1


def rehearse(artifact: Artifact) -> Rehearsal:
    """Check every launch of the golden prompt: bounds, alignment, grid, shared memory, order, lives; and what
    passes between devices.

    Needs neither a device nor a driver, and says nothing about numbers.

    Raises:
        ArtifactError: a launch would go wrong, or the artifact has no golden prompt.
    """
    if "golden" not in artifact.meta:
        raise ArtifactError(
            "has no golden prompt", where=str(artifact.path), hint="compile without --no-golden"
        )
    devices = [DryRunDevice() for _ in read_plan(artifact).stages]
    context = len(artifact.array("golden.tokens"))
    session = Session(artifact, context=context, backend=GpuBackend(artifact, devices, check=True))
    calls = list(golden_calls(session))
    for tokens, images in calls:
        session.step(tokens, images=images)
    golden_tower(session)
    launches = [launch for device in devices for launch in device.launches]
    return Rehearsal(len(calls), len(launches), len({name for name, _ in launches}), len(devices))
