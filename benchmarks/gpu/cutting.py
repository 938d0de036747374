"""The plan of the first layers of a model, from that of the whole: a card gets as many as fit its memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container.plan import ALIGN, Argument, Buffer, Launch, Plan, Program

_LAYER = re.compile(r"(?:^| )layers\.(\d+)(?:\.|$)")


def layer_of(text: str) -> int:
    """The layer that a buffer's name or a launch's op names; -1 for what no layer owns."""
    found = _LAYER.search(text)
    return int(found[1]) if found else -1


def layers_of(plan: Plan) -> int:
    """How many layers a plan has."""
    return 1 + max((layer_of(launch.op) for p in plan.programs for launch in p.launches), default=-1)


def cut(plan: Plan, calls: Sequence[Any], layers: int) -> tuple[Plan, list[Any]]:
    """The plan of the first layers, and the calls of its programs; see `targets.calls`.

    Kernels stay as they are. What reads the streams behind the last layer reads those of the last that is
    left.

    Raises:
        ArtifactError: the model has fewer layers, or its layers hand on something else than streams.
    """
    if not 1 <= layers <= layers_of(plan):
        raise ArtifactError(f"{layers} layers", where=plan.arch, allowed=f"1 to {layers_of(plan)}")
    buffers = tuple(b for b in plan.buffers if layer_of(b.name) < layers)
    made = [_program(p, plan, layers) for p in plan.programs]
    kept = [_calls(c, p, layers) for c, p in zip(calls, plan.programs, strict=True)]
    return replace(plan, buffers=buffers, programs=tuple(made)), kept


def _program(program: Program, plan: Plan, layers: int) -> Program:
    kept = [launch for launch in program.launches if layer_of(launch.op) < layers]
    own = {b.name: b for b in program.temporaries}
    written = {name for launch in kept for name in _taken(launch, plan, own, "w")}
    lost = {name for launch in kept for name in _taken(launch, plan, own, "r")} - written
    moved: dict[str, str] = {}
    if lost:
        last = next(launch for launch in reversed(kept) if layer_of(launch.op) == layers - 1)
        (streams,) = _taken(last, plan, own, "w") or ("",)
        if len(lost) > 1 or streams not in own or own[streams].shape != own[next(iter(lost))].shape:
            raise ArtifactError(f"layers hand on {', '.join(sorted(lost))}", where=f"program {program.name}")
        # in a slot of its own: the one it had may be taken by what comes behind the last layer
        own[streams] = replace(own[streams], slot=len(program.slots))
        moved = {next(iter(lost)): streams}
    launches = tuple(replace(launch, arguments=_renamed(launch, moved)) for launch in kept)
    outputs = {name: moved.get(buffer, buffer) for name, buffer in program.outputs.items()}
    lives: dict[str, tuple[int, int]] = {}
    for index, launch in enumerate(launches):
        for argument in launch.arguments:
            if argument.buffer in own:
                lives[argument.buffer] = lives.get(argument.buffer, (index, index))[0], index
    for name in outputs.values():
        if name in lives:
            lives[name] = lives[name][0], len(launches) - 1
    temporaries = tuple(replace(own[n], first=first, last=last) for n, (first, last) in lives.items())
    slots = tuple(_slot(i, temporaries) for i in range(len(program.slots) + 1))
    return replace(program, temporaries=temporaries, slots=slots, launches=launches, outputs=outputs)


def _slot(slot: int, temporaries: Sequence[Buffer]) -> str:
    """Bytes of a slot by those that hold it; sizes of the layers that are gone have no symbols any more."""
    held = [b for b in temporaries if b.slot == slot]
    texts = list(dict.fromkeys(f"({b.elements}*{b.item_bytes}+{ALIGN - 1})//{ALIGN}*{ALIGN}" for b in held))
    return f"max({','.join(texts)},0)" if texts else "0"


def _taken(launch: Launch, plan: Plan, own: Mapping[str, Buffer], access: str) -> list[str]:
    """The temporaries that a launch reads ("r") or writes ("w")."""
    pairs = zip(plan.kernels[launch.kernel].parameters, launch.arguments, strict=True)
    return [a.buffer for p, a in pairs if a.buffer in own and access in p.access]


def _renamed(launch: Launch, moved: Mapping[str, str]) -> tuple[Argument, ...]:
    return tuple(replace(a, buffer=moved[a.buffer]) if a.buffer in moved else a for a in launch.arguments)


def _calls(calls: Any, program: Program, layers: int) -> Any:
    """The calls of the launches that are left; ops without one go."""
    rows = zip(calls["order"], program.launches, strict=True)
    order = [row for row, launch in rows if layer_of(launch.op) < layers]
    places: dict[int, int] = {}
    for op, _ in order:
        places.setdefault(op, len(places))
    ops = [calls["ops"][op] for op in places]
    return {**calls, "ops": ops, "order": [[places[op], function] for op, function in order]}
