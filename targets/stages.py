"""Cuts a model into stages of whole layers, and says what passes between them.

Mostly that is the residual streams. Where layers publish what later ones read (entries, index keys,
selections, candidate blocks) or collapse the streams by weights mixed a sub-layer earlier, those pass too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Module, Op, Value
from dsv4c.ir.streams import stream_values

from .placement import balanced_runs

STREAMS = "streams"
"""The name between two stages of what the earlier one leaves in the streams."""

VIEWS = frozenset({"split_heads", "merge_heads", "split_columns", "round_values"})
"""Ops that cost nothing or next to nothing; a stage that keeps replicas makes them itself."""


@dataclass(frozen=True, eq=False)
class Stage:
    """Some consecutive layers of a module.

    Attributes:
        first, last: layers, both included; 0 and -1 where a module is not cut.
        inputs: what earlier stages have made, by the names that their `outputs` have. Of entries it is what
            this step has made; the state that they extend is an argument of both stages.
        outputs: what later stages read, logits, and the states of its layers; the position is the last
            stage's. With replicas, every state that it reads.
        ops: what it computes, in order, without weights. What does not depend on embeddings (positions,
            angles) is computed in every stage that reads it.
    """

    first: int
    last: int
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    ops: tuple[Op, ...]


def split(
    module: Module, count: int, sizes: Mapping[Op, int], given: Iterable[Value] = (),
    outputs: Mapping[str, Value] | None = None, *, besides: Mapping[str, int] | None = None,
    replicas: bool = False,
) -> list[Stage]:  # fmt: skip
    """Stages whose weights and states are as even as runs of whole layers can be.

    What stands ahead of the first layer counts with it, and what stands behind the last with that.

    Args:
        sizes: bytes of every weight op.
        given: values that come from outside, though an op makes them.
        outputs: those of the module that stages are to give; by default all.
        besides: other bytes that count, by name: those of a layer's state with that layer, others with the
            first.
        replicas: whether a stage keeps a copy of every state that it reads, and writes to it itself what the
            state's own stage writes. Then nothing of a state passes between stages but what is written to
            it, and no name in `inputs` means two values.

    Raises:
        TargetError: more stages than layers; or, without replicas, a layer reads a weight or a state of
            another stage.
    """
    outputs, known = dict(module.outputs if outputs is None else outputs), set(given)
    if count == 1:
        return [Stage(0, -1, {}, outputs, _needed(module, outputs.values(), known))]
    streams = {_number(layer): value for layer, value in stream_values(module).items()}
    if count > len(streams):
        raise TargetError(f"{count} stages", where=module.name, allowed=f"at most its {len(streams)} layers")
    runs = balanced_runs(_bytes_by_layer(module, len(streams), sizes, besides or {}), count)
    return _Cut(module, runs, streams, known, outputs, replicas).stages()


def _bytes_by_layer(
    module: Module, layers: int, sizes: Mapping[Op, int], besides: Mapping[str, int]
) -> list[float]:
    """What each layer brings along."""
    held, begun = [0.0] * layers, False
    for op in module.ops:
        layer = _layer_of(op.loc)
        begun = begun or layer is not None
        at = layer if layer is not None else layers - 1 if begun else 0
        if at < layers:
            held[at] += sizes.get(op, 0)
    for name, nbytes in besides.items():
        held[_layer_of(name) or 0] += nbytes
    return held


@dataclass(eq=False)
class _Cut:
    """A module being cut.

    Attributes:
        runs: first and last layer of every stage.
        streams: layer -> the streams behind it.
        replicas: see `split`.
        home: op that depends on embeddings -> the number of its stage; not of those that every stage
            computes which reads them.
        names: value that passes -> its name, with replicas.
    """

    module: Module
    runs: Sequence[tuple[int, int]]
    streams: Mapping[int, Value]
    given: set[Value]
    outputs: Mapping[str, Value]
    replicas: bool
    home: dict[Op, int] = field(default_factory=dict)
    names: dict[Value, str] = field(default_factory=dict)

    def stages(self) -> list[Stage]:
        self._settle()
        leave: list[dict[str, Value]] = [{} for _ in self.runs]
        for name, value in self.outputs.items():
            if not self.replicas or name not in self.module.states or _layer_of(name) is not None:
                leave[self._stage_of_output(name)][name] = value
        out: list[Stage] = []
        for number in range(len(self.runs) - 1, -1, -1):  # later stages say what earlier ones must leave
            if self.replicas:
                self._keep_states(number, leave)
            read = self._read(number, leave[number].values())
            inputs = {self._name(value, number): value for value in read}
            for name, value in inputs.items():
                assert value.producer is not None
                leave[self.home[value.producer]].setdefault(name, value)
            ops = _needed(self.module, leave[number].values(), self.given | set(read))
            first, last = self.runs[number]
            stage = Stage(first, last, inputs, dict(sorted(leave[number].items(), key=_streams_first)), ops)
            if not self.replicas:
                self._check(stage)
            out.append(stage)
        return out[::-1]

    def _settle(self) -> None:
        """Give every op that depends on embeddings a stage: its layer's, or that of what stands before."""
        made, at = set[Value](), 0
        for op in self.module.ops:
            if op.weight is not None or not set(op.results).isdisjoint(self.given):
                continue
            if op.name != "embed" and made.isdisjoint(op.operands):
                continue
            made.update(op.results)
            layer = _layer_of(op.loc)
            at = len(self.runs) - 1 if op.loc == "head" else at
            at = at if layer is None else self._stage_of(layer)
            if not (self.replicas and (op.definition.consumes is not None or op.name in VIEWS)):
                self.home[op] = at

    def _keep_states(self, number: int, leave: Sequence[dict[str, Value]]) -> None:
        """Let a stage leave the successor of every state that it reads; the first one also what none reads.
        """
        names = {value: name for name, value in self.module.states.items() if name in self.outputs}
        left = leave[number]
        if number == 0:
            everywhere = {name for one in leave for name in one}
            left |= {name: self.outputs[name] for name in names.values() if name not in everywhere}
        while True:
            read = self._read(number, left.values())
            ops = _needed(self.module, left.values(), self.given | set(read))
            found = {names[v] for op in ops for v in op.operands if v in names} - left.keys()
            if not found:
                return
            left |= {name: self.outputs[name] for name in names.values() if name in found}

    def _stage_of(self, layer: int) -> int:
        return next(i for i, (_, last) in enumerate(self.runs) if layer <= last)

    def _stage_of_output(self, name: str) -> int:
        layer = _layer_of(name) if name in self.module.states else None
        return len(self.runs) - 1 if layer is None else self._stage_of(layer)

    def _read(self, number: int, outputs: Iterable[Value]) -> list[Value]:
        """Values of other stages that stage `number` needs for its outputs, in order."""
        wanted, read = set(outputs), dict[Value, None]()
        for op in reversed(self.module.ops):
            made = wanted.intersection(op.results) - self.given
            if op.weight is not None or not made:
                continue
            if self.home.get(op, number) != number:
                read.update(dict.fromkeys(v for v in op.results if v in made))
            else:
                wanted.update(op.operands)
        return list(reversed(read))

    def _name(self, value: Value, number: int) -> str:
        """What a value is called where stage `number` reads it: an output of the module has its name."""
        if self.replicas:
            return self._own_name(value)
        if value is self.streams[self.runs[number - 1][1]]:
            return STREAMS
        for name, output in self.module.outputs.items():
            if output is value:
                return name
        op = value.producer
        assert op is not None
        return f"{op.loc}.{op.name}.{self.module.ops.index(op)}.{op.results.index(value)}"

    def _own_name(self, value: Value) -> str:
        """What a value is called in all stages: its layer's streams, or the op that made it."""
        if value not in self.names:
            op = value.producer
            assert op is not None
            several = f".{op.results.index(value)}" if len(op.results) > 1 else ""
            known = {v: f"layers.{layer}.{STREAMS}" for layer, v in self.streams.items()}
            name = known.get(value, f"{op.loc}.{op.name}{several}")
            while name in self.names.values():
                name += "'"
            self.names[value] = name
        return self.names[value]

    def _check(self, stage: Stage) -> None:
        """Refuse a weight or a state of another stage, but for the entries that an input extends."""
        extended = {extended_state(v) for v in stage.inputs.values()}
        for value in dict.fromkeys(v for op in stage.ops for v in op.operands):
            owner = value.producer.loc if value.producer and value.producer.weight else value.name
            layer = _layer_of(owner)  # of an argument or a weight; what ops make has no name
            if layer is not None and not stage.first <= layer <= stage.last and value not in extended:
                raise TargetError(
                    f"layers {stage.first} to {stage.last} read {owner}", where=self.module.name,
                    allowed="of other stages only what they compute", hint="compile with fewer stages",
                )  # fmt: skip


def extended_state(value: Value) -> Value | None:
    """The state of entries that a value extends; None for any other value."""
    op = value.producer
    return op.operands[0] if op is not None and op.name == "entries_append" else None


def _streams_first(item: tuple[str, Value]) -> bool:
    return item[0] != STREAMS


def _needed(module: Module, outputs: Iterable[Value], given: set[Value]) -> tuple[Op, ...]:
    """The ops that the outputs depend on, but not what `given` depends on."""
    wanted = set(outputs)
    kept: list[Op] = []
    for op in reversed(module.ops):
        if op.weight is None and (set(op.results) - given) & wanted:
            kept.append(op)
            wanted.update(op.operands)
    return tuple(reversed(kept))


def _layer_of(text: str) -> int | None:
    found = re.match(r"layers\.(\d+)\.", text + ".")
    return int(found[1]) if found else None


def _number(layer: str) -> int:
    return int(layer.removeprefix("layers."))
