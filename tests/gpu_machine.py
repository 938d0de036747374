"""A machine with several devices for tests: a driver's library whose streams run as late as they may.

What is sent to a stream is done when somebody waits for it, directly or through an event; so what was put
into no order happens in the wrong one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_support import FakeDriver

from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.container.launches import Argument, Buffer, Kernel, Launch, Parameter
from dsv4c.runtime.container.plan import Handover, Plan, Program, Stage

WIDE = 4
"""Columns of a row of the plan below."""


class Machine(FakeDriver):
    """Devices with memory of their own and a stream each; kernels are `add_one` and `sum_up` of `chain`.

    Attributes:
        events: whether waiting for an event has an effect; without it nothing keeps streams in order.
        log: what happened, as (what, device).
    """

    def __init__(self, devices: int, **facts: Any) -> None:
        super().__init__(devices=devices, **facts)
        self.events, self.log = True, list[tuple[str, int]]()
        self.current, self.reached, self.free = 0, set[tuple[int, int]](), 1 << 30
        self.owner: dict[int, int] = {}
        self.names: list[str] = []
        self.queues: list[list[Callable[[], None]]] = []
        self.homes: list[int] = []
        self.done: list[int] = []
        self.recorded: dict[int, tuple[int, int]] = {}
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: list[list[Callable[[], None]]] = []

    # contexts: a device's is its number and one, which no null pointer is

    def _deviceget(self, out: Any, number: Any) -> int:
        out._obj.value = number.value
        return 0

    def _deviceprimaryctxretain(self, out: Any, device: Any) -> int:
        out._obj.value = device.value + 1
        return 0

    def _ctxsetcurrent(self, context: Any) -> int:
        self.current = context.value - 1
        return 0

    def _setdevice(self, number: Any) -> int:
        self.current = number.value
        return 0

    def _memgetinfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value = self.free
        return 0

    _memgetinfo = _memgetinfo_v2

    def _memalloc_v2(self, out: Any, nbytes: Any) -> int:
        super()._memalloc_v2(out, nbytes)
        self.owner[out._obj.value] = self.current
        return 0

    _malloc = _memalloc_v2

    def _reach(self, peer: int) -> int:
        if (self.current, peer) in self.reached:
            return 704
        self.reached.add((self.current, peer))
        return 0

    def _ctxenablepeeraccess(self, context: Any, flags: Any) -> int:
        return self._reach(context.value - 1)

    def _deviceenablepeeraccess(self, number: Any, flags: Any) -> int:
        return self._reach(number.value)

    # streams

    def _streamcreate(self, out: Any, flags: Any) -> int:
        self.queues.append([])
        self.homes.append(self.current)
        self.done.append(0)
        out._obj.value = len(self.queues)
        return 0

    _streamcreatewithflags = _streamcreate

    def _send(self, stream: Any, what: Callable[[], None]) -> int:
        number = stream.value - 1
        assert self.homes[number] == self.current, "a stream of a device that is not active"
        (self.queues[number] if self.captured is None else self.captured).append(what)
        return 0

    def _until(self, stream: int, count: int) -> None:
        """Do what was sent to a stream, up to a place."""
        while self.done[stream] < count:
            self.done[stream] += 1
            self.queues[stream][self.done[stream] - 1]()

    def _streamsynchronize(self, stream: Any) -> int:
        self._until(stream.value - 1, len(self.queues[stream.value - 1]))
        return 0

    def _eventcreate(self, out: Any, flags: Any) -> int:
        out._obj.value = len(self.recorded) + 1
        self.recorded[len(self.recorded) + 1] = (0, 0)
        return 0

    _eventcreatewithflags = _eventcreate

    def _eventrecord(self, event: Any, stream: Any) -> int:
        number = stream.value - 1
        assert self.homes[number] == self.current, "an event of a device that is not active"
        self.recorded[event.value] = number, len(self.queues[number])
        return 0

    def _streamwaitevent(self, stream: Any, event: Any, flags: Any) -> int:
        place = self.recorded[event.value]
        return self._send(stream, lambda: self._until(*place) if self.events else None)

    # copies and launches

    def _mine(self, address: int, nbytes: int, device: int) -> None:
        found = [
            a for a, held in self.memory.items() if a <= address and address + nbytes <= a + len(held) - 256
        ]
        assert [self.owner[a] for a in found] == [device], f"{address:#x} is no memory of device {device}"

    def _move(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    def _memcpyhtodasync_v2(self, to: Any, source: Any, nbytes: Any, stream: Any) -> int:
        self._mine(to.value, nbytes.value, self.current)
        kept = ctypes.create_string_buffer(ctypes.string_at(source.value, nbytes.value), nbytes.value)
        return self._send(stream, lambda: self._move(to.value, ctypes.addressof(kept), nbytes.value))

    def _memcpydtohasync_v2(self, to: Any, source: Any, nbytes: Any, stream: Any) -> int:
        self._mine(source.value, nbytes.value, self.current)
        return self._send(stream, lambda: self._move(to.value, source.value, nbytes.value))

    _memcpyhtodasync, _memcpydtohasync = _memcpyhtodasync_v2, _memcpydtohasync_v2

    def _peer(self, to: Any, here: int, source: Any, there: int, nbytes: Any, stream: Any) -> int:
        self._mine(to.value, nbytes.value, here)
        self._mine(source.value, nbytes.value, there)
        assert here == self.current != there

        def copy() -> None:
            self.log.append((f"copy from {there}", here))
            self._move(to.value, source.value, nbytes.value)

        return self._send(stream, copy)

    def _memcpypeerasync(self, to: Any, here: Any, source: Any, there: Any, nbytes: Any, stream: Any) -> int:
        known = 1 if "cuMemcpyPeerAsync" in self.calls else 0  # contexts there, numbers of devices here
        return self._peer(to, here.value - known, source, there.value - known, nbytes, stream)

    def _modulegetfunction(self, out: Any, module: Any, name: Any) -> int:
        self.names.append(name.value.decode())
        out._obj.value = len(self.names)
        return 0

    def _launchkernel(self, function: Any, *rest: Any) -> int:
        super()._launchkernel(function, *rest)
        name, (stream, places) = self.names[function.value - 1], rest[7:9]
        x, y = (ctypes.c_uint64.from_address(places[i]).value for i in range(2))
        count = WIDE * ctypes.c_int32.from_address(places[2]).value
        for address in (x, y):
            self._mine(address, 4 * count, self.current)
        device = self.current

        def work() -> None:
            self.log.append((name, device))
            taken, given = (np.ctypeslib.as_array((ctypes.c_float * count).from_address(a)) for a in (x, y))
            given[...] = taken + 1 if name == "add_one" else given + taken

        return self._send(stream, work)

    _modulelaunchkernel = _launchkernel

    # graphs

    def _streambegincapture_v2(self, stream: Any, mode: Any) -> int:
        self.captured = []
        return 0

    _streambegincapture = _streambegincapture_v2

    def _streamendcapture(self, stream: Any, out: Any) -> int:
        assert self.captured is not None
        self.graphs.append(self.captured)
        self.captured = None
        out._obj.value = len(self.graphs)
        return 0

    def _graphinstantiatewithflags(self, out: Any, graph: Any, *rest: Any) -> int:
        out._obj.value = graph.value
        return 0

    def _graphlaunch(self, graph: Any, stream: Any) -> int:
        for work in self.graphs[graph.value - 1]:
            self._send(stream, work)
        return 0


def chain(vendor: str = "cuda") -> Plan:
    """Four devices: x -> a, a -> b, b -> c and a -> d, a is added to the state `total`.

    a goes from the first to all others and b from the second to the third; c and d are results. So c is
    x + 3, d is x + 2, and every step adds x + 1 to `total`, which nothing waits for.
    """
    pointers = Parameter("x", "*fp32", "r", f"M*{WIDE}"), Parameter("y", "*fp32", "w", f"M*{WIDE}")
    add_one = Kernel("add_one", "rowwise", "add_one", (*pointers, Parameter("M", "i32")), {}, 4, 1, nbytes=4)
    rw = dataclasses.replace(pointers[1], access="rw")
    sum_up = dataclasses.replace(
        add_one, name="sum_up", entry="sum_up", parameters=(pointers[0], rw, add_one.parameters[2])
    )
    shape = ("B", "T", str(WIDE))

    def temporary(name: str, slot: int, last: int) -> Buffer:
        return Buffer(name, "temporary", "f32", shape, slot, slot, last)

    def launch(kernel: int, x: str, y: str) -> Launch:
        given = Argument(x), Argument(y), Argument(integer="B*T")
        return Launch(kernel, ("B", "1", "1"), given, f"{x} to {y}")

    slot, programs = f"(B*T*{4 * WIDE}+255)//256*256", list[Program]()
    for few, rows, most in (("few", "B*T", 16), ("many", "1", 0)):
        stages: list[tuple[tuple[Buffer, ...], tuple[Launch, ...], dict[str, str]]] = [
            ((temporary("a", 0, 0),), (launch(0, "x", "a"),), {"a": "a"}),
            ((temporary("b", 0, 0),), (launch(0, "a", "b"),), {"b": "b"}),
            (
                (temporary("c", 0, 1), temporary("d", 1, 1)), (launch(0, "b", "c"), launch(0, "a", "d")),
                {"c": "c", "d": "d"},
            ),
            ((), (launch(1, "a", "total"),), {}),
        ]  # fmt: skip
        programs += [
            Program(f"{n}.{few}", rows, most, own, (slot,) * len(own), launches, out, stage=n)
            for n, (own, launches, out) in enumerate(stages)
        ]
    handed = {name: Buffer(name, "handed", "f32", shape) for name in "ab"}
    ways = (("a", 0, 1), ("a", 0, 2), ("b", 1, 2), ("a", 0, 3))
    buffers = Buffer("x", "input", "f32", shape), Buffer("total", "state", "f32", ("B", "T", "R", str(WIDE)))
    arch = {"cuda": ("sm_90a", "9.0"), "hip": ("gfx942", "gfx942")}[vendor]
    return Plan(
        2, vendor, *arch, True, 0, 1 << 16, buffers, (add_one, sum_up), tuple(programs),
        tuple(Stage(n, n) for n in range(4)),
        tuple(Handover(source, target, handed[name]) for name, source, target in ways),
    )  # fmt: skip


def written(plan: Plan, path: Path) -> Artifact:
    """An artifact with a plan, and code that no driver of tests reads."""
    with ArtifactWriter(path) as writer:
        writer.add_section("plan", json.dumps(plan.as_json()).encode())
        writer.add_section("code", b"code")
    return Artifact.open(path)
