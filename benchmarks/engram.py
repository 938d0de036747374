"""What do looked-up layers cost per token: in memory, read ahead from disk, or read when they are needed?

One process holds sessions of all forms and feeds them the same real text in turn, token by token, so that
every form meets the same moods of the machine; outputs must agree to the bit. The text is read twice: rows
that nobody has asked for come from disk at first, and from the cache, where it holds them, the second time.
Results with the machine's description go to `benchmarks/results/`.

    python benchmarks/engram.py                          # two tables of 128 MB, a cache of 32 MB
    python benchmarks/engram.py --table-mib 2048 --cache-mib 4
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engram_model import build_model, scratch
from run import machine
from tokenizers import Tokenizer

from dsv4c import api
from dsv4c.ir.graph import Module
from dsv4c.passes.row_counts import row_counts
from dsv4c.passes.statistics import Statistics
from dsv4c.runtime.engram import TableOptions
from dsv4c.runtime.layer import LayerSession

ROOT = Path(__file__).resolve().parents[1]
KJV = ROOT / "examples" / "kjv"
WARM = 32
"""Tokens fed before any is measured."""

Ids = npt.NDArray[np.int64]


def tokens(name: str) -> Ids:
    tokenizer = Tokenizer.from_file(str(KJV / "checkpoint" / "tokenizer.json"))
    return np.array(tokenizer.encode((KJV / name).read_text(encoding="utf-8"), add_special_tokens=False).ids)


def compile_forms(root: Path, module: Module, hot: int, cache: int) -> tuple[Path, Path, Any]:
    """The model with its tables among the weights, and laid out; what the pass noted."""
    calibration = tokens("calibration.txt")
    counts = row_counts(module, [calibration])
    Statistics("engram_benchmark", 2048, len(calibration), {}, counts).save(root / "rows.npz")
    options = f'stats="{root / "rows.npz"}", hot_bytes={hot}, cache_bytes={cache}'
    passes = f"with(layout_engram{{{options}}})"
    notes = api.lower(module, passes=passes).module.notes["layout_engram"]
    plain = api.compile(module, output=root / "plain.dsv4", passes="without(layout_engram)", golden=False)
    return plain, api.compile(module, output=root / "laid.dsv4", passes=passes, golden=False), notes


def measure(sessions: dict[str, LayerSession], text: Ids) -> dict[str, Ids]:
    """Seconds of every step of every form; the order within a round rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    names = list(sessions)
    for index, token in enumerate(text.tolist()):
        results = []
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            found = sessions[name].step(tokens=[[token]], n_valid=[1])["hidden"]
            seconds[name].append(time.perf_counter() - start)
            results.append(found)
        assert all(np.array_equal(results[0], other) for other in results), "forms differ"
        if index + 1 == WARM:
            for store in stores(sessions).values():
                store.reset_statistics()
    return {name: np.array(s[WARM:]) for name, s in seconds.items()}


def stores(sessions: dict[str, LayerSession]) -> dict[tuple[str, str], Any]:
    return {
        (name, table): store
        for name, session in sessions.items()
        for table, store in session.backend.tables.stores.items()  # type: ignore[attr-defined]
    }


def summary(sessions: dict[str, LayerSession], seconds: dict[str, Ids], base: str) -> dict[str, Any]:
    """Medians in milliseconds, and the median over tokens of what a form costs above `base` on that token."""
    out: dict[str, Any] = {}
    for name, s in seconds.items():
        extra = s - seconds[base]
        out[name] = {
            "median_ms": round(float(np.median(s)) * 1e3, 4),
            "best_quarter_ms": round(float(np.quantile(s, 0.25)) * 1e3, 4),
            "p90_ms": round(float(np.quantile(s, 0.9)) * 1e3, 4),
            "over_base_percent": round(100 * float(np.median(s) / np.median(seconds[base]) - 1), 2),
            "over_base_best_quarter_percent": round(
                100 * float(np.quantile(s, 0.25) / np.quantile(seconds[base], 0.25) - 1), 2),
            "paired_extra_ms": round(float(np.median(extra)) * 1e3, 4),
            "tables": {t: facts(x) for (n, t), x in stores(sessions).items() if n == name},
        }  # fmt: skip
    return out


def facts(store: Any) -> dict[str, Any]:
    s = store.statistics
    return {
        "tier": store.tier, "direct": store.direct, "hit_rate": round(s.hit_rate, 4), "rows": s.rows,
        "hot": s.hot, "cached": s.cached, "read": s.read, "pages": s.pages, "ready": s.ready,
        "stalls": s.stalls, "stall_ms_each": round(1e3 * s.stall_seconds / max(s.stalls, 1), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table-mib", type=int, default=256, help="of both tables together")
    parser.add_argument("--hot-mib", type=float, default=8)
    parser.add_argument("--cache-mib", type=float, default=32)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    a = parser.parse_args()
    mib = 1 << 20
    with scratch() as folder:
        module = build_model(Path(folder), 2048, a.table_mib * mib, blocks=a.blocks, width=a.width)
        plain, laid, notes = compile_forms(
            Path(folder), module, int(a.hot_mib * mib), int(a.cache_mib * mib)
        )
        forms = {
            "mapped": (plain, None),
            "resident": (laid, TableOptions(tier="resident")),
            "prefetched": (laid, TableOptions(tier="disk")),
            "synchronous": (laid, TableOptions(tier="disk", synchronous=True)),
        }
        sessions = {n: LayerSession(p, tables=o, threads=a.threads) for n, (p, o) in forms.items()}
        readings = []
        for _ in range(2):
            for session in sessions.values():
                session.reset()
            seconds = measure(sessions, tokens("heldout.txt")[: a.tokens])
            readings.append(summary(sessions, seconds, "resident"))
        result = {
            "what": "decode, one token per step, batch 1; forms in turn on the same text in one process",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "options": {k: v for k, v in vars(a).items() if k != "output"},
            "base": "resident",
            "layout": notes,
            "queue": sessions["prefetched"].backend.tables.queues(),  # type: ignore[attr-defined]
            "readings": readings,
        }
    text = json.dumps(result, indent=1)
    name = f"{datetime.now(UTC):%Y-%m-%d}-engram.json"
    output = a.output or Path(__file__).with_name("results") / name
    output.write_text(text + "\n", encoding="utf-8")
    for count, reading in enumerate(readings, 1):
        print(f"reading {count}")
        for form, numbers in reading.items():
            shown = [f"{k} {v}" for k, v in numbers.items() if k != "tables"]
            rates = [t["hit_rate"] for t in numbers["tables"].values()]
            print(f"  {form:12}", "  ".join(shown), " hit rates", rates)
    print(output)


if __name__ == "__main__":
    main()
