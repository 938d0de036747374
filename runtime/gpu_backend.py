"""Runs a launch plan: weights and states on the device, and the launches of a step in order.

Needs the driver of the device and nothing else. A step copies its inputs there and its results back; states
stay on the device for as long as nobody else has written to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError

from .container import Artifact
from .container.plan import ALIGN, Argument, Buffer, Plan, Program
from .container.sizes import size
from .gpu.check import check_program
from .gpu.device import Device, Scalar
from .images.rows import ImageRows, no_images
from .undo import Undo

_NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"), "i32": np.dtype("<i4"), "bf16": np.dtype("<u2"), "f16": np.dtype("<f2"),
    "i8": np.dtype("i1"),
}  # fmt: skip


_SMALL = 4096
"""Bytes up to which a state is read back after every step."""


@dataclass
class _Bound:
    """A program at given sizes: its launches with every value filled in, and where its results lie."""

    launches: list[tuple[int, tuple[int, int, int], list[Scalar]]]
    outputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    repeats: bool
    runs: int = 0
    graph: object | None = None


class GpuBackend:
    """The step of one artifact on one device.

    Args:
        device: what executes launches; None opens the one that the plan names.
        check: whether launches are checked before they first run at any sizes; see `gpu.check`.
        resident: whether states stay on the device between steps; their arrays are then current only after
            `bring`, but for small ones such as the position.

    Attributes:
        plan: the launch plan of the artifact.
        undo: None: a step reads no file.

    Raises:
        ArtifactError: the plan is damaged, or does not fit the device.
        ToolchainError: there is no driver, or it is too old.
    """

    undo: Undo | None = None

    def __init__(
        self, artifact: Artifact, device: Device | None = None, check: bool = False, resident: bool = False
    ) -> None:
        self.artifact, self._check, self._resident = artifact, check, resident
        self.plan = Plan.from_json(json.loads(artifact.section("plan")), str(artifact.path))
        self._device = device or open_device(self.plan, str(artifact.path))
        self._device.load(self.plan.kernels, artifact.section("code") if "code" in artifact.sections else b"")
        self._addresses = {b.name: self._upload(b) for b in self.plan.of_kind("weight")}
        self._memory: dict[str, tuple[int, int]] = {}
        self._bound: dict[tuple[str, tuple[tuple[str, int], ...]], _Bound] = {}
        self._owner: dict[str, npt.NDArray[Any]] | None = None

    def step(
        self,
        tokens: npt.NDArray[np.int32],
        n_valid: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        state: dict[str, npt.NDArray[Any]],
        images: ImageRows | None = None,
    ) -> npt.NDArray[np.float32]:
        """One step: tokens i32 [B,T], n_valid i32 [B], rows i32 [B,L] -> logits f32 [B,L,V].

        `state` is updated in place. `images` are the rows of this call's image tokens; without them such
        tokens take their row of the embedding.
        """
        inputs: dict[str, npt.NDArray[Any]] = {"tokens": tokens, "n_valid": n_valid, "rows": rows}
        for buffer in self.plan.inputs():
            if buffer.name == "images":
                given = images or no_images(len(tokens), int(buffer.shape[2]))
                inputs |= {"images": given.rows, "n_images": given.counts}
        found = self.call(inputs, state)
        logits: npt.NDArray[np.float32] = found["logits"]
        return logits

    def call(
        self, inputs: dict[str, npt.NDArray[Any]], state: dict[str, npt.NDArray[Any]]
    ) -> dict[str, npt.NDArray[Any]]:
        """One step of any graph: its inputs by name -> its results by name; `state` is updated in place."""
        if self._owner is not state:
            self.bring()
        given = {b.name: _as(b, inputs) for b in self.plan.inputs()}
        held = {b.name: _as(b, state) for b in self.plan.of_kind("state")}
        bound = self._bind("", self._sizes(given | held), {*given, *held})
        for name, array in (given if self._owner is state else given | held).items():
            self._device.write(self._addresses[name], array)
        self._owner = state
        self._run(bound)
        self._fetch(_SMALL if self._resident else None)
        self._owner = state if self._resident else None
        return {name: self._result(*place) for name, place in bound.outputs.items()}

    def call_part(self, part: str, inputs: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The results by name of another program, one of `Plan.parts`; its inputs in order."""
        if part not in self.plan.parts:
            raise ArtifactError(
                f"there is no program {part!r}", where=str(self.artifact.path),
                allowed=", ".join(self.plan.parts) or "the step",
            )  # fmt: skip
        taken = self.plan.inputs(part)
        named = {b.name: array for b, array in zip(taken, inputs, strict=True)}
        given = {b.name: _as(b, named) for b in taken}
        bound = self._bind(part, self._sizes(given), set(given))
        for name, array in given.items():
            self._device.write(self._addresses[name], array)
        self._run(bound)
        return {name: self._result(*place) for name, place in bound.outputs.items()}

    def bring(self) -> None:
        """Make the arrays of the state on the device current; the next step copies them there again."""
        if self._owner is not None:
            self._fetch(None)
        self._owner = None

    def _fetch(self, most: int | None) -> None:
        """Read states of up to `most` bytes into their arrays; None reads all."""
        assert self._owner is not None
        for buffer in self.plan.of_kind("state"):
            array = self._owner[buffer.name]
            if most is None or array.nbytes <= most:
                self._device.read(self._addresses[buffer.name], array)

    # -------------------------------------------------------------------------- binding to sizes

    def _sizes(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, int]:
        """Every symbol of the arguments, by the shapes that are given."""
        buffers = [b for b in self.plan.buffers if b.name in arrays]
        for b in buffers:
            if arrays[b.name].ndim != len(b.shape):
                shape = list(arrays[b.name].shape)
                raise ArtifactError(f"{b.name} has shape {shape}", allowed=str(list(b.shape)))
        pairs = [(b, *pair) for b in buffers for pair in zip(b.shape, arrays[b.name].shape, strict=True)]
        sizes = {text: found for _, text, found in reversed(pairs) if re.fullmatch(r"[A-Za-z_]\w*", text)}
        for buffer, text, found in pairs:
            if size(text, sizes) != found:
                raise ArtifactError(
                    f"{buffer.name} has shape {list(arrays[buffer.name].shape)}, where {text} is "
                    f"{size(text, sizes)}", where=str(self.artifact.path),
                )  # fmt: skip
        return sizes

    def _bind(self, part: str, sizes: dict[str, int], arguments: set[str]) -> _Bound:
        """A program of a part at some sizes, with room for its arguments."""
        key = part, tuple(sorted(sizes.items()))
        if key not in self._bound:
            program = self.plan.program(sizes, part)
            if self._check:
                check_program(self.plan, program, sizes)
            self._place(program, sizes, arguments)
            self._bound[key] = self._filled(program, sizes)
        return self._bound[key]

    def _place(self, program: Program, sizes: dict[str, int], arguments: set[str]) -> None:
        """Room for arguments and temporaries; what has grown moves, and everything bound is void."""
        arena = sum(size(s, sizes) for s in program.slots)
        needs = {b.name: _nbytes(b, sizes) for b in self.plan.buffers if b.name in arguments}
        for name, nbytes in {**needs, "": arena}.items():
            address, there = self._memory.get(name, (0, -1))
            if nbytes > there:
                if there >= 0:
                    self._device.free(address)
                    self._bound.clear()
                self._memory[name] = self._device.allocate(max(nbytes, ALIGN)), nbytes
            self._addresses[name] = self._memory[name][0]

    def _filled(self, program: Program, sizes: dict[str, int]) -> _Bound:
        starts, at = [], self._addresses[""]
        for text in program.slots:
            starts.append(at)
            at += size(text, sizes)
        places = {b.name: starts[b.slot] for b in program.temporaries}
        buffers = {b.name: b for b in (*self.plan.buffers, *program.temporaries)}

        def value(argument: Argument) -> Scalar:
            if not argument.buffer:
                return size(argument.integer, sizes) if argument.integer else argument.number or 0.0
            start = places.get(argument.buffer, self._addresses.get(argument.buffer, 0))
            return start + size(argument.offset, sizes) * buffers[argument.buffer].item_bytes

        launches = []
        for launch in program.launches:
            x, y, z = (size(g, sizes) for g in launch.grid)
            launches.append((launch.kernel, (x, y, z), [value(a) for a in launch.arguments]))
        outputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        for name, buffer_name in program.outputs.items():
            buffer = buffers[buffer_name]
            shape = tuple(size(s, sizes) for s in buffer.shape)
            address = places.get(buffer_name, self._addresses.get(buffer_name, 0))
            outputs[name] = address, shape, _NUMPY[buffer.dtype]
        return _Bound(launches, outputs, program.most > 0)

    # ---------------------------------------------------------------------------------- running

    def _run(self, bound: _Bound) -> None:
        """The launches: one by one, and from the second step of few rows at these sizes on as one graph."""
        bound.runs += 1
        if bound.graph is None and bound.repeats and bound.runs == 2 and self._device.begin_graph():
            self._launch(bound)
            bound.graph = self._device.end_graph()
        if bound.graph is not None:
            self._device.run_graph(bound.graph)
        else:
            self._launch(bound)

    def _launch(self, bound: _Bound) -> None:
        for kernel, grid, values in bound.launches:
            self._device.launch(kernel, grid, values)

    def _result(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        out = np.empty(shape, dtype)
        self._device.read(address, out)
        return out

    def _upload(self, buffer: Buffer) -> int:
        """The weight of that name on the device."""
        known = buffer.name in self.artifact.tensors
        array = self.artifact.array(buffer.name) if known else np.zeros(1, np.float32)
        address = self._device.allocate(-(-array.nbytes // ALIGN) * ALIGN)
        self._device.write(address, array)
        return address


def _as(buffer: Buffer, arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if buffer.name not in arrays:
        raise ArtifactError(
            f"{buffer.kind} {buffer.name} is missing", where="step", allowed=", ".join(arrays)
        )
    array: npt.NDArray[Any] = np.ascontiguousarray(arrays[buffer.name], _NUMPY[buffer.dtype])
    return array


def _nbytes(buffer: Buffer, sizes: dict[str, int]) -> int:
    return -(-size(buffer.elements, sizes) * buffer.item_bytes // ALIGN) * ALIGN


def open_device(plan: Plan, where: str) -> Device:
    """The device that a plan was made for.

    Raises:
        ToolchainError: there is no driver, or it is too old.
        ArtifactError: the device is another one than the plan was made for.
    """
    if plan.vendor == "cuda":
        from .gpu.driver_cuda import CudaDevice

        return CudaDevice(plan, where)
    from .gpu.driver_hip import HipDevice

    return HipDevice(plan, where)
