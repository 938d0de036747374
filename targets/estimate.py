"""What a model will cost on a device nobody here has: split, memory, time, and what that rests on.

The door to `workload`, `placement` and `roofline`. Every assumption is in the result as a sentence, and what
others have published for the same model and device stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsv4c.errors import TargetError, UsageError, unknown
from dsv4c.ir.graph import Module

from .hardware import Device
from .hardware import device as named
from .placement import HEADROOM, Demand, Placement, Shares, place
from .roofline import ARITHMETIC, Machine, Step
from .workload import CLASSES, Workload, number_classes, survey

ITEM = {"f32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Formats of activations, state and exchanges -> bytes of a value."""

PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """A figure somebody else published for decoding.

    Attributes:
        devices: how many they used; None where that is not said.
        batch: sequences on all devices together.
        milliseconds: between two tokens of a sequence.
        caveat: why it may not compare.
    """

    model: str
    devices: int | None
    batch: int
    context: int
    formats: str
    milliseconds: float
    tokens_per_second_per_device: float | None
    source: str
    caveat: str


def published_for(meta: Mapping[str, object], device: str) -> tuple[Published, ...]:
    """Published figures of the model (known by its sizes) on a device, all there are."""
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"]
    out = []
    for row in rows:
        shape, devices = row.pop("shape"), row.pop("devices")
        if device in devices and all(meta.get(key) == value for key, value in shape.items()):
            out.append(Published(devices=devices[device], **row))
    return tuple(out)


