"""Loss, divergence and error by layer: against slow formulas, known results, and every way to misuse them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import Built, Call, built, dsv4c
from test_example import negative_log_likelihood, training, windows
from test_example import text as heldout
from test_model_harness import FORMATS, Arr, Models
from tokenizers import Tokenizer

from dsv4c import quality
from dsv4c.api import compile as compile_
from dsv4c.api import load_checkpoint
from dsv4c.errors import ArtifactError, EvalError, UsageError
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module
from dsv4c.passes import parse_pipeline, run_pipeline
from dsv4c.runtime import Session, corpus
from dsv4c.runtime import quality as measures
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.text import tokenizer_of

__all__ = ["built", "dsv4c"]  # fixtures: pytest finds them by name

IDS = np.random.default_rng(3).integers(2, 61, 90)


# ------------------------------------------------------------------------------------- windows


def ids(*values: int) -> Arr:
    return np.array(values, np.int32)


def pairs(texts: Sequence[Arr], length: int, bos: int | None) -> list[tuple[list[int], list[int]]]:
    return [(x.tolist(), y.tolist()) for x, y in corpus.scored(texts, length, bos)]


def test_every_token_is_predicted_once() -> None:
    texts = [ids(5, 6, 7, 8, 9), ids(4)]
    assert pairs(texts, 3, 0) == [([0, 5, 6], [5, 6, 7]), ([0, 8], [8, 9]), ([0], [4])]
    assert pairs(texts, 2, None) == [([5, 6], [6, 7]), ([7, 8], [8, 9])]
    assert pairs(texts, 9, 0) == [([0, 5, 6, 7, 8], [5, 6, 7, 8, 9]), ([0], [4])]
    assert (corpus.count_scored(texts, 0), corpus.count_scored(texts, None)) == (6, 4)


def test_every_token_is_fed_once() -> None:
    texts = [ids(5, 6, 7, 8, 9), ids(4)]
    assert [w.tolist() for w in corpus.windows(texts, 3, 0)] == [[0, 5, 6], [0, 7, 8], [0, 9], [0, 4]]
    assert [w.tolist() for w in corpus.windows(texts, 3, None)] == [[5, 6, 7], [8, 9], [4]]
    assert [w.tolist() for w in corpus.windows([ids(5, 6)], 1, 0)] == [[5], [6]], "no room for a start"


def test_documents_are_checked_and_limited() -> None:
    def load(*texts: Any, bos: int | None = 0, limit: int | None = None) -> list[list[int]]:
        def tokenizer() -> Tokenizer:
            raise AssertionError("ids need no tokenizer")

        return [d.tolist() for d in corpus.documents(texts, tokenizer, 61, bos, limit)]

    assert load([0, 5, 6], np.array([7])) == [[5, 6], [7]], "windows bring their own start"
    assert load([0, 5], bos=None) == [[0, 5]]
    assert load([5, 6], [7, 8], [9], limit=3) == [[5, 6], [7]]
    for texts, message in (
        ((), "no text"), (([],), "text: is empty"), (([0],), "is empty"), (([1.5],), r"float64\[1\]"),
        (([5], [[6]]), r"text 2: is int64\[1, 1\]"), (([5, 61],), "token id 61 is outside the vocabulary"),
        (([-1],), "token id -1"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            load(*texts)
    with pytest.raises(UsageError, match="max_tokens = 0"):
        load([5], limit=0)


def test_long_text_is_encoded_in_pieces(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(Artifact.open(built.artifact))
    text = "ab c" * 10
    with pytest.raises(UsageError, match="token id 61 is outside the vocabulary"):
        corpus.documents(["123456"], lambda: tokenizer, 61, 0, None)
    whole = corpus.encode(tokenizer, text)
    monkeypatch.setattr(corpus, "PIECE", 7)
    np.testing.assert_array_equal(corpus.encode(tokenizer, text), whole)
    assert len(whole) == len(text) and not len(corpus.encode(tokenizer, ""))


# --------------------------------------------------------------------------------- the formulas


def fake(monkeypatch: pytest.MonkeyPatch, tables: dict[str, Arr], bos: int | None = 0) -> list[list[int]]:
    """Artifacts whose logits after a token are a row of a table; returns the calls that will be made."""
    calls: list[list[int]] = []

    class Table:
        def __init__(self, artifact: Any, context: int, threads: int | None) -> None:
            self.table = tables[artifact.path]

        def reset(self) -> None:
            calls.append([])

        def step(self, tokens: Arr) -> Arr:
            calls[-1] += tokens[0].tolist()
            return self.table[tokens].astype(np.float32)

    class Opened:
        def __init__(self, path: str) -> None:
            self.path = path
            self.meta = {"model": {"vocab_size": tables[path].shape[1], "bos": bos, "max_positions": 4}}

        @staticmethod
        def open(path: str) -> Opened:
            return Opened(path)

    monkeypatch.setattr(measures, "Session", Table)
    monkeypatch.setattr(measures, "Artifact", Opened)
    return calls


def test_hand_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens: `a` gives 1 a chance of 3/4 after 0 and 1/2 after 1, `b` the other way round."""
    l3 = log(3)
    tables = {"a": np.array([[0, l3], [1, 1]]), "b": np.array([[0, 0], [0, l3]])}
    calls = fake(monkeypatch, tables)
    found = quality.compare("a", "b", [1, 1, 0, 1, 1], context=4)
    assert [c for c in calls if c] == [[0, 1, 1, 0] * 2, [0] * 2], "a window of 4, then one that starts anew"
    # the targets are 1 1 0 1 and 1
    after_zero, after_one = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5), 0.5 * log(0.5**2 / (0.75 * 0.25))
    assert found.tokens == 5
    assert found.before.nll == pytest.approx(-(3 * log(0.75) + 2 * log(0.5)) / 5)
    assert found.after.nll == pytest.approx(-(3 * log(0.5) + log(0.75) + log(0.25)) / 5)
    assert found.after.perplexity == pytest.approx(exp(found.after.nll))
    assert found.kl_mean == pytest.approx((3 * after_zero + 2 * after_one) / 5)
    assert found.kl_p99 == pytest.approx(max(after_zero, after_one))
    assert found.top1 == 0, "ties go to the lower id"
    assert found.max_difference == pytest.approx(l3 / l3)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.to_json()["kl"] == {"mean": found.kl_mean, "p99": found.kl_p99}


