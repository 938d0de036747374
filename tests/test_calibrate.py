"""Calibration: what the compiled model counts, against a slow count by the evaluator on the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import Built, Call, built, dsv4c
from test_model_harness import Arr

from dsv4c import quality
from dsv4c.api import compile as compile_
from dsv4c.api import identity, load_checkpoint
from dsv4c.errors import PassError, TargetError, UsageError
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.meaning import Evaluator
from dsv4c.passes.instrument import INPUTS, PREFIX
from dsv4c.passes.statistics import Statistics
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.verify import verify

__all__ = ["built", "dsv4c"]  # fixtures: pytest finds them by name

RNG = np.random.default_rng(11)
TEXTS = (RNG.integers(2, 61, 70), RNG.integers(2, 61, 9))
CONTEXT, CHOSEN, EXPERTS = 24, 2, 4


def fed(texts: Sequence[Arr] = TEXTS) -> list[Arr]:
    """The windows: 23 tokens after a <bos>."""
    return [np.concatenate([[0], t[at : at + 23]]) for t in texts for at in range(0, len(t), 23)]


def slow_count(module: Module, windows: Sequence[Arr]) -> dict[str, Arr]:
    """Per layer [experts, 3], from the sub-graph of every single expert of the MODEL graph."""
    evaluator, sums = Evaluator(module), dict[str, Arr]()
    for ids in windows:
        inputs = {"tokens": ids[None], "n_valid": np.array([len(ids)]), "rows": np.zeros((1, 1))}
        trace = evaluator(inputs, evaluator.fresh_state(B=1, ctx=len(ids)), trace=True).trace
        for op, results in trace.items():
            if op.name == "dispatch":
                outputs = [trace[_producer(_combine(op), 2 + e)][0] for e in range(EXPERTS)]
                rows = [
                    (len(gate), gate.sum(dtype=float), np.linalg.norm(y.astype(float), axis=1).sum())
                    for gate, y in zip(results[1::2], outputs, strict=True)
                ]
                sums[op.loc] = sums.get(op.loc, 0) + np.array(rows)
    return sums


def mean_squares(module: Module, windows: list[Arr]) -> dict[str, Arr]:
    """Per weight what it is fed, from the MODEL graph; experts by the router's input, under one name."""
    evaluator, sums, count = Evaluator(module), dict[str, Arr](), 0
    for ids in windows:
        inputs = {"tokens": ids[None], "n_valid": np.array([len(ids)]), "rows": np.zeros((1, 1))}
        trace = evaluator(inputs, evaluator.fresh_state(B=1, ctx=len(ids)), trace=True).trace
        count += len(ids)
        for op in module.ops:
            x = op.operands[0] if op.operands else None
            if x is None or x.producer is None or op.name not in ("linear", "dispatch"):
                continue
            value = trace[x.producer][x.producer.results.index(x)]
            if value.shape[:-1] != (1, len(ids)):
                continue  # rows of one expert, or the rows whose logits are asked for
            matrix = op.operands[1].producer
            locs = [f"{op.loc}.experts.*.{w}.weight" for w in ("w1", "w3")]
            if op.name == "linear":
                assert matrix is not None
                locs = [matrix.loc]
            for loc in locs:
                sums[loc] = sums.get(loc, 0) + np.square(value[0].astype(float)).sum(axis=0)
    return {loc: total / count for loc, total in sums.items()}


def _combine(dispatch: Op) -> Op:
    op: Op = dispatch
    while op.name != "combine":
        op = op.results[0].users()[0]
    return op


def _producer(op: Op, index: int) -> Op:
    producer = op.operands[index].producer
    assert producer is not None
    return producer


@pytest.fixture(scope="module")
def instrumented(built: Built) -> Path:
    path = built.checkpoint.parent / "instrumented.dsv4"
    return compile_(load_checkpoint(built.checkpoint), output=path, passes=quality.PASSES)


