"""The goals on a CPU, and whether a run met them. Pure: a report of `run.py` goes in, lines come out.

A report holds, as far as it was measured:
    programs: list of {"group", "program" ("dsv4c", "llama.cpp", "transformers"), "name", "storage",
        "numerics", "prefill" and "decode" and "batch" (tokens per second, medians of the rounds),
        "token_bytes", "prompt_tokens", "prompt_flops"}
    ceilings: group -> {"read" (GB/s), "gemm" (GFLOP/s)}, medians of the same rounds
    long: list of {"name", "tokens", "long" and "short" (seconds per token)}
    first_token, compile, memory: list of {"name", ...}, see `single_lines`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Program = Mapping[str, Any]
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: the quantity and the program it was measured on.
        measured, goal: as text; "" where nothing was measured.
        met: None where nothing was measured.
    """

    what: str
    measured: str
    goal: str
    met: bool | None


@dataclass(frozen=True)
class SpeedGoal:
    """A goal of one group: the fastest artifact against the fastest rival of the group, and the machine.

    Attributes:
        rival: the program to beat; "" is the fastest of all of them.
        times: how many times its tokens per second.
        ceiling: the share of what the machine can do at most, 0 for none: of read bandwidth at decode, of
            the float32 matrix product at prefill.
        numerics: of the artifacts that count; () takes all.
        label: of numerics or formats, where the group does not say it.
    """

    phase: str
    group: str
    rival: str
    times: float
    ceiling: float = 0.0
    numerics: tuple[str, ...] = ()
    label: str = ""


SPEED_GOALS = (
    SpeedGoal("decode", "F32", "llama.cpp", 1.25, 0.75),
    SpeedGoal("decode", "BF16", "llama.cpp", 1.5, 0.65),
    SpeedGoal("decode", "8 bits", "llama.cpp", 1.8),
    SpeedGoal("decode", "FP4 and FP8", "llama.cpp", 2.0, 0.55),
    SpeedGoal("decode", "4 bits", "llama.cpp", 2.0),
    SpeedGoal("prefill", "F32", "", 1.2, 0.65),
    SpeedGoal("prefill", "BF16", "", 2.0, numerics=("bf16",), label=" in BF16 arithmetic"),
    SpeedGoal("prefill", "8 bits", "", 3.0),
    SpeedGoal("prefill", "FP4 and FP8", "", 3.0),
    SpeedGoal("prefill", "4 bits", "", 3.0),
)

BATCH = 2.0
"""Tokens per second of eight rows over those of one."""
LONG = 1.3
"""Time per token of a long prompt over that of a short one."""
FIRST_TOKEN = 1.0
"""Seconds from the start of the process to the first token."""
COMPILE = 60.0
"""Seconds of compiling from BF16."""
COMPILE_MEMORY = 1e9
"""Bytes of its own that the compiler may take: it streams weights, whatever the size of the model."""
SESSION_MEMORY = 200e6
"""Bytes that a session may hold beside mapped weights and state."""


def evaluate(report: Report) -> list[Line]:
    """Every line of the goals."""
    lines = [line for goal in SPEED_GOALS for line in speed_lines(report, goal)]
    return [*lines, *batch_lines(report), *single_lines(report)]


def speed_lines(report: Report, goal: SpeedGoal) -> Iterator[Line]:
    found = [p for p in report.get("programs", ()) if p["group"] == goal.group and goal.phase in p]
    ours = [p for p in found if p["program"] == "dsv4c"]
    ours = [p for p in ours if not goal.numerics or p["numerics"] in goal.numerics]
    best = fastest(ours, goal.phase)
    rival = fastest((p for p in found if p["program"] != "dsv4c" and goal.rival in p["program"]), goal.phase)
    what = f"{goal.phase}, {goal.group}{goal.label}"
    against = f"{goal.rival or 'best rival'}{'' if rival is None else ' (' + rival['name'] + ')'}"
    title = f"{what}: {'dsv4c' if best is None else best['name']} / {against}"
    ratio = best[goal.phase] / rival[goal.phase] if best and rival else None
    yield at_least(title, ratio, goal.times, "{:.2f} x")
    if goal.ceiling:
        limits = report.get("ceilings", {}).get(goal.group)
        share = share_of_ceiling(best, limits, goal.phase) if best and limits else None
        of = "read bandwidth" if goal.phase == "decode" else "F32 GEMM ceiling"
        yield at_least(f"{what}: share of {of}", share, goal.ceiling, "{:.0%}")


