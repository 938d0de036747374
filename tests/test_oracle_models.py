"""Live against transformers in float32: random models of many shapes, by every way of running them.

The oracle reads and dequantises the checkpoint on its own, see `oracle_support.py`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_model_harness import (
    BETWEEN_CHUNKINGS,
    DATA,
    RUNNERS,
    TINY,
    TOLERANCE,
    Arr,
    Judge,
    Runner,
    cuts,
    feed,
    feed_ragged,
    ragged,
    stored,
    within,
)

import dsv4c
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.ir.meaning import Evaluator

pytestmark = pytest.mark.oracle

SMALL = {"num_hidden_layers": 3, "compress_ratios": [4, 16, 0]}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "published, f32 scales, ratio 128, window 32": {
        "config": {"compress_ratios": [0, 4, 128, 4], "sliding_window": 32}, "scale_dtype": "f32",
    },
    "transformers names, bf16": {"style": "transformers", "dtype": "bf16"},
    "saved names, f32, no YaRN": {"style": "saved", "dtype": "f32", "config": {"rope_scaling": None}},
}  # fmt: skip
"""On top of the tiny model with every layer kind."""

SMALL_VARIANTS: dict[str, dict[str, Any]] = {
    "f16, all layers hash": {"dtype": "f16", "config": {**SMALL, "num_hash_layers": 3}},
    "no hash layer, one group, every expert": {
        "dtype": "bf16",
        "config": {**SMALL, "num_hash_layers": 0, "o_groups": 1, "num_attention_heads": 5,
                   "num_experts_per_tok": 4, "routed_scaling_factor": 2.5},
    },
    "odd sizes": {
        "dtype": "f32",
        "config": {**SMALL, "hidden_size": 52, "vocab_size": 37, "head_dim": 20, "qk_rope_head_dim": 10,
                   "q_lora_rank": 21, "o_groups": 2, "o_lora_rank": 11, "num_attention_heads": 6,
                   "moe_intermediate_size": 19, "index_head_dim": 18, "sliding_window": 13,
                   "n_routed_experts": 7, "num_experts_per_tok": 3, "index_topk": 5},
    },
    "everything is rotated, clamped, two tokens in sight": {
        "config": {**SMALL, "qk_rope_head_dim": 32, "head_dim": 32, "index_head_dim": 32, "swiglu_limit": 0.5,
                   "sliding_window": 2, "index_topk": 1, "n_routed_experts": 33, "num_experts_per_tok": 6},
    },
    "other hyper-connections and scales": {
        "dtype": "bf16",
        "config": {**SMALL, "hc_mult": 2, "hc_sinkhorn_iters": 3, "hc_eps": 1e-3, "rms_norm_eps": 1e-3,
                   "rope_theta": 500.0, "compress_rope_theta": 3000.0, "index_topk": 500,
                   "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 32,
                                    "beta_fast": 8, "beta_slow": 2}},
    },
}  # fmt: skip
"""Of three layers; test_oracle_models_small.py, so that another worker can take them."""

LONG = 600


class Compared:
    """One checkpoint: the oracle's results, and every way of running it here."""

    def __init__(self, root: Path, name: str) -> None:
        from oracle_support import Oracle

        variant = dict((VARIANTS | SMALL_VARIANTS)[name])
        config = TINY | variant.pop("config", {})
        self.root = generate_checkpoint(root / "checkpoint", config, seed=21, **variant)
        self.oracle = Oracle.open(self.root)
        self.vocab: int = config["vocab_size"]
        rng = np.random.default_rng(3)
        self.prompts = [rng.integers(2, self.vocab, n) for n in (LONG, 131, 50, 7)]
        self.expected = [self.oracle.logits(ids) for ids in self.prompts]
        self.module = dsv4c.load_checkpoint(self.root)
        self.judge = Evaluator(self.module)
        self._sessions: dict[str, dsv4c.Session] = {}

    @cached_property
    def continued(self) -> tuple[Arr, Arr, float]:
        """A start, the oracle's two hundred greedy tokens behind it, and its smallest lead.

        Another start where the oracle's choice is closer to a tie than rounding.
        """
        start = self.prompts[2][:21]
        want, lead = self.oracle.greedy(start, 200)
        if lead < TOLERANCE * np.ptp(self.expected[0]):
            start = self.prompts[1][:33]
            want, lead = self.oracle.greedy(start, 200)
        return start, want, lead

    def run(self, how: str, batch: int = 1) -> Runner:
        if how == "evaluator":
            return Judge(self.judge, batch)
        if how not in self._sessions:
            path = self.root.parent / f"{how}.dsv4"
            self._sessions[how] = dsv4c.Session(
                dsv4c.compile(self.module, output=path, format=how, golden=False), context=1024, threads=1
            )
        session = self._sessions[how]
        if batch == 1:
            twin = session.fork()
            twin.reset()
            return twin
        return dsv4c.Session(session.artifact, batch, context=1024, threads=1)


