"""One stage of a launch plan on its device: memory, sizes bound to launches, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container.launches import ALIGN, Argument, Buffer
from dsv4c.runtime.container.plan import Plan, Program
from dsv4c.runtime.container.sizes import size

from .device import Device, Scalar

Arr = npt.NDArray[Any]

NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"), "i32": np.dtype("<i4"), "bf16": np.dtype("<u2"), "f16": np.dtype("<f2"),
    "i8": np.dtype("i1"),
}  # fmt: skip
"""Element type of inputs, states and results -> what their arrays have."""

_ARENA = ""


@dataclass
class Bound:
    """A program at given sizes.

    Attributes:
        launches: kernel, grid and every value of each.
        outputs: by name the address, shape and type of what it leaves.
        handed: stage -> what it hands over to this one: name, address here, bytes.
        repeats: whether it is worth a graph.
    """

    launches: list[tuple[int, tuple[int, int, int], list[Scalar]]]
    outputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    handed: dict[int, list[tuple[str, int, int]]]
    repeats: bool
    runs: int = 0
    graph: object | None = None


class Runner:
    """A stage of a plan on a device. Every method but `bind` leaves the device active.

    Args:
        upload: puts a weight on the device and returns its address.
        where: the artifact, for errors.

    Attributes:
        held: names of the inputs, states and weights that lie here.

    Raises:
        ArtifactError: the weights do not fit the device's memory.
    """

    def __init__(
        self, plan: Plan, stage: int, device: Device, upload: Callable[[Device, Buffer], int], where: str
    ) -> None:
        self.plan, self.stage, self.device, self._where = plan, stage, device, where
        held = plan.held(stage)
        self.held = {b.name for b in held}
        weights = [b for b in held if b.kind == "weight"]
        self.device.activate()
        self._check_room(sum(nbytes(b, {}) for b in weights), "its weights")
        self.addresses = {b.name: upload(device, b) for b in weights}
        self._memory: dict[str, tuple[int, int]] = {}
        self._bound: dict[tuple[str, tuple[tuple[str, int], ...]], Bound] = {}

    def write(self, name: str, array: Arr) -> None:
        """Copy an input or a state here, for which `bind` has made room."""
        self.device.activate()
        self.device.write(self.addresses[name], array)

    def read(self, name: str, array: Arr) -> None:
        """Copy a state from here, after everything that was launched."""
        self.device.activate()
        self.device.read(self.addresses[name], array)

    def result(self, bound: Bound, name: str) -> Arr:
        """An output of a program that has run."""
        address, shape, dtype = bound.outputs[name]
        out = np.empty(shape, dtype)
        self.device.activate()
        self.device.read(address, out)
        return out

    # -------------------------------------------------------------------------- binding to sizes

    def bind(self, part: str, sizes: dict[str, int], arguments: Iterable[str]) -> Bound:
        """A program of a part at some sizes, with room for its arguments, as far as they lie here.

        Raises:
            ArtifactError: the device has no room for them; nothing has changed then.
        """
        key = part, tuple(sorted(sizes.items()))
        if key not in self._bound:
            program = self.plan.program(sizes, part, self.stage)
            self._place(program, sizes, self.held.intersection(arguments))
            self._bound[key] = self._filled(program, sizes)
        return self._bound[key]

    def _place(self, program: Program, sizes: dict[str, int], arguments: set[str]) -> None:
        """Room for arguments and temporaries; what has grown moves, and everything bound is void."""
        needs = {b.name: nbytes(b, sizes) for b in self.plan.buffers if b.name in arguments}
        if not program.part:
            needs |= {h.buffer.name: nbytes(h.buffer, sizes) for h in self.plan.handed_to(self.stage)}
        needs[_ARENA] = sum(size(s, sizes) for s in program.slots)
        there = {name: self._memory.get(name, (0, -1))[1] for name in needs}
        grown = {name: max(n, ALIGN) for name, n in needs.items() if n > there[name]}
        self.device.activate()
        if grown:
            more = sum(n - max(there[name], 0) for name, n in grown.items())
            self._check_room(more, "states and temporaries")
        for name, wanted in grown.items():
            if there[name] >= 0:
                self._bound.clear()
                self.device.free(self._memory.pop(name)[0])
            self._memory[name] = self.device.allocate(wanted), needs[name]
        self.addresses |= {name: self._memory[name][0] for name in needs}

    def _check_room(self, wanted: int, what: str) -> None:
        free = self.device.free_bytes()
        if free is not None and wanted > free:
            several = len(self.plan.stages) > 1
            who = f"stage {self.stage} ({self.plan.stages[self.stage]})" if several else "the model"
            raise ArtifactError(
                f"{who} needs {wanted} bytes more for {what}, and device {self.stage} has {free} free",
                where=self._where,
                hint="compile for more devices (--devices), or take a smaller batch, context or chunk",
            )  # fmt: skip

    def _filled(self, program: Program, sizes: dict[str, int]) -> Bound:
        starts, at = [], self.addresses[_ARENA]
        for text in program.slots:
            starts.append(at)
            at += size(text, sizes)
        places = {b.name: starts[b.slot] for b in program.temporaries}
        buffers = self.plan.known_to(program)

        def value(argument: Argument) -> Scalar:
            if not argument.buffer:
                return size(argument.integer, sizes) if argument.integer else argument.number or 0.0
            start = places.get(argument.buffer, self.addresses.get(argument.buffer, 0))
            return start + size(argument.offset, sizes) * buffers[argument.buffer].item_bytes

        launches = []
        for launch in program.launches:
            x, y, z = (size(g, sizes) for g in launch.grid)
            launches.append((launch.kernel, (x, y, z), [value(a) for a in launch.arguments]))
        outputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        for name, buffer_name in program.outputs.items():
            buffer = buffers[buffer_name]
            shape = tuple(size(s, sizes) for s in buffer.shape)
            address = places.get(buffer_name, self.addresses.get(buffer_name, 0))
            outputs[name] = address, shape, NUMPY[buffer.dtype]
        handed: dict[int, list[tuple[str, int, int]]] = {}
        for h in () if program.part else self.plan.handed_to(self.stage):
            place = h.buffer.name, self.addresses[h.buffer.name], exact_bytes(h.buffer, sizes)
            handed.setdefault(h.source, []).append(place)
        return Bound(launches, outputs, handed, program.most > 0)

    # ---------------------------------------------------------------------------------- running

    def take(self, bound: Bound, ran: Sequence[tuple[Runner, Bound]]) -> None:
        """Copy here what earlier stages hand over to this one.

        Args:
            bound: what is to run here.
            ran: of every earlier stage its runner and what it has just run.
        """
        for number, places in bound.handed.items():
            source, made = ran[number]
            copies = [(here, made.outputs[name][0], count) for name, here, count in places]
            self.device.take(source.device, copies)

    def run(self, bound: Bound) -> None:
        """The launches: one by one, and from the second step of few rows at these sizes on as one graph."""
        self.device.activate()
        bound.runs += 1
        if bound.graph is None and bound.repeats and bound.runs == 2 and self.device.begin_graph():
            self._launch(bound)
            bound.graph = self.device.end_graph()
        if bound.graph is not None:
            self.device.run_graph(bound.graph)
        else:
            self._launch(bound)

    def _launch(self, bound: Bound) -> None:
        for kernel, grid, values in bound.launches:
            self.device.launch(kernel, grid, values)


def exact_bytes(buffer: Buffer, sizes: Mapping[str, int]) -> int:
    """Bytes of what a buffer holds."""
    return size(buffer.elements, sizes) * buffer.item_bytes


def nbytes(buffer: Buffer, sizes: Mapping[str, int]) -> int:
    """Bytes of a buffer's place, a multiple of `ALIGN`."""
    return -(-exact_bytes(buffer, sizes) // ALIGN) * ALIGN
