"""What do Engram tables on disk cost a whole DeepSeek-V4.1 model, against the same tables in memory?

Two sessions of one artifact, in one process, read the beginning of a text and then decode on, token by token,
in turn and round by round: one with tables mapped into memory, one that reads rows ahead from disk into a
cache for a tenth of the rows that the whole text touches. Logits must agree to the bit. The cost of a look-up
does not depend on the model around it: the step time says how much it weighs, `--hidden` and `--layers` set
that. Results with the machine's description go to `benchmarks/results/`.

    python benchmarks/v41_engram.py
    python benchmarks/v41_engram.py --hidden 2048 --layers 20
    python benchmarks/v41_engram.py --rows 3000000 --zeros --cache-mib 1024      # two tables of 10 GB
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engram import tokens
from engram_model import scratch
from run import machine

from dsv4c import Session, api
from dsv4c.frontend.generate import PRESETS, generate_checkpoint
from dsv4c.runtime.engram import TableOptions

Ids = npt.NDArray[np.int64]


def preset(hidden: int, layers: int, rows: int) -> dict[str, Any]:
    """`small-v41` with another width, number of layers, and rows in each of its tables; without drafter."""
    out: dict[str, Any] = json.loads(json.dumps(PRESETS["small-v41"]))
    text = out["text_config"]
    ratios = text["compress_ratios"][: text["num_hidden_layers"]]
    text |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "engram_vocab_size": rows,
        "compress_ratios": [*ratios, *[1] * (layers - len(ratios))],
        "num_nextn_predict_layers": 0, "max_position_embeddings": 16384,
    }  # fmt: skip
    for key in [k for k in text if k.startswith("dspark")]:
        del text[key]
    return out


def own_memory() -> int:
    """Bytes of this process that are no mapped file; both sessions and the compiler together."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def touched(module: Any, ids: Ids) -> int:
    """Distinct rows of all tables that a text asks for."""
    from dsv4c.passes.row_counts import row_counts

    return sum(counts.shape[1] for counts in row_counts(module, [ids]).values())


def rounds(sessions: dict[str, Session], ids: Ids, count: int, before: int) -> dict[str, list[float]]:
    """Seconds per token of each session in each round, behind the first `before` tokens."""
    out: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(count):
        spent = dict.fromkeys(sessions, 0.0)
        for session in sessions.values():
            session.reset()
            session.prefill([ids[:before].tolist()])
            for store in session.backend.tables.stores.values():  # type: ignore[attr-defined]
                store.reset_statistics()
        for i, token in enumerate(ids[before:].tolist()):
            found = {}
            for name in sorted(sessions, reverse=bool(i % 2)):
                started = time.perf_counter()
                found[name] = sessions[name].step([[token]])
                spent[name] += time.perf_counter() - started
            first, second = found.values()
            if (first != second).any():
                raise SystemExit(f"token {i}: the logits differ")
        for name, seconds in spent.items():
            out[name].append(seconds / (len(ids) - before))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=50_000, help="of each of a layer's twelve tables")
    parser.add_argument("--zeros", action="store_true", help="weights of zero, which need no time to make")
    parser.add_argument("--cache-mib", type=float, default=0, help="in place of a tenth of the rows")
    parser.add_argument("--before", type=int, default=2000, help="tokens read before any is measured")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    a = parser.parse_args()
    text = tokens("heldout.txt")
    with scratch() as folder:
        checkpoint = generate_checkpoint(
            Path(folder) / "ckpt", preset(a.hidden, a.layers, a.rows), sparse=a.zeros
        )
        module = api.load_checkpoint(checkpoint)
        path = api.compile(module, output=Path(folder) / "m.dsv4", golden=False)
        record = 256 + 8 + 8
        rows = touched(module, text)
        cache = int(a.cache_mib * (1 << 20)) or max(rows * record // 10, 2 * 4096)
        options = {"disk": TableOptions("disk", cache), "resident": TableOptions("resident")}
        sessions = {n: Session(path, context=4096, threads=a.threads, tables=o) for n, o in options.items()}
        gc.collect()
        gc.freeze()  # a program that only runs artifacts has no compiler for the collector to walk through
        seconds = rounds(sessions, text[: a.before + a.tokens], a.rounds, a.before)
        counts = sessions["disk"].table_statistics()
        size = sum(t.nbytes for t in sessions["disk"].artifact.tensors.values())
        own = own_memory()
    ratios = [d / r for d, r in zip(seconds["disk"], seconds["resident"], strict=True)]
    result = {
        "what": "decode of text, one token per step, batch 1; two sessions in turn in one process",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "options": {k: v for k, v in vars(a).items() if k != "output"},
        "artifact_bytes": size,
        "own_memory_bytes": own,
        "touched_rows": rows,
        "cache_bytes": cache,
        "ms_per_token": {n: round(1e3 * statistics.median(s), 3) for n, s in seconds.items()},
        "ratio_of_rounds": [round(r, 4) for r in ratios],
        "ratio": round(statistics.median(ratios), 4),
        "tables": counts,
    }
    name = f"{datetime.now(UTC):%Y-%m-%d}-v41-engram-{a.hidden}x{a.layers}-{a.rows}-rows.json"
    output = a.output or Path(__file__).with_name("results") / name
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        {
            k: result[k]
            for k in ("ms_per_token", "ratio", "ratio_of_rounds", "cache_bytes", "own_memory_bytes")
        }
    )
    print({n: (round(t["hit_rate"], 3), t["stalls"]) for n, t in counts.items()})
    print(output)


if __name__ == "__main__":
    main()