def fastest(programs: Iterable[Program], phase: str) -> Program | None:
    return max(programs, key=lambda p: p[phase], default=None)


def share_of_ceiling(program: Program, ceilings: Mapping[str, float], phase: str) -> float:
    """Bytes or operations per second over what the machine reads or multiplies at most."""
    if phase == "decode":
        return float(program["decode"] * program["token_bytes"] / (ceilings["read"] * 1e9))
    flops = program["prefill"] * program["prompt_flops"] / program["prompt_tokens"]
    return float(flops / (ceilings["gemm"] * 1e9))


def batch_lines(report: Report) -> Iterator[Line]:
    """The artifact that gains least from a batch stands for all."""
    ratios = {
        p["name"]: p["batch"] / p["decode"]
        for p in report.get("programs", ())
        if p["program"] == "dsv4c" and "batch" in p
    }
    name, ratio = min(ratios.items(), key=lambda item: item[1], default=("", None))
    yield at_least(f"batch of 8 / batch of 1, decode{least(name, ratios)}", ratio, BATCH, "{:.2f} x")


def single_lines(report: Report) -> Iterator[Line]:
    """What is measured for itself; of several artifacts the worst stands for all."""
    long = {r["name"]: r["long"] / r["short"] for r in report.get("long", ())}
    tokens = max((r["tokens"] for r in report.get("long", ())), default=16384)
    name, worst = worst_of(long)
    yield at_most(f"prefill of {tokens} / 512, time per token{least(name, long)}", worst, LONG, "{:.2f} x")
    first = {r["name"]: r["seconds"] for r in report.get("first_token", ())}
    name, worst = worst_of(first)
    yield at_most(f"`dsv4c run` to first token{least(name, first)}", worst, FIRST_TOKEN, "{:.2f} s")
    compiled = report.get("compile", {}).get("dsv4c bf16 exact")
    yield at_most("compile from BF16", compiled and compiled["seconds"], COMPILE, "{:.0f} s")
    own = compiled and compiled["peak_own_bytes"] / 1e9
    yield at_most("own memory of the compiler", own, COMPILE_MEMORY / 1e9, "{:.2f} GB")
    memory = {r["name"]: (r["own_bytes"] - r["state_bytes"]) / 1e6 for r in report.get("memory", ())}
    name, worst = worst_of(memory)
    title = f"session beside mapped weights and state{least(name, memory)}"
    yield at_most(title, worst, SESSION_MEMORY / 1e6, "{:.0f} MB")


def worst_of(values: Mapping[str, float]) -> tuple[str, float | None]:
    return max(values.items(), key=lambda item: item[1], default=("", None))


def least(name: str, of: Mapping[str, float]) -> str:
    if not of:
        return ""
    return f": {name}" + (f", the worst of {len(of)}" if len(of) > 1 else "")


def at_least(what: str, value: float | None, limit: float, form: str) -> Line:
    goal = f">= {form.format(limit)}"
    met = None if value is None else value >= limit
    return Line(what, "" if value is None else form.format(value), goal, met)


def at_most(what: str, value: float | None, limit: float, form: str) -> Line:
    goal = f"<= {form.format(limit)}"
    met = None if value is None else value <= limit
    return Line(what, "" if value is None else form.format(value), goal, met)


# --------------------------------------------------------------------------------- as Markdown


def goals_table(lines: Sequence[Line]) -> str:
    """Lines as a Markdown table."""
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [f"| {x.what} | {x.measured} | {x.goal} | {words[x.met]} |" for x in lines]
    return "\n".join(["| what | measured | goal | met |", "|---|---|---|---|", *rows])


def programs_table(programs: Sequence[Program]) -> str:
    """Every program of a report as a Markdown table."""
    lines = [
        "| weights | program | prefill tok/s | decode tok/s | batch of 8, tok/s | MB per token | peak GB"
        " | logits, rms error | faults |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in programs:
        batch = f"{p['batch']:.0f}" if "batch" in p else ""
        touched = f"{p['token_bytes'] / 1e6:.0f}" if "token_bytes" in p else ""
        rates = (f"{p['prefill']:.1f}", f"{p['decode']:.1f}", batch, touched, f"{p['peak_bytes'] / 1e9:.1f}")
        error = "" if p["error"] is None else f"{p['error']:.1g}"
        cells = (p["group"], p["name"], *rates, error, str(p["major_faults"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