@pytest.fixture(scope="module", params=VARIANTS)
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return Compared(tmp_path_factory.mktemp("oracle"), request.param)


def assert_equal(found: Arr, want: Arr, what: str) -> None:
    within(found, want, TOLERANCE, what)
    assert (found.argmax(-1) == want.argmax(-1)).all(), what


@pytest.mark.parametrize("how", RUNNERS)
def test_prompts_however_they_are_fed(compared: Compared, how: str) -> None:
    ids, want = compared.prompts[0], compared.expected[0]
    whole = feed(compared.run(how), ids, [LONG])
    assert_equal(whole, want, f"{how} whole")
    for seed, longest in enumerate((3, 300)):
        found = feed(compared.run(how), ids, cuts(LONG, seed, longest))
        assert_equal(found, want, f"{how} cut")
        within(found, whole, BETWEEN_CHUNKINGS, f"{how} between cuts")


@pytest.mark.parametrize("how", RUNNERS)
def test_token_by_token(compared: Compared, how: str) -> None:
    ids, want = compared.prompts[0], compared.expected[0]
    length = 200 if how == "evaluator" else LONG
    assert_equal(feed(compared.run(how), ids[:length], [1] * length), want[:length], f"{how} tokens")


@pytest.mark.parametrize("how", RUNNERS)
def test_batches(compared: Compared, how: str) -> None:
    for seed in range(2):
        calls = ragged([len(p) for p in compared.prompts], seed, longest=(60, 300)[seed])
        found = feed_ragged(compared.run(how, batch=4), compared.prompts, calls)
        for got, want in zip(found, compared.expected, strict=True):
            assert_equal(got, want, f"{how} batch")


def test_the_judge_in_double_precision(compared: Compared) -> None:
    """The oracle itself rounds in float32, so this says how close float32 can come."""
    ids, want = compared.prompts[1], compared.expected[1]
    within(dsv4c.evaluate(compared.module, ids, precision=np.float64), want, TOLERANCE / 10, "float64")


def test_short_prompts_alone(compared: Compared) -> None:
    """Every length from 1 to 40 given to the oracle as a prompt of its own."""
    for length in range(1, 41):
        ids = compared.prompts[2][:length]
        assert_equal(compared.run("tvm").step(ids[None])[0], compared.oracle.logits(ids), "short")


@pytest.mark.parametrize("how", ["tvm", "onnx"])
def test_two_hundred_greedy_tokens(compared: Compared, how: str) -> None:
    start, want, lead = compared.continued
    runner = compared.run(how)
    logits, found = runner.step(start[None])[0, -1], []
    for _ in want:
        found.append(int(logits.argmax()))
        logits = runner.step([[found[-1]]])[0, -1]
    assert found == want.tolist(), f"the oracle's smallest lead is {lead:.2g}"


@pytest.mark.parametrize("name", ["v4", "v4_r16"])
def test_the_golden_checkpoints(name: str) -> None:
    """Three independent implementations agree: the golden results, transformers and the evaluator."""
    from oracle_support import Oracle

    golden = stored(f"golden/{name}/golden.npz")
    found = Oracle.open(DATA / "golden" / name).logits(golden["input_ids"])
    within(found, golden["logits"], TOLERANCE / 5, "oracle")
    module = dsv4c.load_checkpoint(DATA / "golden" / name)
    within(dsv4c.evaluate(module, golden["input_ids"]), found, TOLERANCE, "evaluator")