def test_extreme_logits_are_no_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Huge logits do not overflow; what `after` makes impossible is infinitely far, not NaN."""
    never = np.array([[3e4, -3e4, 0], [0, 0, 0], [0, 0, 0]])
    ruled_out = np.array([[0, -np.inf, 0], [0, 0, 0], [0, 0, -np.inf]])
    fake(monkeypatch, {"a": never, "b": ruled_out})
    first = quality.compare("a", "b", [0, 0])
    assert first.kl_mean == pytest.approx(log(2)) and first.before.nll == 0
    assert quality.compare("a", "b", [0, 2, 1]).kl_mean == np.inf
    assert quality.perplexity("a", [1]).perplexity == np.inf


def test_without_a_start_the_first_token_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {"a": np.array([[0, log(3)], [0, 0]])}, bos=None)
    assert quality.perplexity("a", [0, 1]) == quality.Likelihood(1, pytest.approx(-log(0.75)))
    with pytest.raises(UsageError, match="one token predicts nothing; allowed: at least two"):
        quality.perplexity("a", [0])


# --------------------------------------------------------------------------------- real artifacts


def test_the_loss_of_the_example(models: Models) -> None:
    """As its author's evaluation measures it: windows of 384 after <bos>; see examples/kjv/evaluate.py."""
    session = models.session("kjv", "tvm", batch=4, context=384)
    (given, targets), *_ = windows(tokenizer_of(session.artifact))
    want = negative_log_likelihood(session.step(given), targets).mean()
    found = quality.perplexity(session.artifact, heldout(), context=384, max_tokens=4 * 384, threads=1)
    assert found.tokens == targets.size
    assert found.nll == pytest.approx(want, rel=1e-6)
    # The standard error of so few tokens is 3 %; the first verses are harder than most.
    assert found.nll == pytest.approx(training()["held_out_loss"], rel=0.1)
    assert found.nll < training()["unigram_held_out_loss"] - 1.5


def slow(before: Session, after: Session, tokens: Arr, length: int) -> dict[str, Any]:
    """The same facts from whole windows at once, in the plainest way."""
    rows: list[tuple[Arr, Arr, int]] = []
    for at in range(0, len(tokens), length):
        part = tokens[at : at + length]
        fed = np.concatenate([[0], part[:-1]])
        for session in (before, after):
            session.reset()
        rows += zip(before.step([fed])[0], after.step([fed])[0], part, strict=True)
    a, b = (np.array([r[i] for r in rows], np.float64) for i in (0, 1))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    at = np.arange(len(rows)), [r[2] for r in rows]
    kl = (p * np.log(p / q)).sum(-1)
    return {
        "tokens": len(rows),
        "before": {"nll": -np.log(p[at]).mean(), "perplexity": exp(-np.log(p[at]).mean())},
        "after": {"nll": -np.log(q[at]).mean(), "perplexity": exp(-np.log(q[at]).mean())},
        "kl": {"mean": kl.mean(), "p99": np.sort(kl)[int(np.ceil(0.99 * (len(kl) - 1)))]},
        "top1": (p.argmax(-1) == q.argmax(-1)).mean(),
        "max_difference": np.abs(a - b).max() / np.ptp(a),
    }


