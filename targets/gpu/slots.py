"""Lives and places of the temporaries of a program: who may share a slot of the arena."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from dsv4c.runtime.container.plan import ALIGN, Buffer, Launch
from dsv4c.runtime.container.sizes import size


def place(
    temporaries: Iterable[Buffer], launches: list[Launch], kept: Iterable[str], typical: Mapping[str, int]
) -> tuple[tuple[Buffer, ...], tuple[str, ...]]:
    """The temporaries with their lives and slots, and the bytes of every slot as a size.

    A slot goes to the next that is born after its last holder died; of the free ones the one whose size is
    nearest, by the sizes at `typical` symbols. What is `kept` lives to the end; what no launch touches is
    dropped.
    """
    lives = _lives(launches)
    for name in kept:
        if name in lives:
            lives[name] = lives[name][0], len(launches) - 1
    holders: list[list[Buffer]] = []
    placed = []
    for buffer in sorted((b for b in temporaries if b.name in lives), key=lambda b: lives[b.name][0]):
        first, last = lives[buffer.name]
        wanted = size(_bytes(buffer), typical)
        free = [i for i, held in enumerate(holders) if lives[held[-1].name][1] < first]
        best = min(free, key=lambda i: abs(_largest(holders[i], typical) - wanted), default=len(holders))
        if best == len(holders):
            holders.append([])
        holders[best].append(buffer)
        placed.append(replace(buffer, slot=best, first=first, last=last))
    return tuple(placed), tuple(_slot(held) for held in holders)


def _lives(launches: list[Launch]) -> dict[str, tuple[int, int]]:
    """Name of a buffer -> the first and the last launch that takes it."""
    lives: dict[str, tuple[int, int]] = {}
    for index, launch in enumerate(launches):
        for argument in launch.arguments:
            if argument.buffer:
                lives[argument.buffer] = lives.get(argument.buffer, (index, index))[0], index
    return lives


def _bytes(buffer: Buffer) -> str:
    return f"({buffer.elements}*{buffer.item_bytes}+{ALIGN - 1})//{ALIGN}*{ALIGN}"


def _largest(held: list[Buffer], typical: Mapping[str, int]) -> int:
    return max(size(_bytes(b), typical) for b in held)


def _slot(held: list[Buffer]) -> str:
    """The largest of its holders; sizes that say the same stand once."""
    texts = list(dict.fromkeys(_bytes(b) for b in held))
    return texts[0] if len(texts) == 1 else f"max({','.join(texts)})"
