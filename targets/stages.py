"""Cuts a model into stages of whole layers, between which nothing but the residual streams passes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.streams import stream_values

from .placement import balanced_runs

STREAMS = "streams"
"""The input and the output of a stage that carries the streams."""


@dataclass(frozen=True, eq=False)
class Stage:
    """Some consecutive layers of a module.

    Attributes:
        first, last: layers, both included; 0 and -1 where a module is not cut.
        source: the streams that come in; None for the first stage.
        outputs: streams or logits, and the states of its layers; the position is the last stage's.
        ops: what it computes, in order, without weights. What does not depend on the streams (positions,
            angles) is computed in every stage that reads it.
    """

    first: int
    last: int
    source: Value | None
    outputs: Mapping[str, Value]
    ops: tuple[Op, ...]


def split(module: Module, count: int, sizes: Mapping[Op, int]) -> list[Stage]:
    """Stages whose weights are as even as runs of whole layers can be.

    Args:
        sizes: bytes of every weight op.

    Raises:
        TargetError: more stages than layers, or a layer reads more of another stage than the streams.
    """
    if count == 1:
        return [Stage(0, -1, None, module.outputs, _needed(module, module.outputs, None))]
    streams = {_number(layer): value for layer, value in stream_values(module).items()}
    if count > len(streams):
        raise TargetError(f"{count} stages", where=module.name, allowed=f"at most its {len(streams)} layers")
    weights = [0.0] * len(streams)
    for op, nbytes in sizes.items():
        layer = _layer_of(op.loc)
        if layer is not None and layer < len(weights):
            weights[layer] += nbytes
    runs = balanced_runs(weights, count)
    return [_stage(module, first, last, streams) for first, last in runs]


def _stage(module: Module, first: int, last: int, streams: Mapping[int, Value]) -> Stage:
    source, final = streams[first - 1] if first else None, last == len(streams) - 1
    outputs: dict[str, Value] = {}
    for name, value in module.outputs.items():
        layer = _layer_of(name) if name in module.states else None
        if final if layer is None else first <= layer <= last:
            outputs[name] = value
    if not final:
        outputs = {STREAMS: streams[last], **outputs}
    ops = _needed(module, outputs, source)
    for value in dict.fromkeys(v for op in ops for v in op.operands):
        owner = value.producer.loc if value.producer and value.producer.weight else value.name
        layer = _layer_of(owner)
        if layer is not None and not first <= layer <= last:
            raise TargetError(
                f"layers {first} to {last} read {owner}", where=module.name,
                allowed="of other stages only the streams", hint="compile with fewer stages",
            )  # fmt: skip
    return Stage(first, last, source, outputs, ops)


def _needed(module: Module, outputs: Mapping[str, Value], source: Value | None) -> tuple[Op, ...]:
    """The ops that the outputs depend on, but not what `source` depends on."""
    wanted = set(outputs.values())
    kept: list[Op] = []
    for op in reversed(module.ops):
        made = set(op.results) - ({source} if source else set())
        if op.weight is None and made & wanted:
            kept.append(op)
            wanted.update(op.operands)
    return tuple(reversed(kept))


def _layer_of(text: str) -> int | None:
    found = re.match(r"layers\.(\d+)\.", text + ".")
    return int(found[1]) if found else None


def _number(layer: str) -> int:
    return int(layer.removeprefix("layers."))
