"""A roofline over `ir.cost` for a model that is split over devices: one step of decoding, one prompt.

Each class of ops takes the longer of its arithmetic and its memory traffic; exchanges between devices come on
top. Knows a device by its figures only. What a device does not publish makes a time None, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv4c.ir.cost import Cost, op_cost

from .hardware import Device
from .placement import Placement, Shares, Stage
from .workload import Work, Workload

ARITHMETIC = {
    "f32": ("f32", "bf16", "fp16"),
    "bf16": ("bf16", "fp16", "f32"),
    "fp16": ("fp16", "bf16", "f32"),
    "fp8": ("fp8", "bf16", "fp16", "f32"),
    "fp4": ("fp8", "bf16", "fp16", "f32"),  # the released recipe multiplies FP4 weights by FP8 activations
    "int8": ("int8", "bf16", "fp16", "f32"),
    "int4": ("int8", "bf16", "fp16", "f32"),
}
"""What weights are stored in -> formats of the arithmetic, best first; the first that a device has counts."""

IN_REGISTERS = frozenset({
    "rms_norm", "unit_norm", "rotary", "clamp", "swiglu", "scale_rows", "scale", "add", "split_heads",
    "position_bias", "sqrt_softplus", "repeat_streams",
})  # fmt: skip
"""Element-wise ops, taken to be fused into what makes or reads their values: operations, but no traffic."""


@dataclass
class Tally:
    """What one class of ops does on one device: operations by stored format of the weights, and bytes."""

    flops: dict[str, float] = field(default_factory=dict)
    weight_bytes: float = 0.0
    data_bytes: float = 0.0

    def add(self, numbers: str, flops: float, weight_bytes: float, data_bytes: float) -> None:
        self.flops[numbers] = self.flops.get(numbers, 0.0) + flops
        self.weight_bytes += weight_bytes
        self.data_bytes += data_bytes

    def merge(self, other: Tally) -> None:
        for numbers, flops in other.flops.items():
            self.add(numbers, flops, 0.0, 0.0)
        self.add("bf16", 0.0, other.weight_bytes, other.data_bytes)


@dataclass(frozen=True)
class Part:
    """One class of ops along the way of a micro-batch: on the busiest device of each stage, summed.

    Attributes:
        flops, weight_bytes, data_bytes: of one step.
        seconds: the longer of arithmetic and memory, None where a figure of the device is not known.
        bound: "memory", "compute", or "unknown".
    """

    name: str
    flops: int
    weight_bytes: int
    data_bytes: int
    seconds: float | None
    bound: str


@dataclass(frozen=True)
class Step:
    """One step: every sequence decodes, or one prompt is read.

    Attributes:
        sequences: that take part, on all devices together.
        tokens: that it yields (decode) or reads (prefill).
        micro_batches: parts of the batch that fill the pipeline.
        parts: classes of ops; `link_bytes` and `link_seconds` what a device sends beside them.
        seconds: of the whole step, None where a figure is not known.
        bound: what most of the time goes to: "memory", "compute", "link", or "unknown".
    """

    sequences: int
    tokens: float
    micro_batches: int
    parts: tuple[Part, ...]
    link_bytes: int
    link_seconds: float | None
    seconds: float | None
    bound: str

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        totals = {
            name: sum(getattr(part, name) for part in self.parts)
            for name in ("flops", "weight_bytes", "data_bytes")
        }
        return {**asdict(self), **totals, "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Machine:
    """The model, split, on its devices."""

    w: Workload
    device: Device
    placement: Placement
    item: int
    shares: Shares

    # ------------------------------------------------------------------------- steps

    def decode(self, batch: int, context: int, drafts: int = 0, accepted: float = 0.0) -> Step:
        """All sequences, in as many micro-batches as there are stages, one after the other through them."""
        parts = min(len(self.placement.stages), batch)
        sequences, tokens = -(-batch // parts), 1 + drafts
        own = -(-sequences // self.placement.width)
        sizes = {"B": own, "T": tokens, "L": tokens, "ctx": context, "past": context - tokens}
        return self._step(sizes, sequences * tokens, parts, batch, batch * (1 + accepted))

    def prefill(self, prompt: int) -> Step:
        """One prompt whose tokens the devices of a stage share."""
        own = -(-prompt // self.placement.width)
        sizes = {"B": 1, "T": own, "L": 1, "ctx": prompt, "past": prompt - own}
        return self._step(sizes, prompt, 1, 1, prompt)

    def _step(
        self, sizes: Mapping[str, int], tokens: int, micro_batches: int, sequences: int, yielded: float
    ) -> Step:
        """Args: `sizes` of one device, `tokens` of one micro-batch on all devices of a stage."""
        tallies: dict[str, Tally] = {}
        times: list[float | None] = []
        for stage in self.placement.stages:
            of_stage = self._stage(stage, sizes, tokens)
            times.append(_total(self.seconds(t)[0] for t in of_stage.values()))
            for name, tally in of_stage.items():
                tallies.setdefault(name, Tally()).merge(tally)
        local = sizes["B"] * sizes["T"]
        sent = [self._sent(stage, local) for stage in self.placement.stages]
        links = [0.0 if b == 0 else None if (r := self.device.link_rate) is None else b / r for b in sent]
        stages = [_total(pair) for pair in zip(times, links, strict=True)]
        once = _total(stages)
        slowest = None if once is None else max(s for s in stages if s is not None)
        seconds = None if once is None or slowest is None else max(once, micro_batches * slowest)
        parts = tuple(self._part(name, tally) for name, tally in sorted(tallies.items()))
        link = _total(links)
        return Step(
            sequences, yielded, micro_batches, parts, round(sum(sent)), link, seconds, _bound(parts, link)
        )

    # ------------------------------------------------------------------------ one stage

    def _stage(self, stage: Stage, sizes: Mapping[str, int], tokens: int) -> dict[str, Tally]:
        """Class -> what the busiest device of a stage does."""
        out: dict[str, Tally] = {}
        routed: dict[int, list[tuple[Work, Cost]]] = {layer: [] for layer in stage.layers()}
        last = len(self.w.layers) - 1
        for work in self.w.work:
            if min(max(work.layer, 0), last) not in stage.layers():
                continue
            if work.expert:
                routed[work.layer].append((work, op_cost(work.op, {**sizes, "routed rows": 1})))
                continue
            flops, data = self._own(work, sizes)
            tally = out.setdefault(work.part, Tally())
            tally.add(work.numbers or "bf16", flops, work.count * work.weight_bytes, data)
        for at, layer in enumerate(stage.layers()):
            out.setdefault("experts", Tally()).merge(self._experts(stage, at, routed[layer], tokens))
        return out

    def _own(self, work: Work, sizes: Mapping[str, int]) -> tuple[float, float]:
        """Operations and bytes of data of a group of ops; an exchange has a row for every route."""
        op = work.op
        cost = op_cost(op, {**sizes, "routed rows": 0})
        flops, data = float(cost.flops), float(cost.data_bytes)
        if op.name in ("dispatch", "combine"):  # one row more in each expert: what a row costs
            layer = self.w.layers[work.layer]
            each = op_cost(op, {**sizes, "routed rows": 1}).data_bytes - cost.data_bytes
            data += each / len(layer.experts) * sizes["B"] * sizes["T"] * layer.chosen
        if op.name == "compress":  # reads its rings when a group closes, not at every token
            data *= min(1.0, sizes["T"] / int(str(op.attrs["ratio"])))
        if op.name in IN_REGISTERS:
            data = 0.0
        return work.count * flops, work.count * data * self.item / 4

    def _experts(self, stage: Stage, at: int, work: Sequence[tuple[Work, Cost]], tokens: int) -> Tally:
        """The routed experts of one layer on the device that takes longest over them.

        An expert is read if any of the tokens of the stage chose it; tokens are taken to choose apart from
        each other, so a share p of the tokens leaves it unread with probability (1 - p)^tokens.
        """
        layer = self.w.layers[stage.first + at]
        count = len(layer.experts)
        shares = self.shares.get(stage.first + at) or [layer.chosen / count] * count
        found: list[Tally] = []
        for ids in set(stage.experts[at]) if self._even(stage, at) else stage.experts[at]:
            routes = tokens * sum(shares[e] for e in ids)
            tally = Tally()
            tally.add("bf16", 0, sum(layer.experts[e] * (1 - (1 - shares[e]) ** tokens) for e in ids), 0)
            for one, cost in work:
                data = 0 if one.op.name in IN_REGISTERS else cost.data_bytes * self.item / 4
                each = one.count / count * routes
                tally.add(one.numbers or "bf16", each * cost.flops, 0, each * data)
            found.append(tally)
        return max(found, key=lambda t: (self.seconds(t)[0] or 0.0, t.weight_bytes, sum(t.flops.values())))

    def _even(self, stage: Stage, at: int) -> bool:
        return stage.first + at not in self.shares

    def _sent(self, stage: Stage, local: int) -> float:
        """Bytes a device sends for one micro-batch: rows to others and back, streams to the next stage.

        A token goes once to each other device that holds one of its experts, chosen evenly.
        """
        width, total = len(stage.devices), 0.0
        for layer in stage.layers():
            met = (width - 1) * (1 - (1 - 1 / width) ** self.w.layers[layer].chosen)
            total += 2 * local * met * self.w.width * self.item
        if stage.last < len(self.w.layers) - 1:
            total += local * self.w.streams * self.item
        return total

    # ---------------------------------------------------------------------------- time

    def seconds(self, tally: Tally) -> tuple[float | None, str]:
        """The longer of arithmetic and memory, and which it is."""
        compute = 0.0
        for numbers, flops in tally.flops.items():
            rate = self.device.compute_rate(ARITHMETIC[numbers])
            if rate is None:
                return None, "unknown"
            compute += flops / rate[1]
        rate_of_memory = self.device.memory_rate
        if rate_of_memory is None:
            return None, "unknown"
        memory = (tally.weight_bytes + tally.data_bytes) / rate_of_memory
        return max(compute, memory), "compute" if compute > memory else "memory"

    def _part(self, name: str, tally: Tally) -> Part:
        seconds, bound = self.seconds(tally)
        flops = round(sum(tally.flops.values()))
        return Part(name, flops, round(tally.weight_bytes), round(tally.data_bytes), seconds, bound)


def _total(times: Iterable[float | None]) -> float | None:
    """The sum, None if one of them is not known."""
    found = list(times)
    known = [t for t in found if t is not None]
    return sum(known) if len(known) == len(found) else None


def _bound(parts: Sequence[Part], link: float | None) -> str:
    """What most of the time goes to."""
    if link is None or any(part.seconds is None for part in parts):
        return "unknown"
    spent = {"memory": 0.0, "compute": 0.0, "link": link}
    for part in parts:
        spent[part.bound] += part.seconds or 0.0
    return max(spent, key=lambda name: spent[name])
