"""The devices of a launch plan as rows of a table, and what others have published for such a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .kernels import microseconds
from .show import size

Facts = dict[str, Any]

HEAD = (
    "device", "layers", "weights", "states", "arena: decode", "prefill", "handed over: decode", "prefill",
    "least us: decode", "prefill",
)  # fmt: skip
NUMBERS = frozenset(range(2, 10))
"""Columns of HEAD that hold numbers."""

OTHERS_HEAD = ("devices", "batch", "context", "ms/token", "tokens/s per device", "formats", "source")
OTHERS_NUMBERS = frozenset({0, 1, 2, 3, 4})


def device_rows(plan: Facts) -> list[tuple[Any, ...]]:
    """A row per device of meta `plan`, and one for all of them together where there are several."""
    held = plan["memory"]["devices"]
    steps = plan.get("roofline", {}).get("steps", {})
    rows = []
    for number, one in enumerate(held):
        least = [_least(steps, name, lambda step, n=number: step["stages"][n]["seconds"]) for name in _STEPS]
        rows.append(_row(number, "{} to {}".format(*one["layers"]), [one], least))
    if len(held) > 1:
        least = [_least(steps, name, lambda step: step["seconds"]) for name in _STEPS]
        rows.append(_row("all", "", held, least))
    return rows


_STEPS = ("decode", "prefill")


def _row(name: object, layers: str, held: list[Facts], least: list[str]) -> tuple[Any, ...]:
    one = [size(sum(h[what] for h in held)) for what in ("weight_bytes", "state_bytes")]
    steps = [
        size(sum(h[what][step] for h in held)) for what in ("arena_bytes", "handed_bytes") for step in _STEPS
    ]
    return (name, layers, *one, *steps, *least)


def _least(steps: Facts, name: str, of: Callable[[Facts], float | None]) -> str:
    return microseconds(of(steps[name])) if name in steps else ""


def device_sentences(plan: Facts) -> list[str]:
    """For which sizes the bytes are, and what passes between devices."""
    memory = plan["memory"]
    out = [f"Bytes for {memory['batch']} sequence(s) of {memory['context']} positions."]
    if not memory["handovers"]:
        return out
    names = dict.fromkeys(f"{h['name']} {h['dtype']}[{', '.join(h['shape'])}]" for h in memory["handovers"])
    out.append(
        "A step goes through the devices one after the other, and its least time has the copies between them "
        f"by the published figure of the link. Handed over: {'; '.join(names)}."
    )
    for name, step in plan.get("roofline", {}).get("steps", {}).items():
        waits = [s["link_seconds"] for s in step["stages"]]
        known = [s for s in waits if s is not None]
        link = microseconds(sum(known) if len(known) == len(waits) else None)
        out.append(f"{name}: {microseconds(step['seconds'])} us in all, {link} us of them on links.")
    return out


def published_rows(estimate: Facts) -> list[tuple[Any, ...]]:
    """What others have published for the model on this device; nothing where they have not."""
    return [
        (
            row["devices"] or "?", row["batch"], row["context"], f"{row['milliseconds']:g}",
            row["tokens_per_second_per_device"] or "", row["formats"], f"{row['source']}: {row['caveat']}",
        ) for row in estimate.get("published", [])
    ]  # fmt: skip


def estimate_sentence(estimate: Facts) -> str:
    """What a token takes by the figures of the device and what of them is usually reached."""
    decode, prefill = estimate["decode"], estimate["prefill"]
    return (
        f"Estimated, not measured, for {estimate['devices']} x {estimate['device']['name']}, batch "
        f"{estimate['batch']}, {estimate['context']} positions: {_ms(decode['seconds_per_token'])} ms per "
        f"token of a sequence, {_ms(prefill['seconds'])} ms for a prompt of {estimate['prompt']}."
    )


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1000 * seconds:.3g}"
