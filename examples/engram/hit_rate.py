"""How often is a table row in memory? Real text against a table larger than the cache, over cache sizes.

Makes a random Engram layer with DeepSeek-V4.1's hash, counts which rows one text asks for, lays the table out
with and without a hot region chosen by those counts, and feeds another text to the compiled layer, token by
token, once per cache size. The text is real, so the frequencies are; the numbers in the rows do not matter.

    python examples/engram/hit_rate.py                        # a table of 64 MB, about a minute
    python examples/engram/hit_rate.py --table-mib 2048 --output curve.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dsv4c import api
from dsv4c.frontend.engram import EngramConfig, Variant
from dsv4c.frontend.engram_generate import generate_engram_layer
from dsv4c.frontend.engram_layer import load_engram_layer
from dsv4c.ir.graph import Module
from dsv4c.passes.row_counts import looked_up_rows, row_counts
from dsv4c.passes.statistics import Statistics
from dsv4c.runtime import Artifact
from dsv4c.runtime.engram import TableOptions
from dsv4c.runtime.layer import LayerSession

ROOT = Path(__file__).resolve().parents[2]
KJV = ROOT / "examples" / "kjv"
VOCAB, LAYER, ROW = 2048, 1, 264
HIDDEN, STREAMS = 32, 1
CACHES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""MiB."""

Ids = npt.NDArray[np.int64]


def tokens(name: str) -> Ids:
    tokenizer = Tokenizer.from_file(str(KJV / "checkpoint" / "tokenizer.json"))
    return np.array(tokenizer.encode((KJV / name).read_text(encoding="utf-8"), add_special_tokens=False).ids)


def make_layer(root: Path, table_bytes: int) -> Module:
    """24 rows per token of 256 codes and 8 scales, as published; the rest is small."""
    rows = max(table_bytes // (ROW * 24), 64)
    config = EngramConfig(Variant.PROD, (LAYER,), (rows,) * 3, 8, 256, HIDDEN, STREAMS, VOCAB, 2, VOCAB)
    return load_engram_layer(generate_engram_layer(root / "layer", config, LAYER))


def lay_out(root: Path, module: Module, hot_bytes: int, counts: dict[str, Ids]) -> tuple[Artifact, Any]:
    Statistics("hit_rate", VOCAB, 0, {}, counts).save(root / "rows.npz")
    options = f'stats="{root / "rows.npz"}", hot_bytes={hot_bytes}'
    passes = f"with(layout_engram{{{options}}})"
    notes = api.lower(module, passes=passes).module.notes["layout_engram"]["tables"][0]
    path = api.compile(module, output=root / f"hot{hot_bytes}.dsv4", passes=passes, golden=False)
    return Artifact.open(path), notes


def curve(artifact: Artifact, table: str, text: Ids) -> list[dict[str, Any]]:
    """The compiled layer over every token, in order, from an empty cache of each size."""
    points = []
    for mib in CACHES:
        options = TableOptions(tier="disk", cache_bytes=int(mib * 2**20))
        session = LayerSession(artifact, threads=1, tables=options)
        streams = np.zeros((1, 1, STREAMS, HIDDEN), np.float32)
        for token in text:
            session.step(tokens=[[token]], n_valid=[1], streams=streams)
        tables = session.backend.tables
        store = tables.stores[table]
        s = store.statistics
        points.append({
            "cache_mib": mib, "hit_rate": round(s.hit_rate, 5), "hot": round(s.hot / s.rows, 5),
            "cached": round(s.cached / s.rows, 5), "pages_per_token": round(s.pages / len(text), 3),
            "evicted": s.evicted, "direct": store.direct, "queue": tables.queues()[table],
        })  # fmt: skip
    return points


def by_order(rows: Ids, counts: Ids) -> dict[str, float]:
    """For each n-gram order, how many of the rows asked for had been asked for before in this text."""
    out = {}
    for order, columns in enumerate(np.split(rows, 3, axis=1), 2):
        out[f"{order}-grams seen before in the text"] = round(1 - len(np.unique(columns)) / columns.size, 5)
        seen = float(np.isin(columns, counts[0]).mean())
        out[f"{order}-grams seen in the counted text"] = round(seen, 5)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table-mib", type=int, default=64)
    parser.add_argument("--hot-mib", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=None, help="write the curves as JSON")
    a = parser.parse_args()
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        module = make_layer(Path(folder), a.table_mib << 20)
        counts = row_counts(module, [tokens("calibration.txt")])
        text = tokens("heldout.txt")[: a.tokens]
        ((table, rows),) = looked_up_rows(module, text).items()
        result: dict[str, Any] = {
            "table_mib": a.table_mib, "tokens": len(rows), "lookups_per_token": rows.shape[1],
            "distinct_rows": len(np.unique(rows)), **by_order(rows, counts[f"engram.{table}"]), "curves": {},
        }  # fmt: skip
        for hot in (0, int(a.hot_mib * 2**20)):
            artifact, notes = lay_out(Path(folder), module, hot, counts)
            points = curve(artifact, table, text)
            result["curves"][f"hot {hot / 2**20:g} MiB"] = {"layout": notes, "points": points}
    for name, found in result["curves"].items():
        print(f"{name}: {found['layout']['hot_rows']} hot rows")
        for p in found["points"]:
            bar = "#" * round(40 * p["hit_rate"])
            print(f"  cache {p['cache_mib']:7g} MiB  hits {p['hit_rate']:7.1%}  "
                  f"pages per token {p['pages_per_token']:6.2f}  {bar}")  # fmt: skip
    if a.output:
        a.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
