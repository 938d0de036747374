"""The charts of the report, each a function from facts to SVG text. Knows matplotlib and no HTML."""

# matplotlib's own types leave most of its objects as Any.
from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .ceilings import Ceilings

Facts = Mapping[str, Any]
WIDTH = 9.2
"""Inches at 96 pixels each: fits a laptop's window beside the margins."""
INK, ACCENT, SECOND, FAINT = "#1c2733", "#1f6f8b", "#c8553d", "#c9d3da"
PALETTE = ("#1f6f8b", "#c8553d", "#e0a458", "#5b8e7d", "#7d5ba6", "#8a8d91", "#bc4b51", "#2f4858", "#a3b18a")

matplotlib.rcParams.update({
    "svg.fonttype": "none",  # text stays text: searchable, and in the reader's font
    "svg.hashsalt": "dsv4c",  # the same facts give the same bytes
    "font.family": "sans-serif", "font.size": 9.5, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
})  # fmt: skip


def figure(height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = fig.subplots(1, columns, squeeze=False, **options)
    return fig, list(axes[0])


def svg(fig: Figure) -> str:
    """The picture as an <svg> element that scales with its container."""
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return ""


def pipeline(passes: Sequence[Facts]) -> str:
    """Ops after each pass, and its time."""
    fig, (left, right) = figure(
        0.9 + 0.28 * len(passes), 2, sharey=True, gridspec_kw={"width_ratios": [3, 2]}
    )
    names = [p["name"].partition("{")[0] for p in passes]
    place = range(len(passes))
    left.barh(place, [p["ops_before"] for p in passes], color=FAINT, height=0.7, label="before")
    left.barh(place, [p["ops_after"] for p in passes], color=ACCENT, height=0.45, label="after")
    left.set(title="ops", yticks=list(place))
    left.set_yticklabels(names)
    left.invert_yaxis()
    left.legend(loc="lower right")
    right.barh(place, [1000 * p["seconds"] for p in passes], color=SECOND, height=0.45)
    right.set(title="milliseconds")
    return svg(fig)


def weights(before: Sequence[Facts], after: Sequence[Facts]) -> str:
    """Bytes by class, coloured by stored format, in the checkpoint and in the artifact."""
    classes = list(dict.fromkeys(row["class"] for row in [*before, *after]))
    formats = list(dict.fromkeys(row["format"] for row in [*before, *after]))
    fig, (axis,) = figure(1.2 + 0.5 * len(classes))
    for half, rows in enumerate((before, after)):
        start = dict.fromkeys(classes, 0.0)
        for form in formats:
            found = {r["class"]: r["bytes"] / 2**20 for r in rows if r["format"] == form}
            if not found:
                continue
            place = [classes.index(c) + (0.2 if half else -0.2) for c in found]
            axis.barh(
                place, list(found.values()), left=[start[c] for c in found], height=0.36,
                color=PALETTE[formats.index(form) % len(PALETTE)], alpha=1.0 if half else 0.55,
            )  # fmt: skip
            for c, size in found.items():
                start[c] += size
    for form in formats:
        axis.barh([0], [0], color=PALETTE[formats.index(form) % len(PALETTE)], label=form)
    axis.set(yticks=range(len(classes)), xlabel="MiB; pale: in the checkpoint, full: in the artifact")
    axis.set_yticklabels(classes)
    axis.invert_yaxis()
    axis.legend(ncols=min(len(formats), 5), loc="lower right")
    return svg(fig)


def memory(steps: Sequence[Facts]) -> str:
    """Bytes of temporaries live at each op, and the arena that holds them."""
    fig, axes = figure(2.6, len(steps))
    for axis, step in zip(axes, steps, strict=True):
        live = [point["live"] / 1024 for point in step["timeline"]]
        axis.fill_between(range(len(live)), live, step="mid", color=ACCENT, alpha=0.35, linewidth=0)
        axis.axhline(step["peak"] / 1024, color=SECOND, linewidth=1)
        axis.set(
            title=f"{step['tokens']} token(s): arena {_size(step['peak'])}",
            xlabel="op",
            ylabel="KiB live",
            ylim=0,
        )
    return svg(fig)


def experts(layers: Sequence[Facts]) -> str:
    """Score of every expert, one row a layer; dropped ones are crossed out."""
    widest = max(len(layer["scores"]) for layer in layers)
    grid = [_relative(layer["scores"], widest) for layer in layers]
    fig, (axis,) = figure(0.9 + 0.24 * len(layers))
    picture = axis.imshow(grid, aspect="auto", cmap="YlGnBu", vmin=0, interpolation="nearest")
    for row, layer in enumerate(layers):
        gone = layer.get("dropped", [])
        axis.scatter(gone, [row] * len(gone), marker="x", s=18, color=SECOND, linewidth=1)
    axis.set(xlabel="expert", yticks=range(len(layers)))
    axis.set_yticklabels([str(layer["layer"]) for layer in layers])
    axis.spines[:].set_visible(False)
    fig.colorbar(picture, ax=axis, label="score / mean of the layer", shrink=0.8)
    return svg(fig)


def _relative(scores: Sequence[float | None], width: int) -> list[float]:
    known = [s for s in scores if s is not None]
    mean = sum(known) / len(known) if known and sum(known) else 1.0
    return [math.nan if s is None else s / mean for s in scores] + [math.nan] * (width - len(scores))


def layer_error(rows: Sequence[Facts]) -> str:
    """Largest and RMS error after every block against exact numerics."""
    fig, (axis,) = figure(2.6)
    place = range(len(rows))
    for key, colour in (("max", SECOND), ("rms", ACCENT)):
        axis.plot(
            place, [max(r[key], 1e-12) for r in rows], marker="o", markersize=3.5, color=colour, label=key
        )
    axis.set(yscale="log", ylabel="error / range", xticks=list(place))
    axis.set_xticklabels([str(r["layer"]) for r in rows], rotation=90 if len(rows) > 24 else 0)
    axis.legend()
    return svg(fig)


def baselines(quality: Facts) -> str:
    """Held-out perplexity of the artifact among random choices of equal size."""
    fig, (axis,) = figure(1.6)
    random = quality["random"]
    axis.scatter(
        random, [0] * len(random), color=FAINT, edgecolor=INK, s=30, label=f"random, {len(random)} seeds"
    )
    axis.axvline(quality["before"]["perplexity"], color=INK, linestyle=":", label="before")
    axis.axvline(quality["after"]["perplexity"], color=SECOND, label="this artifact")
    axis.set(xlabel="perplexity", yticks=[])
    axis.spines["left"].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.5), ncols=3)
    return svg(fig)


