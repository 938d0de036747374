"""What the tests of whole models share: each artifact compiled once per run, and the comparison itself.

Every way of running a model (the evaluator and one artifact per format) appears as a `Runner`: feed tokens,
get the logits after each. The references are files; nothing here computes a result of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest

import dsv4c
from dsv4c.frontend.generate import PRESETS, generate_checkpoint
from dsv4c.ir.graph import Module
from dsv4c.ir.meaning import Evaluator

Arr = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
FORMATS = ("tvm", "onnx")
RUNNERS = ("evaluator", *FORMATS)
TOLERANCE = 1e-4
"""Of the range of the logits: what every engine is held to against a reference."""
BETWEEN_CHUNKINGS = 1e-5

TINY = PRESETS["tiny"] | {"max_position_embeddings": 1024, "index_n_heads": 16}
"""With two index heads, both scores of an entry are often exactly zero, and transformers leaves ties open."""

GENERATED: dict[str, dict[str, Any]] = {
    # every layer kind, packed FP4 and FP8, YaRN, sizes that are no multiples of 16
    "ratio16": {"config": TINY, "seed": 5},
    # the released ratio, no YaRN, no hash layer, other groups, BF16 in the names of transformers
    "ratio128": {
        "config": TINY | {
            "num_hidden_layers": 3, "compress_ratios": [128, 4, 0], "num_hash_layers": 0,
            "num_attention_heads": 4, "head_dim": 32, "o_groups": 2, "hidden_size": 80, "sliding_window": 24,
            "n_routed_experts": 6, "num_experts_per_tok": 3, "index_topk": 8, "rope_scaling": None,
        },
        "seed": 8, "style": "transformers", "dtype": "bf16",
    },
}  # fmt: skip
"""Checkpoints made at test time, whose reference results are in data/reference; see make_reference.py."""


class Runner(Protocol):
    """A model with its state, however it is executed."""

    def step(self, tokens: npt.ArrayLike, n_valid: npt.ArrayLike | None = None) -> Arr: ...


@dataclass
class Judge:
    """The evaluator with a state, stepping like a session."""

    evaluator: Evaluator
    batch: int = 1
    context: int = 1024
    state: dict[str, Arr] = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.evaluator.fresh_state(B=self.batch, ctx=self.context)

    def step(self, tokens: npt.ArrayLike, n_valid: npt.ArrayLike | None = None) -> Arr:
        ids = np.asarray(tokens)
        valid = np.full(len(ids), ids.shape[1]) if n_valid is None else np.asarray(n_valid)
        rows = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        done = self.evaluator({"tokens": ids, "n_valid": valid, "rows": rows}, self.state)
        self.state = done.state
        return done.outputs["logits"]


class Models:
    """Checkpoints and artifacts by name, made when first asked for and kept for the whole run."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        self.root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        self._opened: dict[tuple[str, str], Any] = {}

    def checkpoint(self, name: str) -> Path:
        """A directory: golden ones by their folder, "kjv", or one of `GENERATED`."""
        if name == "kjv":
            return ROOT / "examples" / "kjv" / "checkpoint"
        if name not in GENERATED:
            return DATA / "golden" / name
        path = self.root / f"checkpoint-{name}"
        with self.alone(path):
            if not path.exists():
                generate_checkpoint(path, **GENERATED[name])
        return path

    def artifact(self, name: str, form: str, **options: Any) -> Path:
        """Compiled by the test that asks first, in whatever process; `options` are of `dsv4c.compile`."""
        text = json.dumps(options, sort_keys=True)
        # a digest of Python's own would differ between processes
        other = f"-{hashlib.sha256(text.encode()).hexdigest()[:12]}" if options else ""
        path, source = self.root / f"model-{name}-{form}{other}.dsv4", self.checkpoint(name)
        with self.alone(path):
            if not path.exists():
                dsv4c.compile(source, output=path, format=form, **options)
        return path

    def module(self, name: str) -> Module:
        return self._once(("module", name), lambda: dsv4c.load_checkpoint(self.checkpoint(name)))

    def evaluator(self, name: str, precision: npt.DTypeLike = np.float32) -> Evaluator:
        key = (np.dtype(precision).name, name)
        return self._once(key, lambda: Evaluator(self.module(name), precision=precision))

    def session(self, name: str, form: str, batch: int = 1, context: int = 1024) -> dsv4c.Session:
        """A fresh session; artifact and compiled code are opened once."""
        artifact = self._once((form, name), lambda: dsv4c.Session(self.artifact(name, form), threads=1))
        if (batch, context) == (artifact.batch, artifact.context):
            twin = artifact.fork()
            twin.reset()
            return twin
        return dsv4c.Session(artifact.artifact, batch, context, threads=1)

    def run(self, name: str, how: str, batch: int = 1, context: int = 1024) -> Runner:
        if how == "evaluator":
            return Judge(self.evaluator(name), batch, context)
        return self.session(name, how, batch, context)

    def _once(self, key: tuple[str, str], make: Any) -> Any:
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]

    @contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """One test process at a time."""
        with open(self.root / f"{path.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@cache
def stored(path: str) -> dict[str, Arr]:
    """The arrays of an .npz below tests/data."""
    with np.load(DATA / path) as file:
        return dict(file)


def fingerprint(directory: Path) -> int:
    """Of a generated checkpoint: tells a changed generator from a wrong result."""
    return zlib.crc32(b"".join(p.read_bytes() for p in sorted(directory.glob("*.safetensors"))))


def within(found: Arr, want: Arr, tolerance: float, what: str = "logits") -> float:
    """Largest difference over the range of `want`; fails beyond `tolerance`."""
    assert found.shape == want.shape, f"{what}: {found.shape} instead of {want.shape}"
    assert np.isfinite(found).all(), f"{what}: not finite"
    worst = float(np.abs(found.astype(np.float64) - want).max() / np.ptp(want))
    print(f"{what}: {worst:.2e}")
    assert worst <= tolerance, f"{what}: off by {worst:.3g} of the range, allowed {tolerance:g}"
    return worst


def feed(runner: Runner, ids: Arr, sizes: Sequence[int]) -> Arr:
    """The logits [T,V] of one row, fed in calls of these sizes."""
    assert sum(sizes) == len(ids)
    ends = np.cumsum(sizes)
    return np.concatenate([runner.step(ids[None, e - n : e])[0] for e, n in zip(ends, sizes, strict=True)])


def feed_ragged(
    runner: Runner, rows: Sequence[Arr], calls: Sequence[Sequence[int]], pad: int = 0
) -> list[Arr]:
    """The logits of rows of different lengths; each call names how many tokens every row gets."""
    at, parts = np.zeros(len(rows), int), [[] for _ in rows]
    for counts in calls:
        ids = np.full((len(rows), max(1, *counts)), pad)
        for b, n in enumerate(counts):
            ids[b, :n] = rows[b][at[b] : at[b] + n]
        logits = runner.step(ids, np.asarray(counts))
        for b, n in enumerate(counts):
            parts[b].append(logits[b, :n])
        at += counts
    assert (at == [len(r) for r in rows]).all()
    return [np.concatenate(p) for p in parts]


def cuts(length: int, seed: int, longest: int = 40) -> list[int]:
    """A random way to cut `length` tokens into calls, with single tokens among them."""
    rng, sizes = np.random.default_rng(seed), []
    while (left := length - sum(sizes)) > 0:
        sizes.append(min(left, 1 if rng.random() < 0.3 else int(rng.integers(1, longest))))
    return sizes


def ragged(lengths: Sequence[int], seed: int, longest: int = 40) -> list[list[int]]:
    """Random calls for rows of these lengths: idle rows, short rows and full ones side by side."""
    rng, left, calls = np.random.default_rng(seed), np.array(lengths), []
    while left.any():
        width = int(rng.integers(1, longest))
        take = np.minimum(left, rng.integers(0, width + 1, len(left)))
        if take.any():
            calls.append(take.tolist())
            left -= take
    return calls


# ------------------------------------------------------------------------ of the harness itself


def test_the_comparison_sees_what_is_wrong() -> None:
    want = np.linspace(-1, 1, 12).reshape(3, 4)
    wrong = want.copy()
    wrong[2, 1] += 4e-4
    assert within(want, want, 0) == 0
    for found, message in (
        (wrong, "off by 0.0002"),
        (want[:2], "instead of"),
        (np.where(want == want[0, 0], np.nan, want), "not finite"),
    ):
        with pytest.raises(AssertionError, match=message):
            within(found, want, TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_cuts_cover_everything_once(seed: int) -> None:
    assert sum(cuts(200, seed)) == 200 and min(cuts(200, seed)) == 1
    assert np.sum(ragged([50, 1, 30], seed), axis=0).tolist() == [50, 1, 30]
