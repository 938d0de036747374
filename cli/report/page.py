"""The page: sections in order, each present where its facts are, as HTML with the charts in it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from dsv4c.cli import devices
from dsv4c.cli.kernels import HEAD, NUMBERS, kernel_rows, step_sentences
from dsv4c.cli.show import size
from dsv4c.runtime import Artifact
from dsv4c.runtime.archs import archs_of

from . import charts
from .ceilings import Ceilings
from .markup import table, text
from .measured import measured_layers, measured_roofline, measured_speed, replay_error

Facts = dict[str, Any]

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 2rem auto;
  padding: 0 1rem; max-width: 60rem }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .4rem; border-top: 1px solid #c9d3da; padding-top: 1rem }
p { margin: .3rem 0 .8rem; max-width: 48rem }
.faint { color: #5b6b78 }
table { border-collapse: collapse; font-size: .88rem; margin: .4rem 0 1rem; display: block; overflow-x: auto }
th, td { text-align: left; padding: .18rem .9rem .18rem 0; border-bottom: 1px solid #eef1f3;
  vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; display: block }
"""


def render(artifact: Artifact, ceilings: Ceilings) -> str:
    """The whole page as HTML that refers to nothing outside itself."""
    meta, report = artifact.meta, artifact.meta["report"]
    sections = [(title, body) for title, make in SECTIONS if (body := make(meta, report, ceilings))]
    title = f"{meta['model']['name']} for {meta['target']}:{meta['arch']['name']}"
    body = "\n".join(f"<section><h2>{escape(t)}</h2>\n{b}\n</section>" for t, b in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="faint">{escape(_summary(artifact))}</p>\n{body}\n</body>\n</html>\n'
    )


def _summary(artifact: Artifact) -> str:
    meta, archs = artifact.meta, [a["name"] for a in archs_of(artifact)]
    several = f", code for {', '.join(archs)}, of which a machine takes the first that it has"
    return (
        f"{artifact.path.name}: {size(artifact.path.stat().st_size)}, {meta['format']} artifact, "
        f"{meta['numerics']} numerics, compiled in {meta['report']['seconds']:.1f} s"
        + (several if len(archs) > 1 else "")
    )


def _note(report: Facts, name: str) -> Facts:
    found = report.get("notes", {}).get(name, {})
    return found if isinstance(found, dict) else {}


# -------------------------------------------------------------------------------------- sections


