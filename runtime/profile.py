"""Where the time of a TVM session goes: every call of its code by op and place, and what the machine can do.

The code carries an instrument that logs each call of its virtual machine natively; the manifest lists for
which op each call is and what that costs (`meta["tvm"]["calls"]`). Knows no command and no page.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, UsageError

from .buffers import aligned, zeros
from .container import Artifact
from .container.costs import evaluate

Ints = npt.NDArray[np.int64]
Facts = dict[str, Any]
_EVENT, _HEAD, _WORDS = 3, 2, 1 << 22
"""Words of an event (name, seconds, nanoseconds), of the head of a log, and of a log: half holds a step."""


def can_profile(artifact: Artifact) -> bool:
    return "calls" in artifact.meta.get("tvm", {})


def check_profile(artifact: Artifact) -> None:
    """Refuse an artifact whose calls cannot be told apart.

    Raises:
        UsageError: it is not in format tvm.
        ArtifactError: it was compiled before profiles were.
    """
    where = str(artifact.path)
    if artifact.meta["format"] != "tvm":
        raise UsageError(
            f"an artifact in format {artifact.meta['format']} cannot be profiled", where=where,
            allowed="format tvm",
            hint="dsv4c compile --format tvm; without --profile, dsv4c bench times every format",
        )  # fmt: skip
    if not can_profile(artifact):
        raise ArtifactError("it does not say what its code calls", where=where, hint="compile it again")


@dataclass(frozen=True)
class Step:
    """One run of a program: the sizes of its arguments with `past`, and the events of its calls [n,3]."""

    program: str
    sizes: Mapping[str, int]
    events: Ints


@dataclass
class Spent:
    """What some calls took and needed.

    Attributes:
        calls: how many.
        seconds: inside them.
        flops, weight_bytes, data_bytes: by the meaning of their ops, see `ir.cost`.
    """

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    weight_bytes: int = 0
    data_bytes: int = 0


@dataclass
class Phase:
    """What the steps of a phase took.

    Attributes:
        seconds: of the phase as its caller saw it.
        kernel_seconds: in calls that ops make.
        builtin_seconds: in the virtual machine's own functions: allocation, shapes, checks of arguments.
        dispatch_seconds: between the calls of a step.
        outside_seconds: before the first call of a step and after the last: Python.
        ops, layers, kernels: by op name; by place, `shared` is no layer's; by kernel, without costs.
    """

    seconds: float
    steps: int = 0
    kernel_seconds: float = 0.0
    builtin_seconds: float = 0.0
    dispatch_seconds: float = 0.0
    outside_seconds: float = 0.0
    ops: dict[str, Spent] = field(default_factory=dict)
    layers: dict[str, Spent] = field(default_factory=dict)
    kernels: dict[str, Spent] = field(default_factory=dict)

    def facts(self) -> Facts:
        """As JSON values: the three tables as lists with a `name` each, the most seconds first."""
        found = asdict(self)
        for table in ("ops", "layers", "kernels"):
            rows = [{"name": name, **row} for name, row in found[table].items()]
            found[table] = sorted(rows, key=lambda row: -row["seconds"])
        return found


class Recorder:
    """Logs the calls of a backend while entered; `steps` are those since then.

    Args:
        backend: a `TvmBackend`.
        context: positions of its session.

    Raises:
        UsageError, ArtifactError: see `check_profile`.
    """

    def __init__(self, backend: Any, context: int) -> None:
        check_profile(backend.artifact)
        self._backend, self._context = backend, context
        self._log: Ints = np.zeros(_WORDS, np.int64)
        self._instrument = backend.probe("log_call")
        self._begun: list[tuple[Any, list[tuple[int, ...]], int, int]] = []
        self.steps: list[Step] = []

    def __enter__(self) -> Self:
        self.steps, self._begun = [], []
        self._log[:_HEAD] = _HEAD, _WORDS
        self._instrument(self._log.ctypes.data)
        self._backend.watch(self._begin, self._instrument)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend.watch(None, None)
        self._instrument(0)
        if error is None:
            self._empty(int(self._log[0]))

    def _begin(
        self, program: Any, inputs: Sequence[npt.NDArray[Any]], state: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Called before every run of a program; does little, so that workers stay awake."""
        start = int(self._log[0])
        if start > _WORDS // 2:
            self._empty(start)
            start = _HEAD
        past = int(state["pos"].max()) if "pos" in state else 0
        self._begun.append((program, [a.shape for a in inputs], past, start))

    def _empty(self, end: int) -> None:
        """Make steps of what the log holds, and begin it anew."""
        if end > _WORDS:
            raise ArtifactError(
                f"a step makes more calls than a profile holds ({_WORDS // 2 // _EVENT // 2})",
                where=str(self._backend.artifact.path),
            )
        ends = [start for *_, start in self._begun[1:]] + [end]
        for (program, shapes, past, start), stop in zip(self._begun, ends, strict=True):
            sizes = {"ctx": self._context, "past": past}
            for fact, shape in zip(program.inputs.values(), shapes, strict=True):
                sizes |= dict(zip(fact["shape"], shape, strict=True))
            self.steps.append(Step(program.name, sizes, self._log[start:stop].reshape(-1, _EVENT).copy()))
        self._begun.clear()
        self._log[0] = _HEAD


