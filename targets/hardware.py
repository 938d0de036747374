"""Figures of devices nobody here has: memory, bandwidth, peaks and links, each with where it is from.

Owns `hardware.json` and what a device is. Knows no model and no target; what is not published stays unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4c.errors import TargetError, unknown

OWN = Path(__file__).with_name("hardware.json")
FORMATS = ("f32", "bf16", "fp16", "int8", "fp8", "fp4")
"""Number formats a peak may be quoted for."""

EFFICIENCIES = ("compute", "memory", "link")


@dataclass(frozen=True)
class Device:
    """One accelerator, as its figures say. None is "not published".

    Attributes:
        name: key in `hardware.json`, e.g. ``ascend-910b2``.
        memory: bytes.
        bandwidth: bytes per second between memory and the cores.
        peaks: format of `FORMATS` -> dense operations per second.
        link: bytes per second to other devices, one way.
        efficiency: "compute", "memory" and "link" -> the share of the figure that a good kernel reaches.
        source: where the figures are from, and what is doubtful about them.
        doc: what the device is, in words.

    Raises:
        TargetError: a figure is not positive, or a format or an efficiency is unknown or missing.
    """

    name: str
    memory: int | None
    bandwidth: float | None
    peaks: Mapping[str, float | None]
    link: float | None
    efficiency: Mapping[str, float]
    source: str
    doc: str = ""

    def __post_init__(self) -> None:
        for name in self.peaks:
            if name not in FORMATS:
                raise unknown("number format", name, FORMATS, TargetError, self.name)
        for name in self.efficiency:
            if name not in EFFICIENCIES:
                raise unknown("efficiency", name, EFFICIENCIES, TargetError, self.name)
        figures = {"memory": self.memory, "bandwidth": self.bandwidth, "link": self.link, **self.peaks}
        for name, figure in figures.items():
            if figure is not None and not _positive(figure):
                raise TargetError(
                    f"{name} is {figure!r}", where=self.name, allowed="a positive number, or null for unknown"
                )
        for name in EFFICIENCIES:
            if not _positive(self.efficiency.get(name)) or self.efficiency[name] > 1:
                given = self.efficiency.get(name)
                raise TargetError(
                    f"efficiency {name} is {given!r}", where=self.name, allowed="more than 0, at most 1"
                )

    @property
    def memory_rate(self) -> float | None:
        """Bytes per second that a good kernel reads from memory."""
        return None if self.bandwidth is None else self.bandwidth * self.efficiency["memory"]

    @property
    def link_rate(self) -> float | None:
        """Bytes per second that a good exchange sends to other devices."""
        return None if self.link is None else self.link * self.efficiency["link"]

    def compute_rate(self, formats: Sequence[str]) -> tuple[str, float] | None:
        """The first of `formats` whose peak is known, and the operations per second reached in it."""
        for name in formats:
            peak = self.peaks.get(name)
            if peak is not None:
                return name, peak * self.efficiency["compute"]
        return None


def _positive(figure: object) -> bool:
    return isinstance(figure, int | float) and not isinstance(figure, bool) and 0 < figure < float("inf")


def load_devices(path: Path = OWN) -> dict[str, Device]:
    """Name -> device, from a file of the form of `hardware.json`.

    An efficiency that a device does not state is that of the file, or else that of `hardware.json`.

    Raises:
        TargetError: the file is missing, is not of that form, or a device contradicts itself.
    """
    where = path.name
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        entries = [(dict(entry), str(entry["name"])) for entry in raw["devices"]]
        stated = raw.get("efficiency", {})
        default = {name: stated[name] for name in EFFICIENCIES if name in stated}
        if path != OWN:
            default = {**_own_efficiency(), **default}
        return {name: _device(entry, default) for entry, name in entries}
    except OSError as error:
        raise TargetError(f"cannot be read: {error.strerror or error}", where=where) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TargetError(
            f"is not a table of devices: {type(error).__name__}: {error}", where=where,
            allowed='{"devices": [{"name", "memory", "bandwidth", "peaks", "link", "source"}]}',
        ) from None  # fmt: skip


def _own_efficiency() -> dict[str, float]:
    stated = json.loads(OWN.read_text(encoding="utf-8"))["efficiency"]
    return {name: stated[name] for name in EFFICIENCIES}


def _device(entry: Mapping[str, Any], default: Mapping[str, float]) -> Device:
    memory = entry["memory"]
    return Device(
        name=str(entry["name"]),
        memory=None if memory is None else int(memory),
        bandwidth=entry["bandwidth"],
        peaks=dict(entry["peaks"]),
        link=entry["link"],
        efficiency={**default, **entry.get("efficiency", {})},
        source=str(entry["source"]),
        doc=str(entry.get("doc", "")),
    )


def device(name: str, devices: Mapping[str, Device] | None = None) -> Device:
    """The device of that name.

    Raises:
        TargetError: there is none; lists the known ones.
    """
    known = load_devices() if devices is None else devices
    if name not in known:
        raise unknown("device", name, known, TargetError)
    return known[name]
