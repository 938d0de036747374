"""What does a token of DeepSeek-V4.1 cost behind 1 thousand to 1 million others, and what does each one keep?

One session of a small model; its state is filled with random entries, then some tokens are decoded behind
each position, the positions in turn over several rounds. Beside the times stand the operations of one step by
kind, counted from the graph: only index scoring may grow. The bytes of state per token are compared with the
formula. Results with the machine's description go to `benchmarks/results/`.

    python benchmarks/v41_context.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from run import machine

from dsv4c import Session, api
from dsv4c.frontend.architecture import ModelConfig
from dsv4c.frontend.checkpoint import open_checkpoint
from dsv4c.frontend.generate import PRESETS, generate_checkpoint
from dsv4c.ir.cost import module_cost
from dsv4c.ir.graph import Module

POSITIONS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
SCORING = ("index_select", "index_candidates", "index_scores")


def long_preset() -> dict[str, Any]:
    """The preset `small-v41` with room for a million tokens and no images."""
    preset: dict[str, Any] = json.loads(json.dumps(PRESETS["small-v41"]))
    preset["text_config"]["max_position_embeddings"] = max(POSITIONS) + 4096
    return preset


def bytes_per_token(c: ModelConfig) -> float:
    """Of the stores in FP32: an entry and its index key per `ratio` tokens, of every layer that publishes."""
    assert c.shared is not None
    ratios = [c.compress_ratios[layer] for layer in c.shared.kv_sources]
    return float(sum(4 * (c.head_dim + c.index_head_dim) / ratio for ratio in ratios))


def operations(module: Module, past: int) -> dict[str, int]:
    """Op -> operations of a step of one token behind `past` others."""
    sizes = {"B": 1, "T": 1, "L": 1, "ctx": past + 1, "past": past, "I": 1, "routed rows": 1}
    return {name: cost.flops for name, (_, cost) in module_cost(module, sizes).items()}


def fill(session: Session, rng: np.random.Generator) -> None:
    """Random entries and index keys of the size that norms give; windows and history likewise."""
    for name, array in session.state.items():
        if array.dtype == np.float32:
            flat = array.reshape(-1)
            for start in range(0, flat.size, 1 << 24):
                part = flat[start : start + (1 << 24)]
                part[...] = rng.standard_normal(part.size, np.float32)
        elif name == "engram.history":
            array[...] = rng.integers(0, 1000, array.shape)


def measure(session: Session, rounds: int, steps: int) -> dict[int, list[float]]:
    """Seconds per step at every position."""
    out: dict[int, list[float]] = {p: [] for p in POSITIONS}
    ids = np.random.default_rng(1).integers(0, 1000, steps)
    for _ in range(rounds):
        for position in POSITIONS:
            session.state["pos"][...] = position
            session.step([[int(ids[0])]])
            started = time.perf_counter()
            for token in ids[1:]:
                session.step([[int(token)]])
            out[position].append((time.perf_counter() - started) / (steps - 1))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = generate_checkpoint(Path(folder) / "ckpt", long_preset())
        config = open_checkpoint(checkpoint).config
        module = api.load_checkpoint(checkpoint)
        lowered = api.lower(module).module
        path = api.compile(module, output=Path(folder) / "m.dsv4", golden=False)
        small, large = (Session(path, context=n, threads=a.threads) for n in (1 << 10, max(POSITIONS) + 64))
        kept = (large.state_bytes - small.state_bytes) / (large.context - small.context)
        fill(large, np.random.default_rng(0))
        seconds = measure(large, a.rounds, a.steps)
    counts = {p: operations(lowered, p) for p in POSITIONS}
    first = counts[POSITIONS[0]]
    grows = {p: sorted(n for n in c if c[n] > first[n]) for p, c in counts.items()}
    rows = {
        p: {
            "ms_per_token": round(1e3 * statistics.median(s), 3),
            "ms_of_rounds": [round(1e3 * x, 3) for x in s],
            "scoring_gflop": round(sum(counts[p].get(n, 0) for n in SCORING) / 1e9, 4),
            "other_gflop": round(sum(f for n, f in counts[p].items() if n not in SCORING) / 1e9, 4),
            "grows": grows[p],
        }
        for p, s in seconds.items()
    }
    result = {
        "what": "decode, one token per step, batch 1, behind synthetic states",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "model": "small-v41",
        "options": {k: v for k, v in vars(a).items() if k != "output"},
        "bytes_per_token": {"measured": kept, "formula": bytes_per_token(config)},
        "positions": rows,
    }
    name = f"{datetime.now(UTC):%Y-%m-%d}-v41-context.json"
    output = a.output or Path(__file__).with_name("results") / name
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"state per token: {kept:g} bytes, by the formula {bytes_per_token(config):g}")
    for position, row in rows.items():
        work = f"{row['scoring_gflop']:.4f} GFLOP of scoring, {row['other_gflop']:.4f} of the rest"
        print(f"{position:8} tokens before: {row['ms_per_token']:8.3f} ms, {work}")
    print(output)


if __name__ == "__main__":
    main()