def summarise(artifact: Artifact, steps: Iterable[Step], seconds: float) -> Phase:
    """What the steps of a phase that took `seconds` spent, and where.

    Raises:
        ArtifactError: the code made other calls than the manifest lists.
    """
    phase = Phase(seconds)
    inside = 0.0
    for step in steps:
        facts = artifact.meta["tvm"]
        calls = (facts if step.program == "step" else facts["parts"][step.program])["calls"]
        names = [_name(address) for address in step.events[::2, 0]]
        ticks = step.events[:, 1] * 1_000_000_000 + step.events[:, 2]
        spent = (ticks[1::2] - ticks[::2]) / 1e9
        own = np.isin(names, calls["functions"])
        expected = [calls["functions"][function] for _, function in calls["order"]]
        paired = (step.events[::2, 0] == step.events[1::2, 0]).all()
        if not paired or [name for name, ours in zip(names, own, strict=True) if ours] != expected:
            raise ArtifactError(
                f"program {step.program!r} makes other calls than its manifest lists",
                where=str(artifact.path),
            )
        whole = float(ticks[-1] - ticks[0]) / 1e9
        phase.steps += 1
        phase.kernel_seconds += float(spent[own].sum())
        phase.builtin_seconds += float(spent[~own].sum())
        phase.dispatch_seconds += whole - float(spent.sum())
        inside += whole
        _add(phase, calls, step.sizes, spent[own].tolist())
    phase.outside_seconds = seconds - inside
    return phase


def _name(address: int) -> str:
    return ctypes.string_at(int(address)).decode()


def _add(phase: Phase, calls: Facts, sizes: Mapping[str, int], spent: Sequence[float]) -> None:
    """Count the calls of one step, and the cost of every op once."""
    rows = []
    costs = [tuple(evaluate(tree, sizes) for tree in cost) for cost in calls["costs"]]
    for name, place, cost in calls["ops"]:
        rows.append((phase.ops.setdefault(name, Spent()), phase.layers.setdefault(layer_of(place), Spent())))
        for row in rows[-1]:
            flops, weight_bytes, data_bytes = costs[cost]
            row.flops += flops
            row.weight_bytes += weight_bytes
            row.data_bytes += data_bytes
    for (op, function), seconds in zip(calls["order"], spent, strict=True):
        kernel = phase.kernels.setdefault(calls["functions"][function], Spent())
        for row in (*rows[op], kernel):
            row.calls += 1
            row.seconds += seconds


def layer_of(place: str) -> str:
    """The part of the model a location is in: `layers.3`, `head`; `shared` where there is none."""
    first, _, rest = place.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "layers" else first or "shared"


def measure_ceilings(backend: Any, threads: int | None, seconds: float = 0.5) -> Facts:
    """What this machine can do at most, by functions of the artifact on its workers.

    Returns:
        `bytes_per_second` read from 256 MiB; `flops_per_second`, multiplications and additions of float32 in
        registers; `threads`; `left_out`, what is not measured. The best of `seconds` of trials each.
    """
    workers = threads or len(os.sched_getaffinity(0))
    sums = zeros((workers, 16), np.dtype(np.float32))
    data = zeros((workers, (1 << 26) // workers // 64 * 64), np.dtype(np.float32))
    data[...] = 1.0  # every page its own
    read, add = backend.probe("read_memory"), backend.probe("multiply_add")
    rounds, terms = aligned(np.full(1, 1 << 20, np.int64)), aligned(np.array([0.5, 1.0], np.float32))
    operations = int(backend.artifact.meta["tvm"]["probes"]["operations"]) * int(rounds[0]) * workers
    return {
        "bytes_per_second": data.nbytes / _best(lambda: read(data, sums), seconds),
        "flops_per_second": operations / _best(lambda: add(terms, rounds, sums), seconds),
        "threads": workers,
        "left_out": "instructions that multiply BF16 or INT8",
    }


def _best(run: Callable[[], object], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        stop = time.perf_counter()
        best = min(best, stop - start)
        if stop > end:
            return best
