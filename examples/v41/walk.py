"""A small DeepSeek-V4.1 model from nothing to its report: text, an image, Engram tables on disk.

Makes a random checkpoint with every feature of V4.1, counts which table rows a real text asks for, compiles
with a budget of memory for the tables, and runs the artifact. Every step is a command that is printed before
it runs. The weights are random, so what the model says is not; what it costs is what this shows.

    python examples/v41/walk.py                     # into build/v41, about a minute
    python examples/v41/walk.py --preset small-v41  # 350 MB of weights
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tokenizers import Tokenizer

import dsv4c
from dsv4c.cli import main as dsv4c_command
from dsv4c.frontend.generate import PRESETS, generate_checkpoint
from dsv4c.passes.row_counts import row_counts
from dsv4c.passes.statistics import Statistics

ROOT = Path(__file__).resolve().parents[2]
KJV = ROOT / "examples" / "kjv"
TOKENIZER = KJV / "checkpoint" / "tokenizer.json"
TABLES: dict[str, dict[str, int]] = {
    # 12 rows of 128 codes and 4 scales per token and layer; two tables of 9.6 MB on disk
    "tiny-v41": {"engram_vocab_size": 5003, "engram_n_heads": 4, "engram_head_dim": 128},
    "small-v41": {},
}
"""Keys of the text part on top of a preset: tables that are larger than their budget."""


def run(*words: str) -> str:
    """One command of dsv4c, printed and run; what it prints is returned too."""
    print(f"\n$ dsv4c {shlex.join(words)}", flush=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = dsv4c_command(list(words))
    print(out.getvalue(), end="", flush=True)
    if code:
        raise SystemExit(code)
    return out.getvalue()


def make_checkpoint(root: Path, preset: str) -> Path:
    """Random weights with the tokenizer of the example in `examples/kjv`."""
    text: Any = PRESETS[preset]["text_config"]
    config = {**PRESETS[preset], "text_config": {**text, **TABLES[preset]}}
    return generate_checkpoint(root / "checkpoint", config, seed=1, tokenizer=TOKENIZER)


def count_rows(checkpoint: Path, file: Path, tokens: int) -> Path:
    """How often the rows of the model's own tables are asked for by a text; no table is read for it."""
    module = dsv4c.load_checkpoint(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = (KJV / "calibration.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
    counts = row_counts(module, [ids])
    for name, found in counts.items():
        print(f"{name}: {len(ids)} tokens ask for {found[1].sum()} rows, {found.shape[1]} different ones")
    Statistics(str(checkpoint), tokenizer.get_vocab_size(), len(ids), {}, counts).save(file)
    return file


def read_text(artifact: str, tokens: int) -> dict[str, dict[str, Any]]:
    """Reads a text that was not counted, token by token; returns where the rows of each table came from."""
    session = dsv4c.Session(artifact, batch=1, context=tokens)
    text = (KJV / "heldout.txt").read_text(encoding="utf-8")
    for token in Tokenizer.from_file(str(TOKENIZER)).encode(text, add_special_tokens=False).ids[:tokens]:
        session.step([[token]])
    return session.table_statistics()


def draw(file: Path) -> Path:
    """A picture to show the model."""
    image = Image.new("RGB", (160, 120), (200, 220, 255))
    pen = ImageDraw.Draw(image)
    pen.ellipse((100, 12, 132, 44), fill=(255, 210, 60))
    pen.polygon([(0, 120), (60, 50), (120, 120)], fill=(90, 120, 80))
    image.save(file)
    return file


def walk(root: Path, preset: str, tokens: int, hot_kib: int, cache_kib: int) -> dict[str, Any]:
    """All steps; returns for two texts where the rows of each table came from."""
    checkpoint = make_checkpoint(root, preset)
    run("inspect", str(checkpoint))
    stats = count_rows(checkpoint, root / "rows.npz", tokens)
    artifact, image = str(root / "m.dsv4"), draw(root / "picture.png")
    budget = f'stats="{stats}", hot_bytes={hot_kib << 10}, cache_bytes={cache_kib << 10}'
    passes = f"with(layout_engram{{{budget}}})"
    run("compile", str(checkpoint), "--target", "cpu", "-o", artifact, "--passes", passes)
    run("verify", artifact)
    few = ("--max-new-tokens", "8")
    run("run", artifact, "--prompt", "In the beginning God created", *few)
    run("run", artifact, "--prompt", "<image> And God saw that it was good", "--image", str(image), *few)
    lengths = ("--prompt-tokens", "128", "--decode-tokens", "32", "--repeat", "1")
    measured = json.loads(run("bench", artifact, *lengths, "--json"))["tables"]
    run("bench", artifact, *lengths, "--tables", "resident")
    run("report", artifact, "-o", str(root / "report.html"), "--ceilings", "100,20")
    return {"random tokens (bench)": measured, "held-out text": read_text(artifact, 500)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "v41", help="a new or empty folder")
    parser.add_argument("--preset", choices=tuple(TABLES), default="tiny-v41")
    parser.add_argument("--tokens", type=int, default=4000, help="of the text whose rows are counted")
    parser.add_argument(
        "--hot-kib", type=int, default=512, help="rows kept in memory, of all tables together"
    )
    parser.add_argument("--cache-kib", type=int, default=512, help="cache of rows read from disk")
    a = parser.parse_args()
    a.output.mkdir(parents=True, exist_ok=True)
    if any(a.output.iterdir()):
        parser.error(f"{a.output} is not empty")
    for title, tables in walk(a.output, a.preset, a.tokens, a.hot_kib, a.cache_kib).items():
        print(f"\nWhere rows came from, {title}:")
        for name, t in tables.items():
            hot, cached = (t[part] / t["rows"] for part in ("hot", "cached"))
            print(
                f"  {name}: {t['rows']} lookups, {hot:.1%} hot, {cached:.1%} cached, {t['pages']} pages read"
            )


if __name__ == "__main__":
    main()
