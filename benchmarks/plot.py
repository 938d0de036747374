"""Bars of tokens per second as an SVG file, written by hand: a panel for decode and one for prefill.

Every program has a row in its group; a tick on a row of dsv4c marks what the machine's read bandwidth (at
decode) or float32 matrix product (at prefill) would allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

PANELS = {
    "decode": "decode, tokens per second",
    "prefill": "prefill of {tokens} tokens, tokens per second",
}
COLOURS = {"dsv4c": "#1f6fb4", "llama.cpp": "#e08214", "transformers": "#8c8c8c"}
TICK = "Tick: what read bandwidth (decode) or float32 matrix products (prefill) allow."
OTHER_NUMERICS = "#74b3e0"
"""Artifacts that do not compute exactly."""

LABELS, BARS, VALUES = 230, 300, 60
"""Widths: of the names, of the longest bar, and of the number behind it."""
ROW, HEAD, TOP, FOOT = 20, 26, 64, 40
"""Heights: of a program, of a group's name, above the first group, below the last."""
PANEL = BARS + VALUES + 20

Program = Mapping[str, Any]
Ceilings = Mapping[str, Mapping[str, float]]


def bar_chart(programs: Sequence[Program], ceilings: Ceilings, title: str, tokens: int) -> str:
    """The chart as SVG text.

    Args:
        programs: in order, those of a group together; see `goals` for their keys.
        ceilings: group -> {"read" (GB/s), "gemm" (GFLOP/s)}.
        tokens: of the prompt.
    """
    groups = list(dict.fromkeys(p["group"] for p in programs))
    height = TOP + len(groups) * HEAD + len(programs) * ROW + FOOT
    width = LABELS + len(PANELS) * PANEL
    body = [text(12, 22, title, size=15, weight="bold"), *legend(12, 42)]
    for index, (phase, heading) in enumerate(PANELS.items()):
        left = LABELS + index * PANEL
        body.append(text(left, TOP - 4, heading.format(tokens=tokens), weight="bold"))
        body += rows(programs, ceilings, phase, left, longest(programs, ceilings, phase))
    body += names(programs)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *body,
        text(12, height - 14, TICK, size=11),
        "</svg>",
        "",
    ])  # fmt: skip


def positions(programs: Sequence[Program]) -> Iterator[tuple[int, Program, bool]]:
    """(top of its row, program, whether it opens a group)."""
    y, group = TOP, None
    for p in programs:
        opens = p["group"] != group
        y += HEAD if opens else 0
        group = p["group"]
        yield y, p, opens
        y += ROW


def names(programs: Sequence[Program]) -> Iterator[str]:
    for y, p, opens in positions(programs):
        if opens:
            yield text(12, y - 7, f"{p['group']} weights", weight="bold")
        yield text(24, y + 13, p["name"])


def rows(
    programs: Sequence[Program], ceilings: Ceilings, phase: str, left: int, most: float
) -> Iterator[str]:
    for y, p, _ in positions(programs):
        length = BARS * p[phase] / most
        yield (
            f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{ROW - 5}" fill="{colour(p)}">'
            f"<title>{escape(p['name'])}: {p[phase]:.1f}</title></rect>"
        )
        limit = ceiling_of(p, ceilings, phase)
        if limit:
            x = left + BARS * limit / most
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + ROW - 1}"'
            yield f'<line {ends} stroke="black" stroke-width="2"/>'
        behind = max(length, BARS * limit / most if 0 < limit - p[phase] < 0.2 * most else 0)
        yield text(left + behind + 5, y + 13, f"{p[phase]:.0f}" if p[phase] >= 100 else f"{p[phase]:.1f}")


def ceiling_of(p: Program, ceilings: Ceilings, phase: str) -> float:
    """Tokens per second that the machine allows; 0 where that is not known or says nothing."""
    limits = ceilings.get(p["group"])
    if limits is None or "token_bytes" not in p:
        return 0.0
    if phase == "decode":
        return float(limits["read"] * 1e9 / p["token_bytes"])
    exact = p["numerics"] == "exact"
    return float(limits["gemm"] * 1e9 * p["prompt_tokens"] / p["prompt_flops"]) if exact else 0.0


def longest(programs: Sequence[Program], ceilings: Ceilings, phase: str) -> float:
    return max(max(float(p[phase]), ceiling_of(p, ceilings, phase)) for p in programs)


def colour(p: Program) -> str:
    return OTHER_NUMERICS if p.get("numerics", "exact") != "exact" else COLOURS[p["program"]]


def legend(x: int, y: int) -> Iterator[str]:
    entries = {**COLOURS, "dsv4c, other numerics than exact": OTHER_NUMERICS}
    for name, fill in entries.items():
        yield f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{fill}"/>'
        yield text(x + 17, y, name)
        x += 40 + 7 * len(name)


def text(x: float, y: float, words: str, size: int = 12, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}">{escape(words)}</text>'