def _pipeline(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    rows = []
    for p in report["passes"]:
        changed = [c for c in p.get("changed", {}).values() if isinstance(c, float | int)]
        kept = "not checked" if not p.get("changed") else f"{max(changed, default=0):.2g}"
        if "differs" in p.get("changed", {}).values():
            kept = "differs"
        rows.append(
            (p["name"], p["changes"], p["ops_before"], p["ops_after"], f"{1000 * p['seconds']:.1f}", kept,
             p.get("measure", ""))
        )  # fmt: skip
    head = ("pass", "changes", "ops before", "after", "ms", "largest change", "measured by")
    words = (
        "Each pass, what it changed, and, where the compilation verified passes, the largest change of any "
        "output or state over random inputs, relative to its range."
    )
    return text(words) + charts.pipeline(report["passes"]) + table(head, rows, frozenset({1, 2, 3, 4, 5}))


def _weights(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    if "weights" not in report:
        return ""
    before, after = report["weights"]["before"], report["weights"]["after"]
    total = [sum(r["bytes"] for r in rows) for rows in (before, after)]
    rows = [
        (where, r["class"], r["format"], r["tensors"], size(r["bytes"]))
        for where, part in (("checkpoint", before), ("artifact", after)) for r in part
    ]  # fmt: skip
    words = f"{size(total[0])} read from the checkpoint, {size(total[1])} in the artifact with its padding."
    head = ("where", "class", "format", "tensors", "bytes")
    return text(words) + charts.weights(before, after) + table(head, rows, frozenset({3, 4}))


def _experts(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    note = _note(report, "prune_experts")
    layers = [layer for layer in note.get("layers", []) if layer.get("scores")]
    out = ""
    if note.get("layers"):
        gone = sum(len(layer["dropped"]) for layer in note["layers"])
        total = sum(layer["experts_before"] for layer in note["layers"])
        out += text(f"Strength {note['strength']}: {gone} of {total} experts went.")
        rows = [
            (layer["layer"], layer["experts_before"], len(layer["kept"]),
             " ".join(map(str, layer["dropped"])) or "none", size(layer["bytes_before"]),
             size(layer["bytes_after"]))
            for layer in note["layers"]
        ]  # fmt: skip
        head = ("layer", "experts", "kept", "dropped", "bytes before", "after")
        out += table(head, rows, frozenset({1, 2, 4, 5}))
    usage = layers or report.get("expert_usage", [])
    return out + (charts.experts(usage) if usage else "")


def _requantised(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    rows = _note(report, "requantise").get("classes", [])
    if not rows:
        return ""
    head = (
        "class",
        "tensors",
        "format before",
        "after",
        "bytes before",
        "after",
        "largest error",
        "relative RMS",
        "dB",
    )
    return table(
        head,
        [
            (r["class"], r["tensors"], r["format_before"], r["format_after"], size(r["bytes_before"]),
             size(r["bytes_after"]), f"{r['max_abs']:.3g}", f"{r['rel_rms']:.3g}", _decibel(r["sqnr_db"]))
            for r in rows
        ],
        frozenset({1, 4, 5, 6, 7, 8}),
    )  # fmt: skip


def _decibel(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _quality(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    q = report.get("quality")
    if not q:
        return ""
    rows = [
        ("perplexity before", f"{q['before']['perplexity']:.4f}"),
        ("perplexity after", f"{q['after']['perplexity']:.4f}"),
        ("KL divergence, mean, nats", f"{q['kl']['mean']:.3g}"), ("99th percentile", f"{q['kl']['p99']:.3g}"),
        ("same first choice", f"{100 * q['top1']:.2f} %"),
    ]  # fmt: skip
    out = text(f"Over {q['tokens']} tokens of held-out text.") + table(("measure", ""), rows, frozenset({1}))
    return out + (charts.baselines(q) if q.get("random") else "")


def _layer_error(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    rows = report.get("error_by_layer")
    words = "The residual streams after every block, and the logits, against exact numerics on one prompt."
    return text(words) + charts.layer_error(rows) if rows else ""


def _memory(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    steps = _note(report, "plan_memory").get("steps", [])
    if not steps:
        return ""
    rows = [
        (s["tokens"], s["temporaries"], size(s["total"]), size(s["bound"]), size(s["peak"])) for s in steps
    ]  # fmt: skip
    head = ("tokens", "temporaries", "without sharing", "live at once", "planned arena")
    words = "Temporaries between ops, placed by their live ranges; what a kernel keeps to itself is left out."
    return text(words) + table(head, rows, frozenset(range(5))) + charts.memory(steps)


def _roofline(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    cost = report.get("cost")
    if not cost:
        return ""
    words = (
        f"Ceilings: {ceilings.flops / 1e9:.4g} GFLOP/s and {ceilings.bandwidth / 1e9:.3g} GB/s, "
        f"{ceilings.source}. Costs are counted from the graph; the area of a dot is its share of the least "
        "possible time."
    )
    out = text(words) + charts.roofline(cost, ceilings)
    for name, step in cost.items():
        seconds = {op: charts.bound(c, ceilings) for op, c in step["ops"].items()}
        rows = [
            (op, c["count"], f"{c['flops'] / 1e6:.4g}", size(c["weight_bytes"]), size(c["data_bytes"]),
             f"{1e6 * seconds[op]:.4g}")
            for op, c in sorted(step["ops"].items(), key=lambda item: -seconds[item[0]])[:10]
        ]  # fmt: skip
        out += table(
            (name, "count", "MFLOP", "weights", "data", "least microseconds"), rows, frozenset(range(1, 6))
        )
    return out


def _kernels(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    plan = meta.get("plan")
    if not plan:
        return ""
    words = (
        "Every kernel of all programs as it was compiled. Occupancy is the part of a core's threads that "
        "its blocks fill by registers and shared memory."
    )
    sentences = "".join(text(line) for line in step_sentences(plan))
    return text(words) + sentences + table(HEAD, kernel_rows(plan), NUMBERS)


def _devices(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    plan = meta.get("plan")
    if not plan or "memory" not in plan:
        return ""
    sentences = "".join(text(line) for line in devices.device_sentences(plan))
    return sentences + table(devices.HEAD, devices.device_rows(plan), devices.NUMBERS)


def _engram(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    note = _note(report, "layout_engram")
    tables = note.get("tables", [])
    if not tables:
        return ""
    rows = [
        (t["loc"], t["rows"], t["record_bytes"], t["hot_rows"], size(t["hot_bytes"]),
         size(t["directory_bytes"]), size(t["cold_bytes"]), _rate(t.get("expected_hit_rate")))
        for t in tables
    ]  # fmt: skip
    head = ("table", "rows", "bytes a record", "hot rows", "hot", "directory", "cold", "expected hits")
    out = charts.tiers(tables) + table(head, rows, frozenset(range(1, 8)))
    points = report.get("hit_curve") or note.get("hit_curve")
    words = (
        "Lookups of the counted text that the most asked-for rows of all tables answer, by the bytes of "
        "their records in memory. Another text asks for other rows too."
    )
    return out + (text(words) + charts.hit_curve(points) if points else "")


def _rate(value: float | None) -> str:
    return "no statistics" if value is None else f"{100 * value:.1f} %"


Section = Callable[[Facts, Facts, Ceilings], str]


def _on_device(meta: Facts, report: Facts, ceilings: Ceilings) -> str:
    found = report.get("estimate")
    if not found:
        return ""
    rows = []
    for name, step in (("decode", found["decode"]), ("prompt", found["prefill"])):
        rate, moved = step["tokens_per_second"], step["weight_bytes"] + step["data_bytes"]
        cells = (_milliseconds(step["seconds"]), f"{rate:,.0f}" if rate else "unknown", step["bound"])
        rows.append((name, *cells, size(moved), f"{step['flops']:.3g}"))
    words = (
        f"An estimate, not a measurement: {found['devices']} x {found['device']['name']}, batch "
        f"{found['batch']}, {found['context']} positions, a prompt of {found['prompt']} tokens. "
    )
    head = ("step", "ms", "tokens/s", "bound by", "bytes", "operations")
    steps = table(head, rows, frozenset({1, 2, 4, 5}))
    held = []
    for stage in found["placement"]["stages"]:
        for number in stage["devices"]:
            m = found["placement"]["memory"][number]
            parts = (size(m[part]) for part in ("dense", "experts", "state", "total"))
            held.append((number, "{} to {}".format(*stage["layers"]), *parts))
    head = ("device", "layers", "dense weights", "experts", "state", "in all")
    assumed = text("Assumed: " + "; ".join(found["assumptions"]) + ".")
    return text(words) + steps + table(head, held, frozenset({2, 3, 4, 5})) + assumed + _others(found)


def _others(estimate: Facts) -> str:
    rows = devices.published_rows(estimate)
    if not rows:
        return ""
    return text("Published by others:") + table(devices.OTHERS_HEAD, rows, devices.OTHERS_NUMBERS)


def _milliseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1000 * seconds:.3g}"


SECTIONS: tuple[tuple[str, Section], ...] = (
    ("Pipeline", _pipeline),
    ("Weights by class and format", _weights),
    ("Quality on held-out text", _quality),
    ("Experts", _experts),
    ("Requantisation", _requantised),
    ("Error by layer", _layer_error),
    ("Planned memory", _memory),
    ("Engram tables", _engram),
    ("Roofline of a step", _roofline),
    ("Devices of the launch plan", _devices),
    ("Kernels of the launch plan", _kernels),
    ("On the device", _on_device),
    ("Measured speed", measured_speed),
    ("Error of the prefill in two halves", replay_error),
    ("Measured roofline", measured_roofline),
    ("Measured time by layer", measured_layers),
)
"""In the order of the page; a section that returns nothing is left out."""
