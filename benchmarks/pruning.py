"""Is an expert pruned by calibrated saliency missed less than one pruned by chance?

Counts statistics over a calibration text with the evaluator, prunes by saliency, by frequency and by many
random seeds, compiles each model and measures its loss on held-out text. Results with the machine's
description go to `benchmarks/results/`.

    python benchmarks/pruning.py                    # the cuts below, of examples/kjv
    python benchmarks/pruning.py --cuts "0.5:layers.3.ffn" --seeds 5
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from run import machine
from tokenizers import Tokenizer

import dsv4c
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.meaning import Evaluator
from dsv4c.passes import run_pipeline
from dsv4c.passes.moe_layers import find_layers
from dsv4c.passes.prune_experts import PruneExperts
from dsv4c.passes.statistics import ExpertUsage, Statistics

ROOT = Path(__file__).resolve().parents[1]
KJV = ROOT / "examples" / "kjv"
BOS, BATCH = 0, 4
CUTS = ("0.75:*", "0.75:layers.[2-4].ffn", "0.5:*")
"""Fraction kept and layers: a quarter everywhere, a quarter where scores choose, a half everywhere."""
STRENGTHS = ("saliency", "frequency")

Ids = npt.NDArray[np.int64]


def windows(tokenizer: Tokenizer, text: str, length: int) -> list[tuple[Ids, Ids]]:
    """Batches of inputs, each row starting with <bos>, and targets [BATCH,length]; a rest is left out."""
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    targets = ids[: len(ids) // (BATCH * length) * BATCH * length].reshape(-1, BATCH, length)
    return [(np.concatenate([np.full((BATCH, 1), BOS), t[:, :-1]], axis=1), t) for t in targets]


def count(module: Module, batches: Sequence[Ids], identity: str) -> Statistics:
    """Statistics of the routed experts over `batches` of [B,T] tokens, each from a fresh state."""
    evaluator, layers = Evaluator(module), find_layers(module)[0]
    sums = {layer.loc: np.zeros((3, layer.count)) for layer in layers}
    for ids in batches:
        inputs = {"tokens": ids, "n_valid": np.full(len(ids), ids.shape[1]), "rows": np.zeros((len(ids), 1))}
        state = evaluator.fresh_state(B=len(ids), ctx=ids.shape[1])
        trace = evaluator(inputs, state, trace=True).trace
        for layer in layers:
            gates = trace[layer.dispatch][1::2]
            outputs = [trace[_producer(layer.combine, 2 + e)][0] for e in range(layer.count)]
            # The weight is applied before the expert's last matrix: the norm of the sum's term has it.
            norms = [float(np.linalg.norm(y.astype(np.float64), axis=1).sum()) for y in outputs]
            sums[layer.loc] += [[len(g) for g in gates], [float(g.sum()) for g in gates], norms]
    usage = {loc: ExpertUsage(s[0].astype(np.int64), s[1], s[2]) for loc, s in sums.items()}
    vocab = module.meta["vocab_size"]
    assert isinstance(vocab, int)
    return Statistics(identity, vocab, sum(ids.size for ids in batches), usage)


def _producer(op: Op, index: int) -> Op:
    producer = op.operands[index].producer
    assert producer is not None
    return producer


def losses(module: Module, batches: Sequence[tuple[Ids, Ids]], threads: int) -> list[float]:
    """Nats per token of every window, by the compiled artifact."""
    with tempfile.TemporaryDirectory() as folder:
        path = dsv4c.compile(module, output=Path(folder) / "model.dsv4", golden=False)
        session = dsv4c.Session(path, batch=BATCH, context=batches[0][0].shape[1], threads=threads)
        out: list[float] = []
        for given, targets in batches:
            session.reset()
            x = session.step(given).astype(np.float64)
            top = x.max(-1)
            chosen = np.take_along_axis(x, targets[..., None], -1)[..., 0]
            out += (np.log(np.exp(x - top[..., None]).sum(-1)) + top - chosen).mean(axis=1).tolist()
    return out


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the report has but the machine and the options."""
    module = dsv4c.load_checkpoint(options.checkpoint)
    tokenizer = Tokenizer.from_str(module.assets["tokenizer"].decode())
    texts = [Path(p).read_text(encoding="utf-8") for p in (options.calibration, options.heldout)]
    calibration, held_out = (windows(tokenizer, text, options.window) for text in texts)
    statistics = count(module, [given for given, _ in calibration], Path(options.checkpoint).parent.name)
    whole = measure(module, (), held_out, options.threads)
    print(f"unpruned: {whole['loss']:.4f} nats per token")
    cuts = {}
    with tempfile.TemporaryDirectory() as folder:
        stats = str(Path(folder) / "statistics.npz")
        statistics.save(stats)
        for cut in options.cuts:
            keep, _, layers = cut.partition(":")
            common: dict[str, Any] = {"keep": float(keep), "scope": options.scope, "layers": layers or "*"}
            found = {}

            def add(name: str, *passes: PruneExperts, found: dict[str, Any] = found, cut: str = cut) -> None:
                found[name] = measure(module, passes, held_out, options.threads, f"{cut} {name}")

            for strength in STRENGTHS:
                add(strength, PruneExperts(strength, stats=stats, **common))
            for seed in range(options.seeds):
                add(f"random {seed}", PruneExperts("random", seed=seed, **common))
            if options.scope == "global":
                for seed in range(options.seeds):
                    add(f"matched {seed}", *matched(module, found["saliency"]["dropped"], seed))
            baselines = ("random", "matched") if options.scope == "global" else ("random",)
            cuts[cut] = {
                s: {b: compare(found, s, b, whole["loss"]) for b in baselines} for s in STRENGTHS
            } | {"results": {n: {"loss": r["loss"], "dropped": r["dropped"]} for n, r in found.items()}}
    usage = {
        loc: {"tokens": u.tokens.tolist(), "mean_saliency": [round(s, 5) for s in u.mean_saliency.tolist()]}
        for loc, u in statistics.experts.items()
    }
    tokens = {"calibration": statistics.tokens_seen, "held_out": sum(t.size for _, t in held_out)}
    return {"tokens": tokens, "usage": usage, "unpruned": whole["loss"]} | cuts


