"""Times the matrix products of the TVM emitter on each storage scheme, alone: no graph, no session.

Weights rotate through more copies than the caches hold, as the layers of a model do. Each round measures
every scheme once, in turn, so that all of them meet the same moods of the machine; figures are medians, with
the best beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCHEMES = "f32,bf16,int8,int4,fp8,mxfp8,mxfp4,nvfp4"
ROWS = ("f32", "bf16", "split", "int8")


@dataclass
class Run:
    """One product (`products.Product`) in one scheme, and what its rounds took."""

    product: Any
    seconds: list[float] = field(default_factory=list)  # of one call
    cpu: list[float] = field(default_factory=list)  # seconds of all threads together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--tokens", default="1,128")
    parser.add_argument(
        "--rows", choices=ROWS, default="f32", help="inputs; split: float32 as three BF16 numbers; int8:"
        " where codes are integers or FP4, else bf16"
    )  # fmt: skip
    parser.add_argument("--linear", default="2048x1024", help="N x K")
    parser.add_argument("--experts", default="16x704x1024", help="experts x inner x K")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="kernels", help="of the result file")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read when TVM's runtime loads
    results = []
    for tokens in (int(t) for t in options.tokens.split(",")):
        for what in ("linear", "experts"):
            runs = {s: make(what, s, tokens, options) for s in options.schemes.split(",")}
            measure(runs, options.rounds)
            results += [row(what, tokens, name, run) for name, run in runs.items()]
    print(table(results))
    from run import machine

    report = {"machine": machine(), "options": vars(options), "results": results}
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{stamp}-{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")


def make(what: str, scheme: str, tokens: int, options: argparse.Namespace) -> Run:
    from dsv4c.targets import parse_target
    from dsv4c.targets.cpu.tvm.products import Maker

    sizes = [int(n) for n in getattr(options, what).split("x")]
    maker = Maker(parse_target("cpu")[1])
    make_product = maker.linear if what == "linear" else maker.experts
    return Run(make_product(scheme, options.rows, tokens, *sizes))


def measure(runs: dict[str, Run], rounds: int) -> None:
    for run in runs.values():
        run.product.call(0)
    for _ in range(rounds):
        for run in runs.values():
            start, cpu = time.perf_counter(), time.process_time()
            copies = run.product.copies
            for copy in range(copies):
                run.product.call(copy)
            run.seconds.append((time.perf_counter() - start) / copies)
            run.cpu.append((time.process_time() - cpu) / copies)


def row(what: str, tokens: int, scheme: str, run: Run) -> dict[str, Any]:
    typical, best, read = statistics.median(run.seconds), min(run.seconds), run.product.read
    return {
        "product": what, "tokens": tokens, "scheme": scheme, "milliseconds": 1e3 * typical,
        "best_milliseconds": 1e3 * best, "cpu_milliseconds": 1e3 * statistics.median(run.cpu),
        "weight_bytes": read, "gb_per_s": read / typical / 1e9,
        "best_gb_per_s": read / best / 1e9,
        "gflop_per_s": 2 * run.product.products / typical / 1e9,
    }  # fmt: skip


COLUMNS = {"ms": "milliseconds", "best ms": "best_milliseconds", "CPU ms": "cpu_milliseconds"}


def table(results: list[dict[str, Any]]) -> str:
    """Each time with its ratio to that of bf16: above 1 is faster."""
    titles = [f"{title} | times bf16" for title in COLUMNS]
    lines = [f"| product | T | scheme | GB/s | GFLOP/s | {' | '.join(titles)} |"]
    lines.append("|---" * (5 + 2 * len(COLUMNS)) + "|")
    for r in results:
        same = [x for x in results if (x["product"], x["tokens"]) == (r["product"], r["tokens"])]
        base = next((x for x in same if x["scheme"] == "bf16"), same[0])
        rates = [f"{r['gb_per_s']:.1f}", f"{r['gflop_per_s']:.0f}"]
        cells = [r["product"], str(r["tokens"]), r["scheme"], *rates]
        for key in COLUMNS.values():
            cells += [f"{r[key]:.3f}", f"{base[key] / r[key]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
