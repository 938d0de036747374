"""`dsv4c estimate`: memory, time and split of a model on a device nobody here has, from published figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.errors import UsageError

from .base import Command, id_list, integer, json_option, load_compiler, number
from .show import amount, as_json, section, size, table

if TYPE_CHECKING:
    from dsv4c.targets.estimate import Estimate, Settings
    from dsv4c.targets.hardware import Device
    from dsv4c.targets.workload import Workload

CONTEXT, PROMPT = 8192, 512
"""What is assumed where nothing is said, as far as the model goes."""

UNKNOWN = "unknown"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="checkpoint directory, or one with only a config.json"
    )
    parser.add_argument(
        "--device", required=True, metavar="NAME", help="e.g. ascend-910b2; a wrong name lists all"
    )
    parser.add_argument(
        "--devices", type=integer(1), default=1, metavar="N", help="equal devices (default 1)"
    )
    parser.add_argument(
        "--stages", type=integer(1), default=0, metavar="S",
        help="pipeline stages; the devices of one share its experts (default: the fewest that fit)",
    )  # fmt: skip
    parser.add_argument(
        "--batch",
        type=id_list,
        default=[1],
        metavar="B,...",
        help="sequences that decode together (default 1)",
    )
    parser.add_argument("--context", type=integer(1), metavar="N", help=f"positions held (default {CONTEXT})")
    parser.add_argument("--prompt", type=integer(1), metavar="N", help=f"tokens to read (default {PROMPT})")
    parser.add_argument(
        "--weights", default="", metavar="CLASS=FORMAT,...",
        help="formats of weights, e.g. experts=int8,linears=int8 (default: as stored)",
    )  # fmt: skip
    parser.add_argument(
        "--activations", default="bf16", metavar="FORMAT", help="of activations and state (default bf16)"
    )
    parser.add_argument(
        "--drafts", type=integer(0), default=0, metavar="M", help="drafts a step checks (default 0)"
    )
    parser.add_argument(
        "--accepted", type=number, default=0.0, metavar="A", help="of them right, on average (default 0)"
    )
    parser.add_argument("--stats", metavar="FILE", help="calibration statistics, to balance experts by")
    parser.add_argument(
        "--hardware", metavar="FILE", help="devices of your own, in the form of hardware.json"
    )
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    target = load_compiler("dsv4c.targets.estimate")
    device = _device(args)
    weights = parse_weights(args.weights)
    load_compiler("dsv4c.targets.workload").check_weights(weights)
    module, kind = load_compiler("dsv4c.cli.estimate_source").module_of(Path(args.source))
    w = target.survey(module, weights)
    longest = int(module.meta["max_positions"])
    shares = _shares(args.stats, w)
    context, prompt = args.context or min(CONTEXT, longest), args.prompt or min(PROMPT, longest)
    asked = [
        target.Settings(
            batch=batch, context=context, prompt=prompt, devices=args.devices, stages=args.stages,
            activations=args.activations, drafts=args.drafts, accepted=args.accepted,
        )
        for batch in args.batch
    ]  # fmt: skip
    found = [target.estimate(w, device, one, shares=shares) for one in asked]
    facts = {
        "source": args.source, "kind": kind, "weights": weights, "model": _model(w),
        "device": found[0].as_json()["device"], "estimates": [_facts(one) for one in found],
        "published": _published(found[0], w, device, asked[0], shares),
    }  # fmt: skip
    print(as_json(facts) if args.json else _text(facts))
    return 0


def _device(args: argparse.Namespace) -> Device:
    hardware = load_compiler("dsv4c.targets.hardware")
    known = hardware.load_devices()
    if args.hardware:
        known |= hardware.load_devices(Path(args.hardware))
    found: Device = hardware.device(args.device, known)
    return found


def parse_weights(text: str) -> dict[str, str]:
    """`experts=int8,linears=int8` -> class -> format; the names are looked up where their tables are."""
    out: dict[str, str] = {}
    for word in filter(None, text.split(",")):
        kind, sign, form = word.partition("=")
        if not sign or kind.strip() in out:
            what = f"{word!r} is not CLASS=FORMAT" if not sign else f"{kind.strip()} is named twice"
            raise UsageError(what, where="--weights", allowed="a list like experts=int8,linears=int8")
        out[kind.strip()] = form.strip()
    return out


def _shares(path: str | None, w: Workload) -> dict[int, list[float]]:
    if path is None:
        return {}
    statistics = load_compiler("dsv4c.passes.statistics").Statistics.load(path)
    found: dict[int, list[float]] = load_compiler("dsv4c.targets.placement").shares_of(w, statistics)
    return found


def _model(w: Workload) -> dict[str, Any]:
    experts = sum(sum(layer.experts) for layer in w.layers)
    meta = w.module.meta
    return {
        **{key: meta[key] for key in ("layers", "experts", "experts_per_token", "hidden_size")},
        "weight_bytes": w.weight_bytes, "expert_bytes": experts, "host_bytes": w.host,
    }  # fmt: skip


def _facts(found: Estimate) -> dict[str, Any]:
    facts = found.as_json()
    return {key: value for key, value in facts.items() if key not in ("device", "published")}


def _published(
    found: Estimate, w: Workload, device: Device, asked: Settings, shares: Mapping[int, list[float]]
) -> list[dict[str, Any]]:
    """Rows of others, each with what the estimate says for its batch, context and devices."""
    beside = load_compiler("dsv4c.targets.estimate").beside
    out = []
    for row in found.published:
        here = beside(row, w, device, asked, shares)
        seconds = here.seconds_per_token if here else None
        out.append({**asdict(row), "estimated_milliseconds": None if seconds is None else 1000 * seconds})
    return out


# ------------------------------------------------------------------------------------ for people


def _text(facts: dict[str, Any]) -> str:
    model, first, last = facts["model"], facts["estimates"][0], facts["estimates"][-1]
    head = (
        f"{facts['source']}: {facts['kind']}, {model['layers']} layers of {model['experts']} experts, "
        f"weights {size(model['weight_bytes'])} ({size(model['expert_bytes'])} experts)"
        + (f", and {size(model['host_bytes'])} of tables on the host" if model["host_bytes"] else "") + "\n"
        f"{first['devices']} x {facts['device']['name']}; "
        "an estimate from published figures, not a measurement"
    )
    rows = facts["estimates"]
    per_part = f"where a decoding step of batch {last['batch']} goes, on the busiest devices"
    per_device = f"memory of the fullest device, of {_size(last['placement']['usable_bytes'])} usable"
    return "".join((
        head,
        section("device", _figures(facts["device"])),
        section(f"decode, {first['context']} positions held", _decode(rows)),
        section(f"prefill of {first['prompt']} tokens, one prompt", _prefill(first)),
        section(per_part, _parts(last)),
        section(per_device, _memory(rows)),
        section("split", _split(last["placement"])),
        section("assumed", "\n".join(f"- {line}" for line in last["assumptions"])),
        section("published by others, and the estimate there", _others(facts["published"])),
    ))  # fmt: skip


def _figures(device: dict[str, Any]) -> str:
    peaks = [f"{name} {amount(value)}" for name, value in device["peaks"].items() if value]
    rates = [(key, _rate(device[key])) for key in ("bandwidth", "link")]
    rows = [("memory", _size(device["memory"])), *rates, ("peaks, op/s", ", ".join(peaks) or UNKNOWN)]
    return table([("what", device["doc"] or device["name"]), *rows, ("source", device["source"])])


def _decode(rows: list[dict[str, Any]]) -> str:
    header = ("batch", "ms/token", "tokens/s", "per device", "bound", "link ms", "sent by a device")
    cells = []
    for row in rows:
        step = row["decode"]
        rate, link = step["tokens_per_second"], _ms(step["link_seconds"])
        cells.append((
            row["batch"], _ms(step["seconds_per_token"]), _count(rate),
            _count(rate and rate / row["devices"]), step["bound"], link, size(step["link_bytes"]),
        ))  # fmt: skip
    return table(cells, header, right=[0, 1, 2, 3, 5, 6])


def _prefill(row: dict[str, Any]) -> str:
    step = row["prefill"]
    cells = (
        _ms(step["seconds"]),
        _count(step["tokens_per_second"]),
        step["bound"],
        _ms(step["link_seconds"]),
    )
    return table([cells], ("ms", "tokens/s", "bound", "link ms"), right=[0, 1, 3])


def _parts(row: dict[str, Any]) -> str:
    parts = sorted(row["decode"]["parts"], key=lambda p: (-(p["seconds"] or 0), -p["weight_bytes"]))
    cells = [
        (
            p["name"],
            amount(p["flops"]),
            size(p["weight_bytes"]),
            size(p["data_bytes"]),
            _ms(p["seconds"]),
            p["bound"],
        )
        for p in parts
    ]
    return table(cells, ("class", "operations", "weights", "data", "ms", "bound"), right=[1, 2, 3, 4])


def _memory(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        held = max(row["placement"]["memory"], key=lambda m: m["total"])
        names = ("dense", "experts", "state", "total")
        cells.append((row["batch"], held["device"], *(size(held[name]) for name in names)))
    return table(cells, ("batch", "device", "dense", "experts", "state", "total"), right=range(6))


def _split(placement: dict[str, Any]) -> str:
    cells = []
    for stage in placement["stages"]:
        first, by_device = stage["devices"][0], stage["experts"][0]["by_device"]
        shown = [f"{first + i}: {ids}" for i, ids in enumerate(by_device)]
        if len(shown) > 4:
            shown = [*shown[:2], "...", shown[-1]]
        devices = f"{first}-{stage['devices'][-1]}" if len(by_device) > 1 else str(first)
        same = all(layer["by_device"] == by_device for layer in stage["experts"])
        layers = "every layer" if same else f"layer {stage['layers'][0]}, others differ"
        cells.append(("{}-{}".format(*stage["layers"]), devices, f"{layers}: " + "; ".join(shown)))
    return table(cells, ("layers", "devices", "experts by device"))


def _others(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["devices"] or "?", row["batch"], row["context"], f"{row['milliseconds']:g}",
            _ms(row["estimated_milliseconds"] and row["estimated_milliseconds"] / 1000), row["formats"],
        )
        for row in rows
    ]  # fmt: skip
    header = ("devices", "batch", "context", "ms/token", "estimated", "formats there")
    notes = dict.fromkeys(f"{row['source']}: {row['caveat']}" for row in rows)
    return "\n".join((table(cells, header, right=range(5)), *(f"- {n}" for n in notes))) if rows else ""


def _ms(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{1000 * seconds:.4g}"


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(count: int | None) -> str:
    return UNKNOWN if count is None else size(count)


def _rate(value: float | None) -> str:
    return (
        UNKNOWN if value is None else f"{amount(int(value))}B/s" if value < 1e9 else f"{value / 1e9:g} GB/s"
    )


ESTIMATE = Command(
    name="estimate",
    summary="say what a model would cost on hardware that is not here",
    about="Estimate memory, time and the split over devices from published figures of the hardware: a\n"
    "roofline, not a measurement. No weight is read; a directory with only a config.json is enough, in the\n"
    "formats of the released checkpoints. What is not published for a device is unknown, not guessed.",
    examples=(
        "dsv4c estimate CHECKPOINT --device ascend-910b2 --devices 8",
        "dsv4c estimate CHECKPOINT --device ascend-910c-die --devices 64 --batch 64,7168 "
        "--weights experts=int8,shared=int8,linears=int8",
        "dsv4c estimate CHECKPOINT --device h200 --devices 4 --context 65536 --json",
    ),
    arguments=_arguments,
    run=_run,
)
