"""Runs a launch plan: a step on one device, or on several, each with some of the layers, one after the other.

Needs the driver of the devices and nothing else. A step copies its inputs there and its results back; states
stay on the devices for as long as nobody else has written to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError

from .container import Artifact
from .container.plan import ALIGN, Buffer, Plan
from .container.sizes import size
from .gpu.check import check_program, check_step
from .gpu.device import Device
from .gpu.runner import NUMPY, Bound, Runner
from .images.rows import ImageRows, no_images
from .undo import Undo

_SMALL = 4096
"""Bytes up to which a state is read back after every step."""


class GpuBackend:
    """The step of one artifact on as many devices as its plan has stages.

    Args:
        device: what executes launches, one for every stage; None opens those that the plan names.
        check: whether launches are checked before they first run at any sizes; see `gpu.check`.
        resident: whether states stay on the devices between steps; their arrays are then current only after
            `bring`, but for small ones such as the position.

    Attributes:
        plan: the launch plan of the artifact.
        undo: None: a step reads no file.

    Raises:
        ArtifactError: the plan is damaged, or does not fit the devices: their number, their architecture or
            their memory.
        ToolchainError: there is no driver, or it is too old.
    """

    undo: Undo | None = None

    def __init__(
        self, artifact: Artifact, device: Device | Sequence[Device] | None = None, check: bool = False,
        resident: bool = False,
    ) -> None:  # fmt: skip
        self.artifact, self._check, self._resident = artifact, check, resident
        where = str(artifact.path)
        self.plan = read_plan(artifact)
        devices = open_devices(self.plan, where) if device is None else _listed(device)
        if len(devices) != len(self.plan.stages):
            wanted = len(self.plan.stages)
            raise ArtifactError(f"{len(devices)} devices for {wanted} stages", where=where)
        code = artifact.section("code") if "code" in artifact.sections else b""
        self._runners: list[Runner] = []
        for stage, one in enumerate(devices):
            one.activate()
            one.load(self.plan.kernels, code)
            self._runners.append(Runner(self.plan, stage, one, self._upload, where))
        self._keepers = {
            b.name: next(r for r in self._runners if b.name in r.held)
            for b in self.plan.of_kind("state") if any(b.name in r.held for r in self._runners)
        }  # fmt: skip
        self._results = self.plan.results()
        self._checked = set[tuple[str, tuple[tuple[str, int], ...]]]()
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
        sizes = self._sizes(given | held)
        self._check_once("", sizes)
        names = {*given, *held}
        bound = [runner.bind("", sizes, names) for runner in self._runners]
        for name, array in (given if self._owner is state else given | held).items():
            for runner in self._runners:
                if name in runner.held:
                    runner.write(name, array)
        self._owner = state
        ran: list[tuple[Runner, Bound]] = []
        for runner, program in zip(self._runners, bound, strict=True):
            runner.take(program, ran)
            runner.run(program)
            ran.append((runner, program))
        self._fetch(_SMALL if self._resident else None)
        self._owner = state if self._resident else None
        return {name: ran[n][0].result(ran[n][1], name) for name, n in self._results.items()}

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
        sizes, runner = self._sizes(given), self._runners[0]
        self._check_once(part, sizes)
        bound = runner.bind(part, sizes, given)
        for name in runner.held.intersection(given):
            runner.write(name, given[name])
        runner.run(bound)
        return {name: runner.result(bound, name) for name in bound.outputs}

    def bring(self) -> None:
        """Make the arrays of the state on the device current; the next step copies them there again."""
        if self._owner is not None:
            self._fetch(None)
        self._owner = None

    def _fetch(self, most: int | None) -> None:
        """Read states of up to `most` bytes into their arrays; None reads all."""
        assert self._owner is not None
        for name, keeper in self._keepers.items():
            array = self._owner[name]
            if most is None or array.nbytes <= most:
                keeper.read(name, array)

    def _check_once(self, part: str, sizes: dict[str, int]) -> None:
        """Where it is asked for, the check of every launch at these sizes."""
        key = part, tuple(sorted(sizes.items()))
        if not self._check or key in self._checked:
            return
        if part:
            check_program(self.plan, self.plan.program(sizes, part), sizes)
        else:
            check_step(self.plan, sizes)
        self._checked.add(key)

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

    def _upload(self, device: Device, buffer: Buffer) -> int:
        """The weight of that name on a device."""
        known = buffer.name in self.artifact.tensors
        array = self.artifact.array(buffer.name) if known else np.zeros(1, np.float32)
        address = device.allocate(-(-array.nbytes // ALIGN) * ALIGN)
        device.write(address, array)
        return address


def read_plan(artifact: Artifact) -> Plan:
    """The launch plan of an artifact.

    Raises:
        ArtifactError: it is damaged.
    """
    return Plan.from_json(json.loads(artifact.section("plan")), str(artifact.path))


def _listed(device: Device | Sequence[Device]) -> Sequence[Device]:
    return device if isinstance(device, Sequence) else [device]


def _as(buffer: Buffer, arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if buffer.name not in arrays:
        raise ArtifactError(
            f"{buffer.kind} {buffer.name} is missing", where="step", allowed=", ".join(arrays)
        )
    array: npt.NDArray[Any] = np.ascontiguousarray(arrays[buffer.name], NUMPY[buffer.dtype])
    return array


def open_devices(plan: Plan, where: str) -> list[Device]:
    """The devices that a plan was made for, one for every stage, by their numbers.

    Raises:
        ToolchainError: there is no driver, or it is too old.
        ArtifactError: there are fewer, or one of them is another one than the plan was made for.
    """
    numbers = range(len(plan.stages))
    if plan.vendor == "cuda":
        from .gpu.driver_cuda import CudaDevice

        return [CudaDevice(plan, where, number=n) for n in numbers]
    from .gpu.driver_hip import HipDevice

    return [HipDevice(plan, where, number=n) for n in numbers]
