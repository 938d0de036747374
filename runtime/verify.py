"""Replays an artifact's golden vectors where it runs and names the first thing that differs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError

from .container import Artifact
from .images import ImagePlan
from .images.tower import tower_indices
from .session import Session

if TYPE_CHECKING:
    from .static_backend import Opener

Arr = npt.NDArray[Any]


GROSS = 1.0
"""Of what is undecided: no choice moves a value further than the range of its tensor."""
SPARE = 2
"""Undecided rows that may be off beyond those of the shadow that has most; draws of few rows scatter."""


@dataclass(frozen=True)
class Check:
    """One comparison: a state buffer after the golden prompt, the streams after a layer, or the logits.

    Attributes:
        error: largest difference over the range of the expected values, of the rows that are decided.
        rows: tokens, slots or entries that were compared.
        undecided: how many of them hang on a choice that rounding decides, and are left out of `error`.
        astray: largest difference of those, held to `GROSS`; inf where one is not finite.
        off: how many of those are beyond the tolerance, held to `may_be_off`.
    """

    name: str
    error: float
    tolerance: float
    rows: int = 1
    undecided: int = 0
    astray: float = 0.0
    off: int = 0
    may_be_off: int = 0

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance and self.astray <= GROSS and self.off <= self.may_be_off

    @property
    def decided(self) -> bool:
        """Whether any row was judged by its numbers."""
        return self.undecided < self.rows


def failures(checks: Sequence[Check]) -> list[Check]:
    """The checks that failed; all streams and logits, where no row of them is decided: nothing was judged."""
    judged = [c for c in checks if c.name == "logits" or c.name.startswith("block ")]
    nothing = bool(judged) and not any(c.decided for c in judged)
    return [c for c in checks if not c.ok or (nothing and c in judged)]


def verify(
    artifact: Artifact, threads: int | None = None, opener: Opener | None = None, arch: str = ""
) -> list[Check]:
    """Run the golden prompt; per layer its state and, where programs show them, its streams; then the logits.

    What a layer leaves depends on nothing but the layers before it, so the first failing check names the
    layer where the difference began.

    Args:
        opener: who runs the programs of an artifact of fixed shapes; None is ONNX Runtime on this machine,
            which alone can show streams.
        arch: whose code to run, see `Session`; every arch is held to the same vectors.

    Raises:
        ArtifactError: the artifact was compiled without golden vectors, or does not have room for them.
    """
    if "golden" not in artifact.meta:
        raise ArtifactError(
            "has no golden vectors", where=str(artifact.path), hint="compile without --no-golden"
        )
    session = _session(artifact, len(artifact.array("golden.tokens")), threads, opener, arch)
    logits, streams = [], dict[str, list[Arr]]()
    for fed, given in golden_calls(session):
        logits.append(session.step(fed, images=given)[0])
        for layer, seen in getattr(session.backend, "probes", {}).items():
            streams.setdefault(layer, []).append(seen[0])
    session.bring_state()
    found = {f"golden.state.{name}": value[:1] for name, value in session.state.items()}
    found |= {f"golden.block.{layer}": np.concatenate(parts) for layer, parts in streams.items()}
    found["golden.logits"] = np.concatenate(logits)
    tower = golden_tower(session)
    if tower is not None:
        found["golden.vision.rows"] = tower
    return [_check(artifact, name, found[name]) for name in _in_order(artifact, found)]


def golden_calls(session: Session) -> Iterator[tuple[Arr, list[Arr] | None]]:
    """The calls of the golden prompt: tokens [B,T], and rows of their images where the model takes any."""
    artifact, at, used = session.artifact, 0, 0
    tokens = artifact.array("golden.tokens")
    images = artifact.array("golden.images") if "golden.images" in artifact.tensors else None
    for count in artifact.meta["golden"]["calls"]:
        fed = np.repeat(tokens[None, at : at + count], session.batch, axis=0)
        given = None
        if images is not None:
            many = int((fed[0] == session.model["vision"]["placeholder"]).sum())
            given = [images[used : used + many]] * session.batch
            used += many
        yield fed, given
        at += count


def golden_tower(session: Session) -> Arr | None:
    """Rows of the golden image's span; None where the artifact encodes no images."""
    artifact = session.artifact
    if "vision" not in artifact.meta.get("parts", []) or "golden.vision.rows" not in artifact.tensors:
        return None
    down, across = artifact.meta["golden"]["grid"]
    cell = int(session.model["vision"]["downsample"])
    plan = ImagePlan(0, 0, down, across, -(-down // cell), -(-across // cell))
    inputs = [artifact.array("golden.vision.patches")[None], *tower_indices(plan, cell)]
    rows: Arr = session.backend.call_part("vision", inputs)["rows"][0]
    return rows


def _session(
    artifact: Artifact, count: int, threads: int | None, opener: Opener | None, arch: str
) -> Session:
    """A session with room for the golden prompt."""
    static = artifact.meta.get("onnx", {}).get("static")
    if not static:
        return Session(artifact, context=count, threads=threads, arch=arch)
    if static["context"] < count:
        raise ArtifactError(
            f"was compiled for {static['context']} positions, its golden prompt has {count}",
            where=str(artifact.path), hint="compile with bind_shapes{context=...} of that many or more",
        )  # fmt: skip
    from .static_backend import StaticBackend

    backend = StaticBackend(artifact, threads, probe=opener is None, opener=opener)
    return Session(artifact, backend.batch, backend.context, backend=backend, arch=arch)


def _in_order(artifact: Artifact, found: Mapping[str, Arr]) -> list[str]:
    """Layer by layer the states, then the streams; logits last. Not what a pass has added to the model."""
    names = [name for name in found if name in artifact.tensors]
    places = {name: index for index, name in enumerate(names)}

    def place(name: str) -> tuple[float, bool, int]:
        layer = re.search(r"layers\.(\d+)", name)
        outside = math.inf if name == "golden.logits" else -1
        return int(layer[1]) if layer else outside, name.startswith("golden.block."), places[name]

    return sorted(names, key=place)


def _check(artifact: Artifact, name: str, found: Arr) -> Check:
    """Compare with a golden tensor, which has as much of a state as the prompt fills."""
    expected = artifact.array(name)
    part = found[tuple(slice(0, n) for n in expected.shape)]
    key, golden = name.removeprefix("golden."), artifact.meta["golden"]
    what, tolerance = key.replace(".", " ", 1), float(golden["tolerance"])
    left = golden.get("undecided", {}).get(key)
    if left is None:
        return Check(what, difference(part, expected), tolerance)
    found, want = (part[0], expected[0]) if key.startswith("state.") else (part, expected)
    errors = np.array([difference(f, w, expected) for f, w in zip(found, want, strict=True)])
    there = np.isin(np.arange(len(errors)), left["rows"])
    near, far = errors[~there], errors[there]
    return Check(
        what, float(near.max(initial=0)), tolerance, len(errors), len(far), float(far.max()),
        int((far > tolerance).sum()), min(left["off"] + SPARE, len(far)),
    )  # fmt: skip


def difference(found: Arr, expected: Arr, whole: Arr | None = None) -> float:
    """Largest absolute difference over the range of `whole`, or of what is expected; inf where not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    span = float(np.ptp(expected if whole is None else whole)) if expected.size else 0.0
    worst = float(np.abs(found.astype(np.float64) - expected).max()) if expected.size else 0.0
    return worst / span if span else worst
