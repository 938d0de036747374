"""Side by side on this CPU: dsv4c, llama.cpp and transformers on one random checkpoint, in one run.

    make oracle rivals && make bench

Programs that hold the weights in formats of about the same size form a group (`groups.py`). Every round
measures the machine's ceilings and each program of a group once, in turn; figures are medians of the rounds.
What takes long is measured afterwards, artifact by artifact. Prints whether the goals are met, and writes the
report as JSON, the tables as Markdown and a chart as SVG to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import alone
import numpy as np
from goals import evaluate, goals_table, programs_table
from groups import Group, chosen, pairs_of
from placing import forget, placed
from plot import bar_chart
from prepare import POSITIONS, make_artifacts, make_checkpoint, make_gguf
from protocol import Worker, unpacked_logits

from dsv4c.targets import TARGETS

HERE = Path(__file__).parent
RIVALS = HERE.parent / "build" / "rivals-env" / "bin" / "python"
CONTEXT = 1024
MOST = 0.95
"""Of physical memory, what the programs of a group and their files may fill."""
SPEEDS = ("prefill", "decode", "batch")
COSTS = ("storage", "numerics", "token_bytes", "prompt_tokens", "prompt_flops")
REFERENCE = "transformers float32"
"""How the name of the program begins whose logits the others are compared with."""

Facts = dict[str, Any]
Rounds = dict[str, list[dict[str, float]]]


def main() -> None:
    options = arguments()
    directory = Path(options.dir)
    directory.mkdir(parents=True, exist_ok=True)
    groups = chosen(options.only)
    checkpoint = make_checkpoint(directory, options.preset, POSITIONS)
    offered = list(TARGETS["cpu"].numerics)
    pairs = [pair for group in groups for pair in pairs_of(group, offered)]
    artifacts = make_artifacts(checkpoint, directory, pairs, options.reuse)
    report: Facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
        "options": vars(options), "programs": [], "ceilings": {}, "files": {},
        "compile": {name: {**a, "path": Path(a["path"]).name} for name, a in artifacts.items()},
    }  # fmt: skip
    reference = None
    for group in groups:
        mine = {name: a for name, a in artifacts.items() if a["storage"] in group.storages}
        workers, files = start(group, mine, checkpoint, options)
        try:
            logits = {w.name: unpacked_logits(w.measure("logits", options.prefill)) for w in workers}
            if reference is None:
                reference = next((x for name, x in logits.items() if name.startswith(REFERENCE)), None)
            errors = errors_of(logits, reference, group)
            rounds, ceilings = measure(workers, options)
        finally:
            for worker in workers:
                worker.close()
        report["programs"] += [
            summary(group, name, runs, errors[name], mine.get(name, {})) for name, runs in rounds.items()
        ]
        report["ceilings"][group.name], report["files"][group.name] = ceilings, files
        write(report, options)  # what is there stays if a later group fails
    if not options.quick:
        report |= alone.measure_all(artifacts, options.long.split(","), options.threads)
        write(report, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="small", help="size of the random model")
    add("--prefill", type=int, default=512, help="prompt tokens")
    add("--decode", type=int, default=32, help="tokens decoded per round")
    add("--batch", type=int, default=8, help="tokens decoded per round in each of eight rows")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--dir", default="build/bench", help="where the files go (about 30 GB for small)")
    add("--only", default="", help="names of groups, comma-separated: F32,BF16,...")
    add("--reuse", action="store_true", help="keep artifacts of an earlier run")
    add("--quick", action="store_true", help="leave out what is measured alone, after the rounds")
    add("--no-rivals", dest="rivals", action="store_false", help="leave out llama.cpp and transformers")
    add("--long", default="dsv4c bf16 exact,dsv4c published exact", help="artifacts that read a long prompt")
    add("--name", default="cpu", help="of the result files")
    return parser.parse_args()


def start(
    group: Group, artifacts: dict[str, Facts], checkpoint: Path, options: argparse.Namespace
) -> tuple[list[Worker], dict[str, float]]:
    """One process for each program of a group, and how fast the files that they map can be read.

    Those that need much memory while they load come first.
    """
    threads, given = options.threads, [a["path"] for a in artifacts.values()]
    workers, gguf = [], None
    forget(list(Path(options.dir).iterdir()))  # room for this group's
    if options.rivals:
        gguf = make_gguf(checkpoint, Path(options.dir), group.gguf, str(RIVALS))
        mapped = sum(Path(path).stat().st_size for path in (*given, gguf))
        hows = heats(group, checkpoint, options, physical_memory() * MOST - mapped)
        workers += [transformers(how, checkpoint, options) for how in hows]
        forget([checkpoint])
    files = placed([*([str(gguf)] if gguf else []), *given], threads)
    if gguf:
        workers.append(llama(group.gguf, gguf, options))
    for name, a in artifacts.items():
        workers.append(Worker(name, "worker_dsv4c.py", a["path"], str(threads), str(CONTEXT)))
    return workers, files


def transformers(how: str, checkpoint: Path, options: argparse.Namespace) -> Worker:
    given = (str(checkpoint), str(options.threads), *how.split(":"))
    return Worker(f"transformers {how}", "worker_transformers.py", *given, threads=options.threads)


def heats(group: Group, checkpoint: Path, options: argparse.Namespace, room: float) -> list[str]:
    """Which implementations run in the rounds: the fastest in a prompt and the fastest in tokens, mostly one.

    Where both do not fit into `room` bytes, the fastest in a prompt alone: pages would come from disk.
    """
    if len(group.transformers) < 2:
        return list(group.transformers)
    found: dict[str, tuple[float, float]] = {}
    peaks: dict[str, float] = {}
    for how in group.transformers:
        worker = transformers(how, checkpoint, options)
        worker.measure("prefill", options.prefill)
        prompt = worker.measure("prefill", options.prefill)["seconds"]
        tokens = worker.measure("decode", options.batch)
        found[how], peaks[how] = (prompt, tokens["seconds"] / options.batch), tokens["peak_bytes"]
        worker.close()
    print(f"{group.name}: seconds of a prompt, of a token: {found}", file=sys.stderr, flush=True)
    best = [min(found, key=lambda how: found[how][i]) for i in range(2)]
    if sum(peaks[how] for how in set(best)) > room:
        del best[1]
    return [how for how in group.transformers if how in best]


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def llama(kind: str, path: Path, options: argparse.Namespace) -> Worker:
    """llama.cpp as it comes, or with weights as they are stored where it aborts otherwise."""
    given = (str(path), str(options.threads), str(CONTEXT))
    for how in ("", "plain"):
        more = filter(None, [how])
        name = f"llama.cpp {kind} {how}".rstrip()
        try:
            worker = Worker(
                name, "worker_llama.py", *given, *more, python=str(RIVALS), threads=options.threads
            )
            worker.measure("logits", options.prefill)
            return worker
        except SystemExit as error:
            print(f"{error}: left out", file=sys.stderr, flush=True)
    raise SystemExit(f"llama.cpp runs {path} in no way")


def errors_of(
    logits: dict[str, np.ndarray], reference: np.ndarray | None, group: Group
) -> dict[str, float | None]:
    """Root mean square difference from the reference over its own, of the last token's logits.

    Raises:
        SystemExit: a program's is beyond what its format explains.
    """
    if reference is None:
        return dict.fromkeys(logits)
    size = float(np.sqrt(np.mean(np.square(reference))))
    errors = {n: float(np.sqrt(np.mean(np.square(x - reference)))) / size for n, x in logits.items()}
    print(f"{group.name}: logits differ from {REFERENCE} by {errors}", file=sys.stderr, flush=True)
    if wrong := {n: e for n, e in errors.items() if not e <= group.error}:
        raise SystemExit(f"{group.name}: {wrong}, allowed: {group.error}; not the same model")
    return errors


def measure(workers: list[Worker], options: argparse.Namespace) -> tuple[Rounds, dict[str, float]]:
    """Every round of every worker; the medians of the ceilings that were measured between them."""
    ceilings = Worker("ceilings", "worker_ceilings.py", str(options.threads), threads=options.threads)
    rounds: Rounds = {w.name: [] for w in workers}
    limits: dict[str, list[float]] = {"read": [], "gemm": []}
    try:
        for worker in workers:  # warm: first calls touch every page and settle caches
            worker.measure("prefill", options.prefill)
            worker.measure("decode", 4)
            if worker.name.startswith("dsv4c"):
                worker.measure("fill", options.prefill)
        for turn in range(options.rounds):
            limits["read"].append(ceilings.measure("read", 5)["gb_per_s"])
            limits["gemm"].append(ceilings.measure("gemm", 3)["gflop_per_s"])
            for worker in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                rounds[worker.name].append(one_round(worker, options))
    finally:
        ceilings.close()
    return rounds, {name: statistics.median(values) for name, values in limits.items()}


def one_round(worker: Worker, options: argparse.Namespace) -> dict[str, float]:
    prefill = worker.measure("prefill", options.prefill)
    decode = worker.measure("decode", options.decode)
    found = {
        "prefill": options.prefill / prefill["seconds"], "decode": options.decode / decode["seconds"],
        "peak_bytes": decode["peak_bytes"], "major_faults": prefill["major_faults"] + decode["major_faults"],
    }  # fmt: skip
    if worker.name.startswith("dsv4c"):
        batch = worker.measure("batch", options.batch)
        found["batch"] = batch["rows"] * options.batch / batch["seconds"]
    return found


def summary(
    group: Group, name: str, rounds: list[dict[str, float]], error: float | None, artifact: Facts
) -> Facts:
    speeds = {k: statistics.median(r[k] for r in rounds) for k in SPEEDS if k in rounds[0]}
    costs = {k: artifact[k] for k in COSTS if k in artifact}
    return {
        "group": group.name, "program": name.split(" ")[0], "name": name, **speeds, **costs, "error": error,
        "peak_bytes": max(r["peak_bytes"] for r in rounds),
        "major_faults": int(sum(r["major_faults"] for r in rounds)), "rounds": rounds,
    }  # fmt: skip


def write(report: Facts, options: argparse.Namespace) -> None:
    """The report and its views; those of one day and name replace each other."""
    lines = evaluate(report)
    report["goals"] = [vars(line) for line in lines]
    title = f"{options.preset}, {options.threads} threads, {report['machine']['cpu']}, {report['date'][:10]}"
    tables = f"{programs_table(report['programs'])}\n\n{goals_table(lines)}\n"
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    stem = f"{report['date'][:10]}-{options.name}"
    (results / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (results / f"{stem}.md").write_text(f"# {title}\n\n{tables}", encoding="utf-8")
    chart = bar_chart(report["programs"], report["ceilings"], title, options.prefill)
    (results / f"{stem}.svg").write_text(chart, encoding="utf-8")
    print(tables)
    print(f"ceilings: {report['ceilings']}")


def machine() -> Facts:
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
