"""A plan's steps under the clock: whole steps, and every launch alone. Knows no card and no table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from filling import Filler
from metering import Meter
from summing import GROUPED

from dsv4c.runtime.container.costs import Needs
from dsv4c.runtime.container.plan import ALIGN, Buffer, Plan, Program
from dsv4c.runtime.container.sizes import size, symbols
from dsv4c.runtime.gpu.device import Device
from dsv4c.runtime.gpu_backend import GpuBackend

CHUNK = 128
"""Launches that are timed behind one piece of other work, which keeps the device busy while they are sent."""
BUSY, PIECE = 0.015, 128 << 20
"""Seconds of that work, about, as sending a chunk takes a few milliseconds; and bytes of the copies it is."""
PASSES = 3
ENOUGH, LEAST = 20.0, 3
"""Seconds after which steps are not repeated further, and how often they are in any case."""


@dataclass(frozen=True)
class Case:
    """Steps of one size: `past` tokens were seen, `context` is the room of the states."""

    kind: str
    batch: int
    tokens: int
    past: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch if self.kind == 'decode' else self.tokens}"

    def sizes(self, plan: Plan) -> dict[str, int]:
        """Every symbol of the plan's arguments, capacities such as `ctx_4` among them."""
        names = {n for b in plan.buffers for text in b.shape for n in symbols(text)}
        room = {n: self.context // int(n.removeprefix("ctx_")) for n in names if n.startswith("ctx_")}
        return {"B": self.batch, "T": self.tokens, "L": 1, "ctx": self.context, **room}


class Held:
    """What a backend reads of an artifact: a plan that was cut, its objects, and what weights there are."""

    def __init__(self, artifact: Any, plan: Plan) -> None:
        self.path, self.tensors = artifact.path, artifact.tensors
        self.array = artifact.array
        self.sections = {"plan": json.dumps(plan.as_json()).encode(), "code": artifact.section("code")}

    def section(self, name: str) -> bytes:
        return bytes(self.sections[name])


@dataclass
class Timed:
    """What one case took; seconds are empty where nothing was measured.

    Attributes:
        steps: of the launches of a step, by events.
        whole: of steps with their copies to and from the device, by the host's clock.
        launches: of each launch alone, medians.
        routes: per call of experts, the routes of each expert.
        finite: whether all logits were.
    """

    case: Case
    program: str
    steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    launches: list[float] = field(default_factory=list)
    routes: list[npt.NDArray[np.int32]] = field(default_factory=list)
    finite: bool = True


class TimedBackend(GpuBackend):
    """A plan whose weights are made up, with its steps repeated at one place."""

    def __init__(self, held: Held, plan: Plan, device: Device, meter: Meter, check: bool) -> None:
        self._device, self._meter, self._filler = device, meter, Filler(plan, device, meter)
        self._rng = np.random.default_rng(2)
        super().__init__(held, device, check=check, resident=True)  # type: ignore[arg-type]
        (self._runner,) = self._runners
        meter.wait()

    def _upload(self, device: Device, buffer: Buffer) -> int:
        if buffer.name in self.artifact.tensors:
            return super()._upload(device, buffer)
        nbytes = size(buffer.elements, {}) * buffer.item_bytes
        address = device.allocate(-(-nbytes // ALIGN) * ALIGN)
        self._filler.weight(buffer, address)
        return address

    def measure(self, case: Case, repeats: int, rate: float | None) -> Timed:
        """Whole steps first, then each launch.

        Args:
            rate: bytes that copies move per second, for the work that keeps the device busy.
        """
        sizes = case.sizes(self.plan)
        program = self.plan.program(sizes)
        arguments = {b.name for b in (*self.plan.inputs(), *self.plan.of_kind("state"))}
        self._check_once("", sizes)
        bound = self._runner.bind("", sizes, arguments)
        inputs = self._inputs(case, sizes)
        self._fill_states(sizes)
        out = Timed(case, program.name)
        logits: npt.NDArray[Any] = np.zeros(0)
        for _ in range(2 + repeats if self._meter.measures else 1):
            self._at(case, sizes)
            start = time.perf_counter()
            for name, array in inputs.items():
                self._runner.write(name, array)
            first = self._meter.mark()
            self._runner.run(bound)
            last = self._meter.mark()
            seconds = self._meter.seconds(first, last)
            logits = self._runner.result(bound, "logits")
            out.whole.append(time.perf_counter() - start)
            out.steps.append(seconds)
            self._meter.forget(first, last)
            if sum(out.steps) > ENOUGH and len(out.steps) >= 2 + LEAST:
                break
        out.finite = bool(np.isfinite(logits).all())
        # two that warm up; the second one records the graph
        out.steps, out.whole = (out.steps[2:], out.whole[2:]) if self._meter.measures else ([], [])
        self._each(case, sizes, program, bound.launches, out, rate)
        return out

    # -------------------------------------------------------------------------------- arguments

    def _inputs(self, case: Case, sizes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
        """Random tokens, all of them real, and logits of the last."""
        table = next(b for b in self.plan.of_kind("weight") if b.name == "embed.weight")
        tokens = self._rng.integers(0, size(table.shape[0], {}), (case.batch, case.tokens))
        given = {
            "tokens": tokens, "n_valid": np.full(case.batch, case.tokens),
            "rows": np.full((case.batch, 1), case.tokens - 1),
        }  # fmt: skip
        return {name: array.astype(np.int32) for name, array in given.items()}

    def _fill_states(self, sizes: Mapping[str, int]) -> None:
        for buffer in self.plan.of_kind("state"):
            nbytes = size(buffer.elements, sizes) * buffer.item_bytes
            if buffer.dtype == "i32":
                zeros = np.zeros(nbytes // 4, np.int32)
                self._runner.write(buffer.name, zeros)
            else:
                self._filler.state(buffer, self._runner.addresses[buffer.name], nbytes)

    def _at(self, case: Case, sizes: Mapping[str, int]) -> None:
        """Every sequence back where the case has it."""
        self._runner.write("pos", np.full(case.batch, case.past, np.int32))

    # ------------------------------------------------------------------------------ each launch

    def _each(
        self, case: Case, sizes: Mapping[str, int], program: Program, launches: Sequence[Any], out: Timed,
        rate: float | None,
    ) -> None:  # fmt: skip
        """Fill in what each launch takes, the device kept busy while a chunk of them is sent."""
        copies = max(1, round(BUSY * rate / 2 / PIECE)) if rate and self._meter.measures else 1
        busy = [self._device.allocate(PIECE) for _ in range(2)]
        counts = self._counted(program)
        kept = {i: self._device.allocate(4 * n) for i, n in counts.items()}
        found: list[list[float]] = [[] for _ in launches]
        for _ in range(PASSES if self._meter.measures else 1):
            self._at(case, sizes)
            for begin in range(0, len(launches), CHUNK):
                for _ in range(copies):
                    self._meter.copy(busy[1], busy[0], PIECE)
                marks = [first := self._meter.mark()]
                pairs = []
                for index, (kernel, grid, values) in enumerate(launches[begin : begin + CHUNK], begin):
                    self._device.launch(kernel, grid, values)
                    marks.append(last := self._meter.mark())
                    pairs.append((first, last))
                    first = last
                    if index in counts:
                        place = [p.name for p in self.plan.kernels[kernel].parameters].index("counts")
                        self._meter.copy(kept[index], int(values[place]), 4 * counts[index])
                        marks.append(first := self._meter.mark())
                for index, (one, two) in enumerate(pairs, begin):
                    found[index].append(self._meter.seconds(one, two))
                self._meter.forget(*marks)
        out.launches = [statistics.median(f) for f in found] if self._meter.measures else []
        for index, count in counts.items():
            routes = np.zeros(count, np.int32)
            self._device.read(kept[index], routes)
            out.routes.append(routes)
        for address in (*busy, *kept.values()):
            self._device.free(address)

    def _counted(self, program: Program) -> dict[int, int]:
        """Launches that count routes by expert -> how many experts."""
        kernels = [self.plan.kernels[launch.kernel] for launch in program.launches]
        return {i: int(k.constants["E"]) for i, k in enumerate(kernels) if k.name == "expert_count"}


def read_experts(
    plan: Plan, program: Program, needs: Sequence[Needs], routes: Sequence[npt.NDArray[np.int32]]
) -> list[Needs]:
    """The needs of launches with the bytes of the experts that tokens chose, not of as many as they might."""
    out, part, left = list(needs), 1.0, list(routes)
    for index, launch in enumerate(program.launches):
        name = plan.kernels[launch.kernel].name
        if name == "expert_count" and left:
            counts = left.pop(0)
            might = min(int(counts.sum()), len(counts))
            part = int((counts > 0).sum()) / might if might else 1.0
        elif name in GROUPED:
            out[index] = replace(out[index], weight_bytes=part * out[index].weight_bytes)
    return out