@dataclass(frozen=True)
class Settings:
    """What is asked for besides model and device.

    Attributes:
        batch: sequences that decode together, on all devices.
        context: positions each of them holds.
        prompt: tokens of the prompt that is read.
        stages: of a pipeline over the devices; 0 takes the fewest that fit.
        activations: format of activations, state and exchanges, a key of `ITEM`.
        drafts: further tokens that a decoding step checks for each sequence.
        accepted: how many of them are right on average.
        headroom: share of the memory that is left free.
    """

    batch: int = 1
    context: int = 8192
    prompt: int = 512
    devices: int = 1
    stages: int = 0
    activations: str = "bf16"
    drafts: int = 0
    accepted: float = 0.0
    headroom: float = HEADROOM

    def check(self, longest: int) -> None:
        """Raise `UsageError` where a number makes no sense for a model of `longest` positions."""
        ranges = {"batch": (1, None), "context": (1 + self.drafts, longest), "prompt": (1, longest)}
        ranges |= {"devices": (1, None), "stages": (0, None), "drafts": (0, None)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"{low} to {high}"
                raise UsageError(f"{name} = {value}", where="estimate", allowed=allowed)
        if not 0 <= self.accepted <= self.drafts:
            raise UsageError(
                f"accepted = {self.accepted:g}", where="estimate", allowed=f"0 to {self.drafts}, the drafts"
            )
        if not 0 <= self.headroom < 1:
            raise UsageError(f"headroom = {self.headroom:g}", where="estimate", allowed="0 to below 1")
        if self.activations not in ITEM:
            raise unknown("format of activations", self.activations, ITEM, UsageError, "estimate")


@dataclass(frozen=True)
class Estimate:
    """The answer for one batch.

    Attributes:
        seconds_per_token: between two tokens of a sequence while decoding; None where it is not known.
    """

    device: Device
    asked: Settings
    decode: Step
    prefill: Step
    seconds_per_token: float | None
    placement: Placement
    assumptions: tuple[str, ...]
    published: tuple[Published, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON values; bytes, operations and seconds as numbers, null for what is not known."""
        return {
            "device": asdict(self.device),
            **asdict(self.asked),
            "decode": {**self.decode.as_json(), "seconds_per_token": self.seconds_per_token},
            "prefill": self.prefill.as_json(),
            "placement": self.placement.as_json(),
            "assumptions": list(self.assumptions),
            "published": [asdict(row) for row in self.published],
        }


def estimate(
    module: Module | Workload,
    device: Device,
    asked: Settings,
    *,
    weights: Mapping[str, str] | None = None,
    shares: Shares | None = None,
) -> Estimate:
    """Memory, time and split of a model on equal devices.

    Args:
        module: at level MODEL, or what `survey` made of it.
        weights: class -> format, see `survey`; what a `Workload` was made with is in it already.
        shares: how often experts are chosen, see `placement.shares_of`; even without.

    Raises:
        UsageError: a number or a format that makes no sense.
        TargetError: the model cannot be split over the devices, or does not fit them.
    """
    w = survey(module, weights) if isinstance(module, Module) else module
    asked.check(int(str(w.module.meta.get("max_positions", asked.context))))
    item, shares = ITEM[asked.activations], shares or {}
    demand = Demand(w, asked.batch, asked.context, item, shares)
    placement = place(demand, asked.devices, device.memory, asked.stages, asked.headroom)
    machine = Machine(w, device, placement, item, shares)
    decode = machine.decode(asked.batch, asked.context, asked.drafts, asked.accepted)
    return Estimate(
        device=device,
        asked=asked,
        decode=decode,
        prefill=machine.prefill(asked.prompt),
        seconds_per_token=None if decode.seconds is None else decode.seconds / (1 + asked.accepted),
        placement=placement,
        assumptions=tuple(_assumptions(w, device, placement, asked, bool(shares))),
        published=published_for(w.module.meta, device.name),
    )


def estimate_artifact(
    module: Module, lowered: Module, name: str, devices: Mapping[str, Device], exact: bool
) -> Estimate | None:
    """The estimate for an artifact: its batch, context, longest program and devices, one for each stage.

    Args:
        module: at level MODEL, with the weights as the artifact's passes left them.
        lowered: what the artifact is made of; what it is estimated for is what `bind_shapes` or
            `spread_layers` left there.
        name: of the device among `devices`; "" where it is this machine.
        exact: whether an artifact of fixed shapes stores its matrices as F32, whatever the checkpoint's
            formats; a launch plan keeps these.

    Returns:
        None where it is for this machine, for any sizes and one device, or no language model.

    Raises:
        TargetError: it does not fit as many devices as it has stages; names the number that does.
    """
    if not name or "logits" not in lowered.outputs:
        return None
    shapes, spread = lowered.meta.get("static_shapes"), lowered.meta.get("spread")
    numbers: Collection[str] = ()
    if isinstance(shapes, dict):
        asked = _asked(shapes, shapes["stages"], shapes["tokens"][-1], module)
        numbers = CLASSES if exact else number_classes(module)
    elif isinstance(spread, dict) and spread["devices"] > 1:
        asked = _asked(spread, spread["devices"], min(Settings.prompt, spread["context"]), module)
    else:
        return None
    w, device = survey(module, dict.fromkeys(numbers, "f32")), named(name, devices)
    if asked.devices > len(w.layers):
        allowed = f"at most its {len(w.layers)} layers"
        raise TargetError(f"{asked.devices} devices", where=module.name, allowed=allowed)
    try:
        return estimate(w, device, asked)
    except TargetError as error:
        enough = _stages_that_fit(w, device, asked)
        hint = f"--devices {enough} fits" if enough else "no number of devices fits"
        raise TargetError(str(error).partition("; allowed")[0], where=device.name, hint=hint) from None


def _asked(sizes: Mapping[str, int], stages: int, prompt: int, module: Module) -> Settings:
    """A stage for each device, and no context that the model does not allow."""
    longest, context = module.meta.get("max_positions"), sizes["context"]
    context = min(context, longest) if isinstance(longest, int) else context
    return Settings(sizes["batch"], context, prompt, stages, stages, "f32")


def _stages_that_fit(w: Workload, device: Device, asked: Settings) -> int:
    """The fewest stages, one device each, that hold the model; 0 where none do."""
    demand = Demand(w, asked.batch, asked.context, ITEM[asked.activations], {})
    for count in range(asked.stages + 1, len(w.layers) + 1):
        with suppress(TargetError):
            place(demand, count, device.memory, count, asked.headroom)
            return count
    return 0


def beside(row: Published, w: Workload, device: Device, asked: Settings, shares: Shares) -> Estimate | None:
    """The estimate for what was published: its batch, context and devices, all else as `asked`.

    Returns:
        None where the model does not fit there in the formats of `w`.
    """
    there = replace(
        asked, batch=row.batch, context=row.context, devices=row.devices or asked.devices, stages=0
    )
    try:
        return estimate(w, device, there, shares=shares)
    except TargetError:
        return None


def _assumptions(
    w: Workload, device: Device, placement: Placement, asked: Settings, calibrated: bool
) -> Iterator[str]:
    share = device.efficiency
    yield (
        f"of the published figures {share['compute']:.0%} of the arithmetic, {share['memory']:.0%} of the "
        f"bandwidth and {share['link']:.0%} of the link are reached; no latency of kernels or links counts"
    )
    yield from _unknown(device, len(placement.memory))
    yield from _arithmetic(w, device)
    yield f"activations, state and exchanges are {asked.activations}; fused element-wise ops move nothing"
    yield "an op class takes the longer of arithmetic and memory; classes and exchanges follow one another"
    choice = "as in the calibration text" if calibrated else "each as often"
    yield f"experts are chosen {choice}, by each token apart, and means count, not the worst draw"
    yield "an expert is read once in a step if any token chose it, and never otherwise"
    if len(placement.memory) > 1:
        yield (
            "the devices of a stage share sequences (decode) or tokens (prefill) evenly and repeat dense "
            "weights; a token goes once to each other device that has one of its experts, and back"
        )
    if len(placement.stages) > 1:
        yield "the batch is cut into as many micro-batches as there are stages, and stages work at once"
    yield "a prompt is read alone, every token against all positions that the last one sees (an upper bound)"
    if asked.drafts:
        yield (
            f"a step checks {asked.drafts} drafts of each sequence and keeps {asked.accepted:g} on average; "
            "what drafting costs is not counted"
        )
    if w.host:
        yield "tables of Engram lie with the host; looking their rows up and sending them is not counted"
    yield "MTP blocks are not counted" if not asked.drafts else "weights of MTP blocks are not counted"
    if placement.usable is not None:
        yield f"{asked.headroom:.0%} of the memory stays free for activations and buffers"


def _unknown(device: Device, devices: int) -> Iterator[str]:
    figures = {
        "memory": device.memory,
        "bandwidth": device.bandwidth,
        "peak": any(device.peaks.values()) or None,
    }
    figures |= {"link": device.link} if devices > 1 else {}
    missing = [name for name, figure in figures.items() if figure is None]
    if missing:
        yield f"not published for {device.name}: {', '.join(missing)}; what needs them is unknown"


def _arithmetic(w: Workload, device: Device) -> Iterator[str]:
    """Which other arithmetic stored formats meet on the device; only those that are in the model."""
    for numbers in sorted({work.numbers for work in w.work if work.numbers}):
        found = device.compute_rate(ARITHMETIC[numbers])
        if found is not None and found[0] != numbers:
            yield f"{numbers} weights are multiplied in {found[0]}"