@pytest.fixture(scope="module")
def other(built: Built) -> Path:
    """The model of `built` with something changed in its third layer."""
    module = load_checkpoint(built.checkpoint)
    (mix,) = [op for op in module.ops if op.name == "hc_mix" and op.loc == "layers.2.hc_ffn"]
    mix.attrs["eps"] = 0.3
    return compile_(module, output=built.checkpoint.parent / "other.dsv4", golden=False)


def flat(facts: dict[str, Any]) -> dict[str, float]:
    inner = {name: v if isinstance(v, dict) else {"": v} for name, v in facts.items()}
    return {f"{name}.{part}": x for name, v in inner.items() for part, x in v.items()}


def test_two_models_against_the_slow_way(
    built: Built, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = slow(Session(built.artifact, threads=1), Session(other, threads=1), IDS, 40)
    found = quality.compare(built.artifact, other, IDS, context=40, threads=1)
    assert flat(found.to_json()) == pytest.approx(flat(want), rel=1e-6)
    assert 0 < found.top1 < 1 and found.kl_mean > 0.01, "this can fail"
    monkeypatch.setattr(measures, "STEP_LOGITS", 61 * 7)  # calls of 7 tokens, blocks of 2 rows
    monkeypatch.setattr(measures, "BLOCK_LOGITS", 61 * 2 + 5)
    again = quality.compare(built.artifact, other, IDS, context=40, threads=1)
    assert flat(again.to_json()) == pytest.approx(flat(found.to_json()), rel=1e-12)


def test_a_model_equals_itself(built: Built) -> None:
    seen: list[tuple[str, int, int]] = []
    found = quality.compare(
        built.artifact, built.bare, "abc abc", "xyz", threads=1, progress=lambda *a: seen.append(a)
    )
    assert found.before == found.after and found.tokens == 10
    assert (found.kl_mean, found.kl_p99, found.top1, found.max_difference) == (0, 0, 1, 0)
    assert seen == [("held-out text", 0, 10), ("held-out text", 7, 10), ("held-out text", 10, 10)]
    assert found.before == quality.perplexity(built.artifact, "abc abc", "xyz", threads=1)


def test_formats_may_differ(models: Models) -> None:
    pair = (models.artifact("ratio16", form) for form in FORMATS)
    found = quality.compare(*pair, IDS, context=64, threads=1)
    assert found.max_difference < 1e-4 and found.kl_p99 < 1e-8 and found.top1 > 0.98


def rewritten(source: Path, path: Path, **model: Any) -> Path:
    """The same artifact, without its tensors, with other facts of its model; None leaves one out."""
    old = Artifact.open(source)
    facts = {k: v for k, v in (old.meta["model"] | model).items() if v is not None}
    with ArtifactWriter(path) as writer:
        for key, value in old.meta.items():
            writer.set_meta(key, facts if key == "model" else value)
        for name in old.sections:
            writer.add_section(name, old.section(name))
    return path


def test_what_cannot_be_compared(built: Built, tmp_path: Path) -> None:
    wider = rewritten(built.bare, tmp_path / "wider.dsv4", vocab_size=62)
    with pytest.raises(UsageError, match=r"wider.*has a vocabulary of 62; allowed: 61, that of .*tiny"):
        quality.compare(built.artifact, wider, IDS)
    layer = rewritten(built.bare, tmp_path / "layer.dsv4", vocab_size=None, max_positions=None)
    with pytest.raises(ArtifactError, match=r"layer.dsv4: is no language model: .*max_positions, vocab_size"):
        quality.compare(built.artifact, layer, IDS)
    with pytest.raises(ArtifactError, match="carries no tokenizer"):
        quality.perplexity(built.bare, "abc")
    with pytest.raises(UsageError, match="context = 0; allowed: 1 to 512"):
        quality.perplexity(built.bare, IDS, context=0)


def test_the_command(dsv4c: Call, built: Built, other: Path, tmp_path: Path) -> None:
    text, numbers = tmp_path / "text", tmp_path / "ids"
    text.write_text("In the beginning 123")
    numbers.write_text("5, 6 7\n8\n")
    files = ("--text", text, "--text", text, "--ids", numbers, "--context", 16, "--threads", 1)
    code, out, err = dsv4c("compare", built.artifact, other, *files, "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["tokens"] == 44
    assert facts["before_path"] == str(built.artifact) and facts["kl"]["mean"] > 0
    code, out, _ = dsv4c("compare", built.artifact, other, *files)
    assert code == 0 and "44 tokens" in out and f"{facts['after']['nll']:.4f}" in out
    code, out, _ = dsv4c("compare", built.artifact, other, *files, "--max-tokens", 5, "--json")
    assert json.loads(out)["tokens"] == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [("61", "token id 61 is outside the vocabulary; allowed: 0..60"), ("1 -2", "'-' is not part of"),
     ("9" * 30, "a number is too large"), (" \n", "is empty"), ("0", "is empty")],
)  # fmt: skip
def test_bad_ids(dsv4c: Call, built: Built, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ids").write_text(content)
    code, out, err = dsv4c("compare", built.bare, built.bare, "--ids", tmp_path / "ids")
    assert code == 2 and out == "" and message in err


# --------------------------------------------------------------------------------- error by layer

PROMPT = np.arange(3, 30)


def test_equal_graphs_have_no_error(tiny_model: Module) -> None:
    fused = clone(tiny_model)
    run_pipeline(fused, parse_pipeline("fuse_swiglu,fuse_index_select,fuse_expert_gemms"))
    names = ["layers.0", "layers.1", "layers.2", "layers.3", "logits"]
    same = quality.error_by_layer(tiny_model, tiny_model, PROMPT)
    assert same == [{"layer": name, "max": 0.0, "rms": 0.0} for name in names]
    found = quality.error_by_layer(tiny_model, fused, PROMPT, np.float64)
    assert [f["layer"] for f in found] == names
    assert all(0 <= f["rms"] <= f["max"] < 1e-12 for f in found)


@pytest.mark.parametrize("pipeline", ["", "fuse_swiglu,fuse_hyper", "fuse_swiglu,fuse_hyper{expand=false}"])
def test_an_error_shows_from_its_layer_on(tiny_model: Module, pipeline: str) -> None:
    """Also where a pass has moved the end of a block into an op of the next one."""
    changed = clone(tiny_model)
    (mix,) = [op for op in changed.ops if op.name == "hc_mix" and op.loc == "layers.2.hc_ffn"]
    mix.attrs["eps"] = 0.5
    run_pipeline(changed, parse_pipeline(pipeline))
    found = {f["layer"]: f["max"] for f in quality.error_by_layer(tiny_model, changed, PROMPT, np.float64)}
    assert found["layers.0"] < 1e-12 and found["layers.1"] < 1e-12
    assert found["layers.2"] > 1e-3 and found["layers.3"] > 1e-3 and found["logits"] > 1e-3


def test_errors_are_those_of_the_streams(tiny_model: Module) -> None:
    """`max` and `rms` over the range of the reference, from the graph's own results."""
    changed = clone(tiny_model)
    (last,) = [op for op in changed.ops if op.name == "hc_mix" and op.loc == "layers.3.hc_ffn"]
    last.attrs["eps"] = 0.5
    want, got = (
        quality._streams(m, PROMPT, np.float64)["layers.3"] for m in (tiny_model, changed)
    )
    assert want.shape == (1, len(PROMPT), 4, 96)
    gap = got - want
    found = quality.error_by_layer(tiny_model, changed, PROMPT, np.float64)[3]
    assert found["max"] == pytest.approx(np.abs(gap).max() / (want.max() - want.min()))
    assert found["rms"] == pytest.approx(np.sqrt((gap**2).mean()) / (want.max() - want.min()))


def test_graphs_that_do_not_correspond(tiny_model: Module) -> None:
    headless = clone(tiny_model)
    for op in headless.ops:
        op.loc = op.loc.replace("head", "tail")
    with pytest.raises(EvalError, match="no op of the head reads streams"):
        quality.error_by_layer(tiny_model, headless, PROMPT)
    moved = clone(tiny_model)
    for op in moved.ops:
        op.loc = op.loc.replace("layers.3", "layers.7")
    with pytest.raises(EvalError, match=r"layers\.7, logits; allowed: those of the reference: .*layers\.3"):
        quality.error_by_layer(tiny_model, moved, PROMPT)
    for tokens in ([[1, 2]], [], [1.5]):
        with pytest.raises(EvalError, match=r"allowed: ids \[T\]"):
            quality.error_by_layer(tiny_model, tiny_model, tokens)