@pytest.fixture
def once(instrumented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration compiles the same model again and again: take what is there."""

    def compile_instead(module: Module, output: Path, passes: str, **options: Any) -> Path:
        assert passes == quality.PASSES and not options["golden"]
        return Path(shutil.copy(instrumented, output))

    monkeypatch.setattr(quality.api, "compile", compile_instead)


def equal(a: Statistics, b: Statistics, tolerance: float) -> None:
    assert a.experts.keys() == b.experts.keys()
    for layer, usage in a.experts.items():
        np.testing.assert_array_equal(usage.tokens, b.experts[layer].tokens, err_msg=layer)
        np.testing.assert_allclose(usage.gate, b.experts[layer].gate, rtol=tolerance, err_msg=layer)
        np.testing.assert_allclose(usage.saliency, b.experts[layer].saliency, rtol=tolerance, err_msg=layer)


# ------------------------------------------------------------------------------------ the counts


def test_counts_are_those_of_the_evaluator(built: Built) -> None:
    """From the directory, through a compilation of its own, to every number."""
    seen: list[tuple[str, int, int]] = []
    found = quality.calibrate(
        built.checkpoint, *TEXTS, context=CONTEXT, chunk=7, threads=1, progress=lambda *a: seen.append(a)
    )
    module = load_checkpoint(built.checkpoint)
    want = slow_count(module, fed())
    assert list(found.experts) == [f"layers.{i}.ffn" for i in range(4)] == list(want)
    for layer, usage in found.experts.items():
        np.testing.assert_array_equal(usage.tokens, want[layer][:, 0], err_msg=layer)
        np.testing.assert_allclose(usage.gate, want[layer][:, 1], rtol=1e-4)
        np.testing.assert_allclose(usage.saliency, want[layer][:, 2], rtol=1e-4)
        assert usage.tokens.sum() == found.tokens_seen * CHOSEN
    assert found.identity == identity(module) and found.vocab_size == 61
    histogram = np.bincount(np.concatenate(fed()), minlength=61)
    assert found.tokens_seen == histogram.sum() == 70 + 9 + 5
    np.testing.assert_array_equal(found.extra["tokens"], histogram)
    assert found.extra["tokens"].dtype == np.int64
    squares = mean_squares(module, fed())
    assert {n.removeprefix("mean_square.") for n in found.extra if n != "tokens"} == set(squares)
    for loc, mean in squares.items():
        np.testing.assert_allclose(found.extra["mean_square." + loc], mean, rtol=1e-4, err_msg=loc)
    steps = [done for what, done, total in seen if what == "calibration" and total == 84]
    assert steps[:4] == [0, 7, 14, 21] and steps[-1] == 84 and steps == sorted(steps)


@pytest.mark.usefixtures("once")
def test_the_chunk_changes_no_count(built: Built) -> None:
    whole = quality.calibrate(built.checkpoint, *TEXTS, context=CONTEXT, threads=1)
    for chunk in (1, 5):
        again = quality.calibrate(built.checkpoint, *TEXTS, context=CONTEXT, chunk=chunk, threads=1)
        equal(again, whole, 1e-6)
    wide = quality.calibrate(built.checkpoint, *TEXTS, context=CONTEXT + 1, threads=1)
    assert any((wide.experts[layer].tokens != u.tokens).any() for layer, u in whole.experts.items())


@pytest.mark.usefixtures("once")
def test_documents_add_up(built: Built) -> None:
    both, first, second = (
        quality.calibrate(built.checkpoint, *texts, threads=1) for texts in (TEXTS, TEXTS[:1], TEXTS[1:])
    )
    for layer, usage in both.experts.items():
        parts = [part.experts[layer] for part in (first, second)]
        np.testing.assert_array_equal(usage.tokens, parts[0].tokens + parts[1].tokens)
        np.testing.assert_allclose(usage.saliency, parts[0].saliency + parts[1].saliency, rtol=1e-12)


@pytest.mark.usefixtures("once")
def test_text_is_its_ids(built: Built) -> None:
    text = quality.calibrate(built.checkpoint, "abc abc", threads=1)
    ids = quality.calibrate(built.checkpoint, [2, 3, 4, 54, 2, 3, 4], threads=1)
    equal(text, ids, 0)
    assert text.tokens_seen == 8 and text.extra["tokens"][[0, 2, 54]].tolist() == [1, 2, 1]
    assert quality.calibrate(built.checkpoint, "abc abc", max_tokens=3, threads=1).tokens_seen == 4


def test_padding_is_not_counted(instrumented: Path) -> None:
    def counts(session: Session) -> Arr:
        return np.stack([a for name, a in session.state.items() if name.startswith(PREFIX)])

    ids = RNG.integers(0, 61, (2, 19))
    ragged = Session(instrumented, batch=2, context=64, threads=1)
    for n_valid in ((19, 4), (0, 7)):
        ragged.step(ids, n_valid)
    assert (counts(ragged)[:, :, 0].sum(axis=1) == (19 + 4 + 7) * CHOSEN).all()
    alone = np.zeros((4, EXPERTS, 3))
    for row, parts in enumerate(((19,), (4, 7))):
        session = Session(instrumented, context=64, threads=1)
        for count in parts:
            session.step(ids[row, :count])
        alone += counts(session)
    np.testing.assert_array_equal(counts(ragged)[:, :, 0], alone[:, :, 0])
    np.testing.assert_allclose(counts(ragged), alone, rtol=1e-6)


def test_counting_changes_no_logit(built: Built, instrumented: Path) -> None:
    plain, counted = (Session(path, context=64, threads=1) for path in (built.bare, instrumented))
    for part in (TEXTS[0][:17], TEXTS[0][17:18], TEXTS[0][18:40]):
        np.testing.assert_array_equal(counted.step(part), plain.step(part))
    added = {name for name in counted.state.keys() - plain.state.keys() if not name.startswith(INPUTS)}
    assert added == {f"{PREFIX}layers.{i}.ffn" for i in range(4)}
    assert counted.state[f"{PREFIX}layers.0.ffn"].shape == (EXPERTS, 3)


def test_a_counting_artifact_verifies_itself(instrumented: Path) -> None:
    checks = verify(Artifact.open(instrumented), threads=1)
    assert all(c.ok for c in checks) and not any(PREFIX in c.name for c in checks)


def test_counts_beyond_what_float32_can_count() -> None:
    """The state is emptied after every call."""
    name, much = f"{PREFIX}layers.0.ffn", 2**23 + 1

    class Busy:
        def __init__(self) -> None:
            self.state = {name: np.zeros((1, 3), np.float32), "inputs.w": np.zeros(2, np.float32)}
            self.model = {"vocab_size": 9}

        def reset(self) -> None:
            for array in self.state.values():
                array[...] = 0

        def prefill(self, prompts: list[list[int]], chunk: int) -> None:
            assert len(prompts[0]) <= chunk == 2
            self.state[name] += np.float32([[much, 0.5, 0.25]])
            self.state["inputs.w"] += np.float32([much, 0])

    texts = [np.array([0, 1, 2, 3, 4]), np.array([0, 5])]
    fed = {"inputs.w": ["v", "w"]}
    found = quality._count(Busy(), "busy", texts, 2, fed, None)  # type: ignore[arg-type]
    for loc in ("v", "w"):
        assert found.extra[f"mean_square.{loc}"].tolist() == [np.float32(4 * much / 7), 0]
    usage = found.experts["layers.0.ffn"]
    assert usage.tokens.tolist() == [4 * much] and usage.gate.tolist() == [2.0]
    assert found.extra["tokens"].tolist() == [2, 1, 1, 1, 1, 1, 0, 0, 0] and found.tokens_seen == 7


# ---------------------------------------------------------------------------------------- misuse


def test_what_cannot_be_calibrated(built: Built, tiny_model: Module) -> None:
    """Every complaint comes before the compilation."""

    def refuse(message: str, *texts: Any, error: type[Exception] = UsageError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            quality.calibrate(options.pop("source", built.checkpoint), *texts, **options)

    refuse("no text")
    refuse("text: is empty", "")
    refuse("text 2: is empty", [5], [])
    refuse("token id 61 is outside the vocabulary; allowed: 0..60", [61])
    refuse("context = 513; allowed: 1 to 512", [5], context=513)
    refuse("context = 0; allowed: 1 to 512", [5], context=0)
    refuse("chunk = 0; allowed: 1 or more", [5], chunk=0)
    refuse("unknown target 'gpu'", [5], target="gpu", error=TargetError)
    refuse("the checkpoint has no tokenizer; allowed: token ids", "abc", source=tiny_model)
    tiny_model.assets["tokenizer"] = b"{}"
    refuse("the tokenizer does not load", "abc", source=tiny_model)
    tiny_model.ops = [op for op in tiny_model.ops if op.name != "dispatch"]
    refuse("has no routed experts", [5], source=tiny_model)


# --------------------------------------------------------------------------------- the command line


@pytest.mark.usefixtures("once")
def test_the_command(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    text, ids, out = tmp_path / "text", tmp_path / "ids", tmp_path / "s.npz"
    text.write_text("In the beginning 123")
    ids.write_text("5, 6\n7")
    command = ("calibrate", built.checkpoint, "--text", text, "--ids", ids, "-o", out, "--threads", 1)
    code, printed, err = dsv4c(*command, "--context", 16, "--json")
    facts = json.loads(printed)
    assert code == 0 and err == ""
    assert facts["tokens"] == 20 + 3 + 3 and facts["path"] == str(out)
    assert [a["layer"] for a in facts["layers"]] == [f"layers.{i}.ffn" for i in range(4)]
    stored = Statistics.load(out)
    assert stored.tokens_seen == 26 and stored.identity == facts["identity"]
    equal(stored, quality.calibrate(built.checkpoint, text.read_text(), [5, 6, 7], context=16, threads=1), 0)
    for a in facts["layers"]:
        tokens = stored.experts[a["layer"]].tokens
        assert (a["least"], a["most"], a["unused"]) == (tokens.min(), tokens.max(), (tokens == 0).sum())
    code, printed, _ = dsv4c(*command, "--max-tokens", 2, "--chunk", 1)
    assert code == 0 and "3 tokens, 3 of 61 distinct" in printed and "layers.3.ffn" in printed
    assert Statistics.load(out).tokens_seen == 3, "an older file is replaced"


@pytest.mark.usefixtures("once")
def test_a_failure_leaves_the_old_file(
    dsv4c: Call, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.npz"
    out.write_bytes(b"older")

    def fail(*args: Any) -> None:
        raise PassError("the disk is on fire")

    monkeypatch.setattr(quality, "_count", fail)
    (tmp_path / "ids").write_text("5")
    code, _, err = dsv4c("calibrate", built.checkpoint, "--ids", tmp_path / "ids", "-o", out)
    assert code == 2 and "on fire" in err
    assert out.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 2
