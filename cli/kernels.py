"""The kernels of a launch plan as rows of a table: what the compiler said of each, and its least time."""

from __future__ import annotations

from typing import Any

from dsv4c.runtime.container.costs import codes_of

Facts = dict[str, Any]

HEAD = (
    "kernel", "registers", "spilled", "shared", "occupancy", "matrix instructions", "launches: decode",
    "least us", "prefill", "least us",
)  # fmt: skip
NUMBERS = frozenset({1, 2, 3, 4, 6, 7, 8, 9})
"""Columns of HEAD that hold numbers."""


def kernel_rows(plan: Facts) -> list[tuple[Any, ...]]:
    """A row per kernel of meta `plan`, in the order of the launches that use it first."""
    steps = plan.get("roofline", {}).get("steps", {})
    found = {name: {row["kernel"]: row for row in step["kernels"]} for name, step in steps.items()}
    rows = []
    for index, kernel in enumerate(plan["kernels"]):
        cells: list[Any] = []
        for name in ("decode", "prefill"):
            row = found.get(name, {}).get(index)
            cells += [row["launches"], microseconds(row["seconds"])] if row else ["", ""]
        matrix = " ".join(f"{name} {count}" for name, count in kernel.get("matrix", {}).items())
        known = (kernel.get("registers", ""), kernel.get("spilled", ""), kernel["shared"])
        rows.append((kernel["name"], *known, kernel.get("occupancy", ""), matrix, *cells))
    return rows


def step_sentences(plan: Facts) -> list[str]:
    """One sentence per step of the roofline: its least time and by which figures."""
    roofline = plan.get("roofline")
    if not roofline:
        return []
    device = roofline["device"]
    multiplied = {codes_of(kernel["constants"]) for kernel in plan["kernels"]}
    codes = [name for name in ("fp8", "int8") if name in multiplied]
    figures = ", ".join((
        device["name"], _figure(device["bandwidth"], 1e9, "GB/s"),
        _figure(device["bf16"], 1e12, "TFLOP/s of BF16"),
        *(_figure(device.get(name), 1e12, f"of {name.upper()}") for name in codes),
        _figure(device["f32"], 1e12, "of FP32"),
    ))  # fmt: skip
    out = [f"Least times by the published figures of {figures}; operations and bytes by the meaning of ops."]
    for name, step in roofline["steps"].items():
        moved = (step["weight_bytes"] + step["data_bytes"]) / 1e6
        out.append(
            f"{name}, {step['tokens']} token(s) after {step['past']}: at least "
            f"{microseconds(step['seconds'])} us in {len(step['launches'])} launches of program "
            f"{step['program']}, {moved:.4g} MB and {step['flops'] / 1e9:.4g} GFLOP."
        )
    return out


def microseconds(seconds: float | None) -> str:
    """Rounded to three digits; "unknown" where the device does not publish a figure."""
    return "unknown" if seconds is None else f"{1e6 * seconds:.3g}"


def _figure(value: float | None, unit: float, name: str) -> str:
    return f"unknown {name}" if value is None else f"{value / unit:.4g} {name}"
