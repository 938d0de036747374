"""Makes what the run compares, in a folder: the checkpoint, its artifacts, its GGUF files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from groups import PIPELINES

from dsv4c.frontend.generate import PRESETS, generate_checkpoint

HERE = Path(__file__).parent
POSITIONS = 32768
"""Room for a prompt of 16 thousand tokens; the model has no scaled frequencies, so nothing else changes."""

Facts = dict[str, Any]


def make_checkpoint(directory: Path, preset: str, positions: int = 0) -> Path:
    """The random model in BF16, as transformers saves it, so that all programs read the same files.

    Args:
        positions: in place of the preset's.
    """
    path = directory / (f"{preset}-bf16" + (f"-{positions}" if positions else ""))
    if not (path / "config.json").exists():
        config = PRESETS[preset] | ({"max_position_embeddings": positions} if positions else {})
        generate_checkpoint(path, config, style="saved", dtype="bf16")
    return path


def make_artifacts(
    checkpoint: Path, directory: Path, pairs: Iterable[tuple[str, str]], reuse: bool
) -> dict[str, Facts]:
    """Compile in processes of their own; name -> storage, numerics and what `compile_once` says.

    Args:
        reuse: keep an artifact that is newer than the checkpoint and has its facts beside it.
    """
    out = {}
    for storage, numerics in pairs:
        path = directory / f"{checkpoint.name}-{storage}-{numerics}.dsv4"
        facts = path.with_suffix(".json")
        if not (reuse and path.exists() and facts.exists()):
            print(f"compiling {storage}, {numerics}", file=sys.stderr, flush=True)
            command = [str(HERE / "compile_once.py"), str(checkpoint), str(path), "tvm", numerics]
            facts.write_text(run_python(sys.executable, [*command, *filter(None, [PIPELINES[storage]])]))
        found = json.loads(facts.read_text())
        out[f"dsv4c {storage} {numerics}"] = {**found, "storage": storage, "numerics": numerics}
    return out


def make_gguf(checkpoint: Path, directory: Path, kind: str, python: str) -> Path:
    """A GGUF file of the model, made once; quantised kinds are made of the BF16 one."""
    path = directory / f"{checkpoint.name}-{kind}.gguf"
    if not path.exists():
        plain = kind in ("F32", "BF16")
        source = checkpoint if plain else make_gguf(checkpoint, directory, "BF16", python)
        print(f"writing {path.name}", file=sys.stderr, flush=True)
        partial = path.with_suffix(".partial")
        run_python(python, [str(HERE / "to_gguf.py"), str(source), str(partial), kind])
        partial.rename(path)
    return path


def run_python(python: str, arguments: list[str]) -> str:
    """The last line of what a script writes to standard output.

    Raises:
        SystemExit: it failed; its last words are in the message.
    """
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1] if done.stdout.strip() else ""
