"""The check of a step at given sizes: of every program bounds, alignment, grid, shared memory, order and
lifetimes; and what passes between programs of several devices.

Needs no device: everything that it looks at stands in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container.launches import Argument, Buffer, Kernel, Launch, Parameter
from dsv4c.runtime.container.plan import Handover, Plan, Program
from dsv4c.runtime.container.sizes import size

_MOST_BLOCKS = (2**31 - 1, 65535, 65535)
_I32 = range(-(2**31), 2**31)


@dataclass
class _State:
    """What is known in front of a launch."""

    plan: Plan
    sizes: Mapping[str, int]
    buffers: dict[str, Buffer]
    slots: list[int]
    written: set[str] = field(default_factory=set)
    holders: dict[int, str] = field(default_factory=dict)


def check_step(plan: Plan, sizes: Mapping[str, int]) -> None:
    """Check the programs that a step of these sizes runs, one of every stage, and what they hand over.

    Raises:
        ArtifactError: see `check_program`; a value that is handed over has another shape where it is read; or
            of the devices that keep a state only some write to it.
    """
    chosen = [plan.program(dict(sizes), "", stage) for stage in range(len(plan.stages))]
    for program in chosen:
        check_program(plan, program, sizes)
    for handover in plan.handovers:
        _check_handover(plan, handover, chosen[handover.source], sizes)
    _check_replicas(plan, chosen)


def _check_handover(plan: Plan, handover: Handover, program: Program, sizes: Mapping[str, int]) -> None:
    """What a program leaves has the shape of what is read; that it holds something is checked with its
    outputs.
    """
    read, made = handover.buffer, plan.known_to(program)[program.outputs[handover.buffer.name]]
    shapes = [[size(d, sizes) for d in b.shape] for b in (made, read)]
    if shapes[0] != shapes[1]:
        raise ArtifactError(
            f"{read.name} has shape {shapes[0]}", allowed=str(shapes[1]),
            where=f"handover of stage {handover.source} to {handover.target}",
        )  # fmt: skip


def _check_replicas(plan: Plan, programs: Sequence[Program]) -> None:
    """A state that several stages keep is the same on all of their devices after a step."""
    written = [_written(plan, program) for program in programs]
    held = [plan.held(stage) for stage in range(len(plan.stages))]
    for buffer in plan.of_kind("state"):
        keep = [stage for stage, buffers in enumerate(held) if buffer in buffers]
        write = [stage for stage in keep if buffer.name in written[stage]]
        if write and write != keep:
            raise ArtifactError(
                f"stages {_listed(keep)} keep state {buffer.name}, and only {_listed(write)} write to it",
                where="step", allowed="all of them, or none",
            )  # fmt: skip


def _written(plan: Plan, program: Program) -> set[str]:
    """Every buffer that a launch of a program writes to."""
    pairs = (
        (p, a)
        for launch in program.launches
        for p, a in zip(plan.kernels[launch.kernel].parameters, launch.arguments, strict=True)
    )
    return {a.buffer for p, a in pairs if "w" in p.access}


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def check_program(plan: Plan, program: Program, sizes: Mapping[str, int]) -> None:
    """Check every launch of a program as a device would meet it, in order.

    Raises:
        ArtifactError: the launch, the parameter and what is wrong with it.
    """
    buffers = plan.known_to(program)
    written = {name for name, b in buffers.items() if b.kind != "temporary"}
    state = _State(plan, sizes, buffers, [size(s, sizes) for s in program.slots], written)
    for buffer in program.temporaries:
        if size(buffer.elements, sizes) * buffer.item_bytes > state.slots[buffer.slot]:
            raise ArtifactError(f"{buffer.name} does not fit its slot", where=f"program {program.name}")
    for index, launch in enumerate(program.launches):
        where = f"program {program.name}, launch {index}, {plan.kernels[launch.kernel].name} for {launch.op}"
        _check_launch(state, index, launch, where)
    for name, buffer_name in program.outputs.items():
        _check_held(state, buffer_name, len(program.launches) - 1, f"program {program.name}, output {name}")


def _check_launch(state: _State, index: int, launch: Launch, where: str) -> None:
    kernel = state.plan.kernels[launch.kernel]
    _check_shape(state, kernel, launch, where)
    pairs = list(zip(kernel.parameters, launch.arguments, strict=True))
    known: dict[str, int] = {n: v for n, v in kernel.constants.items() if isinstance(v, int)}
    for parameter, argument in pairs:
        if argument.integer:
            known[parameter.name] = _integer(state, parameter, argument, f"{where}, {parameter.name}")
    pointers = [(p, a) for p, a in pairs if p.is_pointer]
    for parameter, argument in pointers:
        _check_pointer(state, index, parameter, argument, known, f"{where}, {parameter.name}")
    _check_aliases(pointers, known, where)
    for parameter, argument in pointers:
        if "w" in parameter.access:
            state.written.add(argument.buffer)


def _check_shape(state: _State, kernel: Kernel, launch: Launch, where: str) -> None:
    grid = [size(g, state.sizes) for g in launch.grid]
    if any(not 1 <= n <= most for n, most in zip(grid, _MOST_BLOCKS, strict=True)):
        raise ArtifactError(f"grid {grid}", where=where, allowed=f"1 to {', '.join(map(str, _MOST_BLOCKS))}")
    if kernel.shared > state.plan.shared_limit:
        raise ArtifactError(
            f"{kernel.shared} bytes of shared memory",
            where=where,
            allowed=f"{state.plan.shared_limit} at most",
        )


def _integer(state: _State, parameter: Parameter, argument: Argument, where: str) -> int:
    value = size(argument.integer, state.sizes)
    if value not in _I32:
        raise ArtifactError(f"{value} is no int32", where=where)
    if parameter.divisible and value % 16:
        raise ArtifactError(f"the code relies on a multiple of 16, and {value} is none", where=where)
    return value


def _check_pointer(
    state: _State, index: int, parameter: Parameter, argument: Argument, known: dict[str, int], where: str
) -> None:
    buffer, offset = state.buffers[argument.buffer], size(argument.offset, state.sizes)
    touched, there = size(parameter.elements, known), size(buffer.elements, state.sizes)
    if offset < 0 or touched < 0 or (touched and offset + touched > there):
        raise ArtifactError(
            f"elements {offset} to {offset + touched} of {buffer.name}, which has {there}", where=where
        )
    if parameter.divisible and offset * buffer.item_bytes % 16:
        raise ArtifactError(f"{buffer.name} from element {offset} on is not at 16 bytes", where=where)
    if not touched:
        return
    if "w" in parameter.access and buffer.kind in ("input", "weight", "handed"):
        raise ArtifactError(f"writes {buffer.kind} {buffer.name}", where=where)
    if "w" in parameter.access and buffer.kind == "temporary":
        _take(state, index, buffer, where)
    if "r" in parameter.access:
        _check_held(state, buffer.name, index, where)


def _take(state: _State, index: int, buffer: Buffer, where: str) -> None:
    """A temporary takes its slot, which must be free."""
    holder = state.holders.get(buffer.slot, buffer.name)
    if holder != buffer.name and state.buffers[holder].last >= index:
        raise ArtifactError(f"{buffer.name} overwrites {holder}, which is still needed", where=where)
    if not buffer.first <= index <= buffer.last:
        raise ArtifactError(f"{buffer.name} lives from {buffer.first} to {buffer.last}", where=where)
    state.holders[buffer.slot] = buffer.name


def _check_held(state: _State, name: str, index: int, where: str) -> None:
    """A buffer holds what was written to it."""
    buffer = state.buffers[name]
    if name not in state.written:
        raise ArtifactError(f"{name} is read before anything is written to it", where=where)
    if buffer.kind != "temporary":
        return
    holder = state.holders.get(buffer.slot, "")
    if holder != name:
        raise ArtifactError(f"{name} is read after {holder} has taken its place", where=where)
    if not buffer.first <= index <= buffer.last:
        raise ArtifactError(f"{name} lives from {buffer.first} to {buffer.last}", where=where)


def _check_aliases(pointers: list[tuple[Parameter, Argument]], known: dict[str, int], where: str) -> None:
    """What one parameter writes no other parameter touches."""
    touched = [(p, a) for p, a in pointers if size(p.elements, known)]
    for parameter, argument in touched:
        others = [p.name for p, a in touched if p is not parameter and a.buffer == argument.buffer]
        if "w" in parameter.access and others:
            raise ArtifactError(
                f"{parameter.name} writes {argument.buffer}, as does {others[0]}", where=where
            )