def hit_curve(points: Sequence[Facts]) -> str:
    """Share of row lookups served from memory over the bytes kept there."""
    fig, (axis,) = figure(2.6)
    axis.plot(
        [p["bytes"] / 2**20 for p in points], [100 * p["hit_rate"] for p in points], marker="o", color=ACCENT
    )
    axis.set(xscale="log", xlabel="in memory, MiB", ylabel="hits, %", ylim=(0, 102))
    axis.grid(color=FAINT, linewidth=0.5)
    return svg(fig)


def tiers(tables: Sequence[Facts]) -> str:
    """Bytes of each Engram table in memory, in its directory, and on disk."""
    fig, (axis,) = figure(1.0 + 0.4 * len(tables))
    left = [0.0] * len(tables)
    kinds = (
        ("hot_bytes", "hot", SECOND),
        ("directory_bytes", "directory", "#e0a458"),
        ("cold_bytes", "cold", ACCENT),
    )
    for key, label, colour in kinds:
        sizes = [t.get(key, 0) / 2**20 for t in tables]
        axis.barh(range(len(tables)), sizes, left=left, color=colour, height=0.5, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.set(xlabel="MiB", yticks=range(len(tables)))
    axis.set_yticklabels([str(t["loc"]) for t in tables])
    axis.legend(loc="lower right", ncols=3)
    return svg(fig)


def roofline(cost: Mapping[str, Facts], ceilings: Ceilings) -> str:
    """Operations per byte of every kind of op, under what the machine can do."""
    fig, axes = figure(3.2, len(cost), sharey=True)
    ridge = ceilings.flops / ceilings.bandwidth
    for axis, (name, step) in zip(axes, cost.items(), strict=True):
        shown = {op: c for op, c in step["ops"].items() if c["flops"] and c["weight_bytes"] + c["data_bytes"]}
        intensity = {op: c["flops"] / (c["weight_bytes"] + c["data_bytes"]) for op, c in shown.items()}
        lowest, highest = min([0.1, *intensity.values()]), max([10 * ridge, *intensity.values()])
        axis.plot(
            [lowest, ridge, highest],
            [lowest * ceilings.bandwidth / 1e9, *[ceilings.flops / 1e9] * 2],
            color=INK,
        )
        seconds = {op: bound(c, ceilings) for op, c in shown.items()}
        total = sum(seconds.values()) or 1.0
        for op, x in intensity.items():
            y = min(x * ceilings.bandwidth, ceilings.flops) / 1e9
            axis.scatter([x], [y], s=12 + 900 * seconds[op] / total, color=ACCENT, alpha=0.55, linewidth=0)
            if seconds[op] > 0.04 * total:
                axis.annotate(
                    op, (x, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8
                )
        axis.set(
            xscale="log", yscale="log", xlabel="operations per byte",
            title=f"{name}: {step['tokens']} token(s) after {step['past']}, at least {1000 * total:.3g} ms",
        )  # fmt: skip
    axes[0].set_ylabel("GFLOP/s")
    return svg(fig)


def measured(phases: Mapping[str, Facts], ceilings: Ceilings) -> str:
    """What every kind of op reached over its operations per byte, beside what the machine can do."""
    fig, axes = figure(3.4, len(phases), sharey=True)
    ridge = ceilings.flops / ceilings.bandwidth
    for axis, (name, phase) in zip(axes, phases.items(), strict=True):
        shown = {
            row["name"]: (row, row["flops"] / (row["weight_bytes"] + row["data_bytes"]))
            for row in phase["ops"]
            if row["flops"] and row["seconds"] and row["weight_bytes"] + row["data_bytes"]
        }  # fmt: skip
        places = [x for _, x in shown.values()]
        lowest, highest = min([0.1, *places]), max([10 * ridge, *places])
        axis.plot(
            [lowest, ridge, highest],
            [lowest * ceilings.bandwidth / 1e9, *[ceilings.flops / 1e9] * 2], color=INK,
        )  # fmt: skip
        for op, (row, x) in shown.items():
            y, share = row["flops_per_second"] / 1e9, row["seconds"] / phase["seconds"]
            axis.scatter([x], [y], s=12 + 900 * share, color=SECOND, alpha=0.55, linewidth=0)
            if share > 0.04:
                axis.annotate(
                    op, (x, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8
                )
        title = f"{name}: {1000 * phase['seconds'] / phase['steps']:.3g} ms a step"
        axis.set(xscale="log", yscale="log", xlabel="operations per byte", title=title)
    axes[0].set_ylabel("GFLOP/s")
    return svg(fig)


def bound(cost: Facts, ceilings: Ceilings) -> float:
    """The least seconds of one kind of op: by arithmetic or by bytes, whichever is more."""
    moved: float = cost["weight_bytes"] + cost["data_bytes"]
    return max(cost["flops"] / ceilings.flops, moved / ceilings.bandwidth)
