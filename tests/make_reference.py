"""Writes tests/data/reference: what transformers computes for the generated checkpoints of the model tests.

    make oracle && .venv/bin/python tests/make_reference.py

Seeded; run it after a change of the generator or of `test_model_harness.GENERATED`, never to please a test.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from oracle_support import Oracle
from test_model_harness import DATA, GENERATED, fingerprint

from dsv4c.frontend.generate import generate_checkpoint

LENGTHS = (600, 150, 37, 5)
"""Of the prompts; every row of logits is kept."""
START, NEW = 21, 200
"""The prompt of the greedy continuation, and its length."""
LEAD = 2e-3
"""A chosen token must lead by this much, so that rounding cannot choose another."""


def make(name: str) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as directory:
        root = generate_checkpoint(Path(directory) / "checkpoint", **GENERATED[name])
        oracle, mark = Oracle.open(root), fingerprint(root)
    vocab, out = oracle.model.config.vocab_size, {"fingerprint": np.array(mark, np.int64)}
    rng = np.random.default_rng(11)
    for i, length in enumerate(LENGTHS):
        ids = rng.integers(2, vocab, length)
        out[f"ids.{i}"], out[f"logits.{i}"] = ids.astype(np.int32), oracle.logits(ids).astype(np.float32)
    for attempt in range(20):
        start = np.random.default_rng(attempt).integers(2, vocab, START)
        new, lead = oracle.greedy(start, NEW)
        print(f"{name}: prompt {attempt}: lead {lead:.4f}, {len(set(new.tolist()))} different tokens")
        if lead > LEAD and len(set(new.tolist())) > 8:
            return out | {"greedy.prompt": start.astype(np.int32), "greedy.new": new.astype(np.int32)}
    raise SystemExit(f"{name}: no prompt is far enough from a tie")


if __name__ == "__main__":
    for name in GENERATED:
        file = DATA / "reference" / f"{name}.npz"
        file.parent.mkdir(exist_ok=True)
        np.savez_compressed(file, **make(name))
        print(file.name, file.stat().st_size)
