"""The sections about what `dsv4c bench` measured: speed, the error of a shortened prefill, and kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.cli.bench_profile import COLUMNS, cells, recording, shares, steps_of
from dsv4c.cli.show import size

from . import charts
from .ceilings import Ceilings
from .markup import table, text

Facts = Mapping[str, Any]


def measured_speed(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    bench = report.get("bench")
    if not bench:
        return ""
    s = bench["settings"]
    words = (
        f"{s['prompt_tokens']} tokens of prompt in steps of {s['chunk']}, then {s['decode_tokens']} one by "
        f"one; batch {s['batch']}, {s['repeat']} runs on random ids. "
        f"Loaded in {bench['load_seconds']:.2f} s; {size(bench['state_bytes'])} of state, "
        f"{size(bench['peak_rss_bytes'])} of memory at the peak."
    )
    rows = [
        (name, *(f"{spread[key]:.1f}" for key in ("median", "min", "max")))
        for name, spread in bench["tokens_per_second"].items()
    ]
    return text(words) + table(("tokens/s", "median", "min", "max"), rows, frozenset({1, 2, 3}))


def replay_error(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    replay = report.get("bench", {}).get("replay")
    if not replay:
        return ""
    words = (
        "Decoder layers over the end of the prompt only, against every layer over every token: at the last "
        "token of the prompt and every one after it."
    )
    rows = [
        ("tokens that decoder layers see", replay["tokens"]), ("exact from", replay["exact_from"]),
        ("KL divergence, mean, nats", f"{replay['kl']:.3g}"),
        ("same top token", f"{100 * replay['same_top']:.2f} %"),
    ]  # fmt: skip
    return text(words) + table(("measure", ""), rows, frozenset({1}))


def measured_roofline(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    profile = report.get("bench", {}).get("profile")
    if not profile:
        return ""
    words = (
        f"Ceilings: {ceilings.flops / 1e9:.4g} GFLOP/s in float32 and {ceilings.bandwidth / 1e9:.3g} GB/s, "
        f"{ceilings.source}; not measured: {profile['ceilings']['left_out']}. Operations and bytes are "
        "counted from the graph, weights as stored; a dot may lie above the roof where values stay in the "
        "cache, or a kernel sees that it need not compute. Its area is its share of the time."
    )
    out = text(words) + charts.measured(profile["phases"], ceilings)
    for name, phase in profile["phases"].items():
        out += text(_where(name, phase)) + _rows(name, phase, "ops")
    return out


def measured_layers(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    profile = report.get("bench", {}).get("profile")
    if not profile:
        return ""
    return "".join(_rows(name, phase, "layers") for name, phase in profile["phases"].items())


def _where(name: str, phase: Facts) -> str:
    parts = ", ".join(f"{what} {100 * s / phase['seconds']:.1f} %" for what, s in shares(phase))
    return f"{name}: {steps_of(phase)}, {recording(phase)}: {parts}."


def _rows(name: str, phase: Facts, kind: str) -> str:
    rows = [(row["name"], *cells(row, phase)) for row in phase[kind]]
    return table((f"{name}, a step", *COLUMNS), rows, frozenset(range(1, 7)))
