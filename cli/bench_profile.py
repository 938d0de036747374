"""The half of `bench` that profiles: gathers the recorded runs of each phase, and shows where time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dsv4c.runtime import Session
from dsv4c.runtime.profile import Phase, Recorder, measure_ceilings, summarise

from .show import table

Facts = dict[str, Any]


class Profiles:
    """The phases of the runs of a session that were recorded."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._recorder = Recorder(session.backend, session.context)
        self._runs: dict[str, list[Phase]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what is done inside as one run of a phase."""
        with self._recorder as recorder:
            started = time.perf_counter()
            yield
            seconds = time.perf_counter() - started
        found = summarise(self._session.artifact, recorder.steps, seconds)
        self._runs.setdefault(name, []).append(found)

    def facts(self, threads: int | None, plain: Mapping[str, Sequence[float]]) -> Facts:
        """The ceilings, and by phase the run of median time beside the median of `plain` seconds."""
        phases = {
            name: {
                **sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2].facts(),
                "plain_seconds": statistics.median(plain[name]),
            }
            for name, runs in self._runs.items()
        }
        ceilings = measure_ceilings(self._session.backend, threads)
        for phase in phases.values():
            for row in (*phase["ops"], *phase["layers"]):
                row |= against(row, ceilings)
        return {"ceilings": ceilings, "phases": phases}


def against(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> Facts:
    """What the calls of a row reached.

    Returns:
        `flops_per_second`, `bytes_per_second`, and `roof`, the least seconds that its operations or its
        bytes need on this machine over those it took.
    """
    seconds, moved = row["seconds"], row["weight_bytes"] + row["data_bytes"]
    least = max(row["flops"] / ceilings["flops_per_second"], moved / ceilings["bytes_per_second"])
    if not seconds:
        return {"flops_per_second": 0.0, "bytes_per_second": 0.0, "roof": 0.0}
    return {
        "flops_per_second": row["flops"] / seconds, "bytes_per_second": moved / seconds,
        "roof": least / seconds,
    }  # fmt: skip


def profile_text(profile: Facts) -> str:
    """Per phase where the time goes, in milliseconds a step, by op and by layer."""
    c = profile["ceilings"]
    head = (
        f"ceilings, {c['threads']} threads: {c['flops_per_second'] / 1e9:.4g} GFLOP/s in float32, "
        f"{c['bytes_per_second'] / 1e9:.3g} GB/s read; not measured: {c['left_out']}"
    )
    return "\n\n".join([head, *(_phase_text(name, phase) for name, phase in profile["phases"].items())])


def shares(phase: Facts) -> list[tuple[str, float]]:
    """Where the seconds of a phase go: kernels and what is around them."""
    return [
        ("kernels", phase["kernel_seconds"]),
        ("functions of the virtual machine", phase["builtin_seconds"]),
        ("its calls", phase["dispatch_seconds"]),
        ("Python", phase["outside_seconds"]),
    ]


def steps_of(phase: Facts) -> str:
    """How many steps, and how long each is."""
    count = phase["steps"]
    return f"{count} step{'s' if count > 1 else ''} of {1000 * phase['seconds'] / count:.3f} ms"


def recording(phase: Facts) -> str:
    """What recording changed, in words."""
    plain = phase["plain_seconds"]
    return (
        f"{100 * (phase['seconds'] / plain - 1):+.1f} % against {1000 * plain / phase['steps']:.3f} ms "
        "without recording"
    )


def cells(row: Facts, phase: Facts) -> tuple[str, ...]:
    """Calls and milliseconds of a step, share, GFLOP/s, GB/s, percent of the roof."""
    return (
        f"{row['calls'] / phase['steps']:.4g}", f"{1000 * row['seconds'] / phase['steps']:.3f}",
        f"{100 * row['seconds'] / phase['seconds']:.1f}", f"{row['flops_per_second'] / 1e9:.3g}",
        f"{row['bytes_per_second'] / 1e9:.3g}", f"{100 * row['roof']:.0f}",
    )  # fmt: skip


COLUMNS = ("calls", "ms", "%", "GFLOP/s", "GB/s", "% of roof")
"""The heads of `cells`."""


def _phase_text(name: str, phase: Facts) -> str:
    where = ", ".join(f"{what} {100 * s / phase['seconds']:.1f} %" for what, s in shares(phase))
    head = f"{name}: {steps_of(phase)}, {recording(phase)}\n{where}"
    tables = [
        table([(row["name"], *cells(row, phase)) for row in phase[kind]], (title, *COLUMNS), range(1, 7))
        for kind, title in (("ops", f"{name}, op"), ("layers", f"{name}, layer"))
    ]
    return "\n\n".join([head, *tables])