def matched(module: Module, dropped: dict[str, list[int]], seed: int) -> tuple[PruneExperts, ...]:
    """As many experts of every layer as in `dropped`, by chance: what did choosing the experts add?"""
    experts = {layer.loc: layer.count for layer in find_layers(module)[0]}
    return tuple(
        PruneExperts("random", keep=1 - len(gone) / experts[loc], seed=seed * len(dropped) + i, layers=loc)
        for i, (loc, gone) in enumerate(dropped.items())
        if gone
    )


def measure(
    module: Module,
    passes: tuple[PruneExperts, ...],
    held_out: Sequence[tuple[Ids, Ids]],
    threads: int,
    name: str = "",
) -> dict[str, Any]:
    """Loss of the module after `passes`, window by window too, and which experts went."""
    changed, start, dropped = clone(module), time.perf_counter(), {}
    for one in passes:
        run_pipeline(changed, (one,))
        dropped |= {n["layer"]: n["dropped"] for n in changed.notes[one.name]["layers"]}
    found = losses(changed, held_out, threads)
    loss = float(np.mean(found))
    if name:
        print(f"{name:32} {loss:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return {"loss": loss, "windows": found, "dropped": dropped}


def compare(results: dict[str, Any], name: str, baseline: str, base: float) -> dict[str, float]:
    """One strength against the seeds of a baseline; `base` is the loss of the whole model.

    `rank` 1 is better than every seed. `paired` is how much lower its loss is than the mean of the seeds,
    window by window, with the standard error over windows: it says what another text would change.
    """
    loss = results[name]["loss"]
    seeds = [r for n, r in results.items() if n.startswith(f"{baseline} ")]
    random = np.array([r["loss"] for r in seeds])
    difference = np.mean([r["windows"] for r in seeds], axis=0) - np.array(results[name]["windows"])
    return {
        "loss": loss,
        "increase": loss - base,
        "random_median": float(np.median(random)),
        "random_best": float(random.min()),
        "random_worst": float(random.max()),
        "ratio_of_increase_to_random_median": (loss - base) / float(np.median(random) - base),
        "rank": 1 + int((random < loss).sum()),
        "of": 1 + len(random),
        "paired": float(difference.mean()),
        "paired_standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default=str(KJV / "checkpoint"))
    parser.add_argument("--calibration", default=str(KJV / "calibration.txt"))
    parser.add_argument("--heldout", default=str(KJV / "heldout.txt"))
    parser.add_argument("--cuts", nargs="+", default=CUTS, help="fraction kept : layers")
    parser.add_argument("--scope", default="layer")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--window", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    named = {k: Path(v).name if k in ("checkpoint", "calibration", "heldout") else v
             for k, v in vars(options).items() if k != "output"}  # fmt: skip
    report = {"machine": machine(), "options": named} | study(options)
    name = f"{datetime.now(UTC):%Y-%m-%d}-pruning-{options.scope}.json"
    output = Path(options.output or Path(__file__).parent / "results" / name)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    output.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    for cut in options.cuts:
        for strength in STRENGTHS:
            for baseline, found in report[cut][strength].items():
                print(cut, strength, "against", baseline, json.dumps(found))
    print(output)


if __name__ == "__main__":
    main()
