"""What runs where the GPU is: the golden vectors first, then the real shape under the clock.

Reads the folder that `packing` made and nothing else; results go to the screen and, if asked for, to a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ceilings import copy_rate, matrix_rate
from cutting import cut, layer_of, layers_of
from filling import BLOCK, Filler
from metering import Meter, open_meter
from summing import Row, goals_of, goals_table, rows_of, table
from timing import Case, Held, Timed, TimedBackend, read_experts

from dsv4c.errors import ArtifactError, Dsv4cError, UsageError
from dsv4c.runtime import Artifact
from dsv4c.runtime.container.costs import Rates, codes_of, launch_needs
from dsv4c.runtime.container.plan import ALIGN, Plan
from dsv4c.runtime.container.sizes import size
from dsv4c.runtime.rehearsal import rehearse
from dsv4c.runtime.verify import failures, verify

DRY_LAYERS = 4
SPARE = 3 << 30
"""Bytes that stay free: code of the kernels, blocks of random numbers, and what the driver takes."""

Facts = dict[str, Any]


def run_bundle(given: argparse.Namespace) -> int:
    """Verify and measure; 0, or 1 where the golden vectors or the logits are wrong.

    Raises:
        ToolchainError, ArtifactError: there is no driver, no plan of the folder fits, or a call failed.
    """
    file = given.bundle / "bundle.json"
    if not file.is_file():
        raise UsageError("no bundle.json", where=str(given.bundle), hint="benchmarks/gpu pack makes one")
    bundle = json.loads(file.read_text())
    if given.output and not given.output.resolve().parent.is_dir():
        raise UsageError("its folder does not exist", where=str(given.output))
    arch = choose(bundle, given)
    facts = bundle["archs"][arch]
    dry = ": A DRY RUN, nothing is measured" if given.dry_run else ""
    print(f"{arch}, numerics {bundle['numerics']}, packed {bundle['made']}{dry}")
    if not golden(Artifact.open(given.bundle / facts["golden"]), given.dry_run):
        return 1
    artifact = Artifact.open(given.bundle / facts["shape"])
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "arch": arch, "packed": bundle["made"],
        "shape": bundle["shape"], "numerics": bundle["numerics"], "measured": not given.dry_run,
        **shape(artifact, facts, given),
    }  # fmt: skip
    if given.output:
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    if given.dry_run:
        print("\nA dry run: every launch was checked, nothing was computed and nothing was measured.")
    wrong = [c["name"] for c in report["cases"] if not c["finite"]]
    if wrong:
        print(f"FAILED: logits that are no numbers in {', '.join(wrong)}")
    return 1 if wrong else 0


def choose(bundle: Facts, given: argparse.Namespace) -> str:
    """The arch that was asked for, or the first one that the device takes; a dry run takes the first."""
    archs = list(bundle["archs"])
    if given.arch and given.arch not in archs:
        raise UsageError(f"arch {given.arch!r}", where=str(given.bundle), allowed=", ".join(archs))
    if given.arch or given.dry_run or len(archs) == 1:
        return given.arch or archs[0]
    problems: list[Dsv4cError] = []
    for arch in archs:
        plan = plan_of(Artifact.open(given.bundle / bundle["archs"][arch]["shape"]))
        try:
            open_meter(plan, arch, False)
        except Dsv4cError as error:
            problems.append(error)
        else:
            return arch
    if len({p.what for p in problems}) == 1:  # no driver at all
        raise problems[0]
    what = "; ".join(p.what for p in problems)
    raise ArtifactError(what, where=str(given.bundle), allowed=", ".join(archs))


def plan_of(artifact: Artifact) -> Plan:
    return Plan.from_json(json.loads(artifact.section("plan")), str(artifact.path))


def golden(artifact: Artifact, dry: bool) -> bool:
    """Replay the golden vectors; whether they are right. A dry run checks the launches of the same prompt."""
    if dry:
        found = rehearse(artifact)
        print(f"golden prompt: {found.launches} launches of {found.kernels} kernels checked, none computed")
        return True
    checks = verify(artifact)
    failed = failures(checks)
    for check in failed:
        print(f"  {check.name}: error {check.error:.2e}, allowed {check.tolerance:.0e}")
    if failed:
        print(f"FAILED: {len(failed)} of {len(checks)} golden checks, first {failed[0].name}. Stopped.")
        return False
    worst = max(c.error for c in checks)
    print(f"golden vectors: {len(checks)} checks are right, the largest error is {worst:.2e}")
    return True


# -------------------------------------------------------------------------------------- the real shape


def shape(artifact: Artifact, facts: Facts, given: argparse.Namespace) -> Facts:
    """Ceilings of the card, then every case with as many layers as fit."""
    plan = plan_of(artifact)
    device, meter = open_meter(plan, str(artifact.path), given.dry_run)
    card = meter.facts()
    print(f"card: {card['name']}, driver {card['driver']}, {card['memory'] / 1e9:.1f} GB")
    rates, sources = ceilings(plan, device, meter, facts)
    cases = cases_of(given)
    wanted = given.layers or (min(DRY_LAYERS, layers_of(plan)) if given.dry_run else 0)
    layers = wanted or fitting(plan, cases, meter.free_bytes() - SPARE)
    calls = [p["calls"] for p in artifact.meta["plan"]["programs"]]
    small, small_calls = cut(plan, calls, layers)
    weights = sum(size(b.elements, {}) * b.item_bytes for b in small.of_kind("weight"))
    print(f"{layers} of {layers_of(plan)} layers, {weights / 1e9:.1f} GB of weights made up on the device")
    backend = TimedBackend(Held(artifact, small), small, device, meter, given.dry_run)
    found = [one_case(backend, case, small, small_calls, rates, given.repeats) for case in cases]
    return {
        "card": card, "device": facts["device"], "figures": facts["figures"], "ceilings": sources,
        "layers": layers, "weight_bytes": weights, "cases": found,
    }  # fmt: skip


def ceilings(plan: Plan, device: Any, meter: Meter, facts: Facts) -> tuple[Rates, Facts]:
    """Measured ones, and the published figures where nothing could be measured."""
    figures = facts["figures"]
    copy = copy_rate(device, meter)
    if copy is not None:
        print(f"copies: {copy / 1e9:.0f} GB/s read and written")
    codes = sorted({codes_of(k.constants) for k in plan.kernels} - {""})
    measured, sources = dict[str, float | None](), dict[str, str]()
    for factors in ("bf16", *codes):
        filler = Filler(plan, device, meter)
        measured[factors], source = matrix_rate(device, meter, filler, plan.vendor, factors)
        if measured[factors] is None and figures[factors]:
            source = f"published for {facts['device']} ({source})"
        sources[factors] = source
    matrix = {name: rate or figures[name] for name, rate in measured.items()}
    for name, rate in matrix.items():
        products = "unknown" if rate is None else f"{rate / 1e12:.0f} TFLOP/s"
        print(f"{name.upper()} products: {products}, {sources[name]}")
    rates = Rates(
        copy or figures["bandwidth"], matrix["bf16"], figures["f32"], matrix.get("fp8"), matrix.get("int8")
    )
    return rates, {
        "copy_bytes_per_second": copy, "matrix_flops_per_second": measured, "matrix_source": sources,
        "used": {"bandwidth": rates.bandwidth, "vector": rates.vector, **matrix},
    }  # fmt: skip


def cases_of(given: argparse.Namespace) -> list[Case]:
    """Decode at the end of the context, prefill from its start."""
    if given.context < 2 or min([*given.decode, *given.prefill, 1]) < 1:
        raise UsageError("a size is too small", where="run", allowed="--context from 2, counts from 1 on")
    decode = [Case("decode", b, 1, given.context - 1, given.context) for b in given.decode]
    return decode + [Case("prefill", 1, t, 0, max(t, given.context)) for t in given.prefill]


def fitting(plan: Plan, cases: Sequence[Case], free: int) -> int:
    """As many layers as fit, with the states and temporaries of the largest case.

    Raises:
        ArtifactError: not even one does.
    """
    for layers in range(layers_of(plan), 0, -1):
        if needed(plan, cases, layers) <= free:
            return layers
    raise ArtifactError(f"{free / 1e9:.1f} GB are free", where="one layer", allowed="a card with more memory")


def needed(plan: Plan, cases: Sequence[Case], layers: int) -> int:
    """Bytes of a plan's first layers; memory of inputs and states grows to the largest case."""
    held = [b for b in plan.buffers if layer_of(b.name) < layers]
    total = sum(_aligned(size(b.elements, {}) * b.item_bytes) for b in held if b.kind == "weight")
    for buffer in (b for b in held if b.kind != "weight"):
        total += max(_aligned(size(buffer.elements, c.sizes(plan)) * buffer.item_bytes) for c in cases)
    arenas = (sum(size(s, c.sizes(plan)) for s in plan.program(c.sizes(plan)).slots) for c in cases)
    return total + max(arenas) + 8 * BLOCK


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def one_case(
    backend: TimedBackend, case: Case, plan: Plan, calls: Sequence[Any], rates: Rates, repeats: int
) -> Facts:
    """Measure one size and print what came out."""
    timed = backend.measure(case, repeats, rates.bandwidth)
    sizes: Mapping[str, int] = {**case.sizes(plan), "past": case.past}
    program = plan.program(case.sizes(plan))
    needs = launch_needs(plan, program, calls[plan.programs.index(program)], sizes)
    needs = read_experts(plan, program, needs, timed.routes) if timed.launches else needs
    rows = rows_of(plan, program, needs, timed.launches, rates)
    goals = goals_of(case.kind, case.tokens, rows, rates)
    launches = f"{len(program.launches)} launches of program {program.name}"
    print(f"\n## {case.name}, {case.past} tokens seen: {launches}")
    print(sentence(case, timed, rows))
    print(f"\n{table(rows, rates)}")
    if goals:
        print(f"\n{goals_table(goals)}")
    chosen = [int((counts > 0).sum()) for counts in timed.routes] if timed.launches else []
    return {
        "name": case.name, "batch": case.batch, "tokens": case.tokens, "past": case.past,
        "context": case.context, "program": program.name, "seconds": middle(timed.steps),
        "seconds_all": timed.steps, "whole_seconds": middle(timed.whole), "finite": timed.finite,
        "chosen_experts": chosen, "kernels": [row.as_json() for row in rows],
        "launch_seconds": timed.launches,
        "goals": [{"name": g.name, "wanted": g.wanted, "reached": g.reached} for g in goals],
    }  # fmt: skip


def sentence(case: Case, timed: Timed, rows: Sequence[Row]) -> str:
    """A step as a whole."""
    bytes_, flops = sum(r.bytes for r in rows), sum(r.flops for r in rows)
    needs = f"{bytes_ / 1e9:.3g} GB and {flops / 1e12:.3g} TFLOP by the meaning of its ops"
    if not timed.steps:
        return f"{needs}; not measured"
    seconds, tokens = statistics.median(timed.steps), case.batch * case.tokens
    spread = f"{1e3 * min(timed.steps):.3g} to {1e3 * max(timed.steps):.3g}"
    chosen = [int((counts > 0).sum()) for counts in timed.routes]
    experts = f"; tokens chose {min(chosen)} to {max(chosen)} experts of a layer" if chosen else ""
    return (
        f"{1e3 * seconds:.4g} ms a step ({spread}), {tokens / seconds:.4g} tokens/s; with copies to and from "
        f"the host {1e3 * statistics.median(timed.whole):.4g} ms; {needs}{experts}"
    )


def middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
