"""Side by side on this CPU: dsv4c and transformers on one random checkpoint, in one run.

    make oracle && make bench

Every round measures each program once, in turn; the table gives medians over the rounds and ratios to
transformers in float32. Results with the machine's description go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Worker

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", default="small", help="size of the random model: tiny or small (1.4 billion)"
    )
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dir", default="build/bench", help="where checkpoint and artifacts go (about 6 GB for small)"
    )
    parser.add_argument("--formats", default="tvm-bf16,tvm-f32", help="of tvm-bf16, tvm-f32, onnx")
    parser.add_argument(
        "--rivals", default="float32:eager,bfloat16:eager", help="transformers dtype:experts, comma-separated"
    )
    options = parser.parse_args()
    directory = Path(options.dir)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(directory, options.preset)
    compiled = {name: compile_artifact(checkpoint, directory, name) for name in split(options.formats)}
    workers = [
        Worker(f"dsv4c {n}", "worker_dsv4c.py", c["path"], str(options.threads)) for n, c in compiled.items()
    ] + [
        Worker(
            f"transformers {r}",
            "worker_transformers.py",
            str(checkpoint),
            str(options.threads),
            *r.split(":"),
        )
        for r in split(options.rivals)
    ]
    results = measure(workers, options)
    report = {"machine": machine(), "options": vars(options), "compile": compiled, "results": results}
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{stamp}-{options.preset}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


def split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def make_checkpoint(directory: Path, preset: str) -> Path:
    """The random model in BF16, as transformers saves it, so that both programs read the same files."""
    path = directory / f"{preset}-bf16"
    if not (path / "config.json").exists():
        command = [
            "-m",
            "dsv4c.frontend.generate",
            str(path),
            "--preset",
            preset,
            "--dtype",
            "bf16",
            "--style",
            "saved",
        ]
        subprocess.run([sys.executable, *command], check=True)
    return path


def compile_artifact(checkpoint: Path, directory: Path, name: str) -> dict[str, Any]:
    """Compile in a process of its own; returns path, seconds and peak memory beyond mapped files."""
    output = directory / f"{checkpoint.name}-{name}.dsv4"
    command = [sys.executable, str(HERE / "compile_once.py"), str(checkpoint), str(output), name]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    return {
        "path": str(output),
        "seconds": time.perf_counter() - start,
        "bytes": output.stat().st_size,
        **facts,
    }


def measure(workers: list[Worker], options: argparse.Namespace) -> list[dict[str, Any]]:
    rounds: dict[str, list[dict[str, float]]] = {w.name: [] for w in workers}
    for worker in workers:  # warm: first calls touch every page and settle caches
        worker.measure("prefill", options.prefill)
        worker.measure("decode", 4)
    peaks = {}
    for _ in range(options.rounds):
        for worker in workers:
            prefill, decode = (worker.measure(w, getattr(options, w)) for w in ("prefill", "decode"))
            rounds[worker.name].append({
                "prefill": options.prefill / prefill["seconds"], "decode": options.decode / decode["seconds"],
            })  # fmt: skip
            peaks[worker.name] = decode["peak_bytes"]
    for worker in workers:
        worker.close()
    return [
        {
            "program": name, "peak_bytes": peaks[name],
            **{what: statistics.median(r[what] for r in runs) for what in ("prefill", "decode")},
            "rounds": runs,
        }
        for name, runs in rounds.items()
    ]  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    base = next((r for r in results if r["program"].startswith("transformers float32")), results[0])
    lines = [
        "| program | prefill tok/s | decode tok/s | prefill ratio | decode ratio | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        ratios = [f"{r[w] / base[w]:.2f}" for w in ("prefill", "decode")]
        rates = [f"{r['prefill']:.1f}", f"{r['decode']:.2f}"]
        cells = [r["program"], *rates, *ratios, f"{r['peak_bytes'] / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, with the read bandwidth of that moment."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    array = np.ones(1 << 27, np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float(array.sum())
        seconds.append(time.perf_counter() - start)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "read_gb_per_s_one_thread": array.nbytes / statistics.median(seconds) / 1e9,
    }


if __name__ == "__main__":
    main()
