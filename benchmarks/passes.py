"""What each optional pass of the TVM pipeline is worth at decode: all, all but one, and the fewest.

    python benchmarks/passes.py            # SMALL, a checkpoint of 2.5 GB
    python benchmarks/passes.py --quick    # the example model

Every variant is measured against the whole pipeline, both alive and in turn, a few tokens at a time, so that
they meet the same moods of the machine; the figure of a variant is the median over the rounds of its time by
the whole pipeline's time of the same round. At most two artifacts exist at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from protocol import Worker
from run import machine, make_checkpoint

import dsv4c
from dsv4c.passes import parse_pipeline, print_pipeline
from dsv4c.targets import TARGETS

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "kjv" / "checkpoint"
MINIMAL = 'fuse_swiglu,fuse_expert_gemms,narrow_weights{storage="auto"}'
"""Without these nothing compiles: experts must be grouped and every weight needs a storage."""
OPTIONAL = (
    "fuse_index_select", "fuse_norm_rotary", "fuse_rotary_write", "fuse_hyper", "fold_shared_expert",
    "merge_projections",
)  # fmt: skip
NEEDS = {"fuse_norm_rotary": ("fuse_rotary_write",)}
"""Pass -> passes that have no work without it, and go with it."""


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="the example model instead of SMALL")
    parser.add_argument("--context", type=int, default=160, help="tokens in the state before decoding")
    parser.add_argument("--decode", type=int, default=12, help="tokens decoded per round and program")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="variants to measure, comma-separated; all without")
    parser.add_argument("--dir", default="build/bench", help="where checkpoint and artifacts go")
    options = parser.parse_args()
    directory = Path(options.dir)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = EXAMPLE if options.quick else make_checkpoint(directory, "small")
    whole = TARGETS["cpu"].format("tvm").passes
    wanted = [v for v in options.only.split(",") if v]
    variants = {name: text for name, text in variants_of(whole).items() if name in wanted or not wanted}
    before = machine()
    best = build(checkpoint, directory / "passes-whole.dsv4", whole)
    try:
        results = [compare(*variant, checkpoint, best, directory, options) for variant in variants.items()]
    finally:
        best.unlink()
    report = {
        "machine": before, "options": vars(options), "checkpoint": checkpoint.name, "whole": whole,
        "results": results,
    }  # fmt: skip
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    name = f"{stamp}-passes-{'example' if options.quick else 'small'}-t{options.threads}.json"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / name).write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


def variants_of(whole: str) -> dict[str, str]:
    """Name -> pipeline: the whole without each optional pass, and the minimal one."""
    passes = parse_pipeline(whole)
    out = {}
    for name in OPTIONAL:
        gone = (name, *NEEDS.get(name, ()))
        out[f"without {' and '.join(gone)}"] = print_pipeline(tuple(p for p in passes if p.name not in gone))
    return {"the minimal pipeline": MINIMAL, **out}


def build(checkpoint: Path, output: Path, passes: str) -> Path:
    return dsv4c.compile(checkpoint, output=output, passes=passes, golden=False)


def compare(
    name: str, passes: str, checkpoint: Path, best: Path, directory: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One variant against the whole pipeline."""
    other = build(checkpoint, directory / "passes-variant.dsv4", passes)
    threads = str(options.threads)
    workers = [Worker(n, "worker_dsv4c.py", str(p), threads) for n, p in ((name, other), ("whole", best))]
    try:
        seconds = measure(workers, options)
    finally:
        for worker in workers:
            worker.close()
        other.unlink()
    result = {
        "variant": name, "passes": passes,
        "tokens_per_second": options.decode / statistics.median(seconds[0]),
        "whole_tokens_per_second": options.decode / statistics.median(seconds[1]),
        "slower_by": statistics.median(a / b for a, b in zip(*seconds, strict=True)),
        "slower_by_at_best": min(seconds[0]) / min(seconds[1]),
        "seconds": seconds,
    }  # fmt: skip
    print(f"{name}: {result['slower_by']:.3f} of the whole pipeline's time", flush=True)
    return result


def measure(workers: Sequence[Worker], options: argparse.Namespace) -> list[list[float]]:
    """Seconds of every round, per worker; the order changes from round to round."""
    for worker in workers:
        worker.measure("prefill", options.context)
        worker.measure("decode", options.decode)
    seconds: list[list[float]] = [[] for _ in workers]
    for turn in range(options.rounds):
        for index in range(len(workers)):
            at = (index + turn) % len(workers)
            seconds[at].append(workers[at].measure("decode", options.decode)["seconds"])
    return seconds


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| pipeline | decode tok/s | whole pipeline, same rounds | time, whole = 1 | best round |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        rates = f"{r['tokens_per_second']:.1f} | {r['whole_tokens_per_second']:.1f}"
        lines.append(f"| {r['variant']} | {rates} | {r['slower_by']:.3f} | {r['slower_by_at_best']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
