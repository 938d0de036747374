"""How well an artifact models a text, and how far one artifact is from another, in logits and probabilities.

Text is cut into windows of one context, the state reset in between; memory does not grow with its length but
for one number per token. Knows nothing of how artifacts are made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, UsageError

from .container import Artifact
from .corpus import Ids, Text, count_scored, documents, scored
from .session import DEFAULT_CHUNK, DEFAULT_CONTEXT, Session
from .text import tokenizer_of

Source = str | os.PathLike[str] | Artifact
Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""
Wide = npt.NDArray[np.float64]

STEP_LOGITS = 1 << 23
"""Logits of one step: 32 MiB of float32."""
BLOCK_LOGITS = 1 << 19
"""Logits turned into float64 at a time."""
WHAT = "held-out text"


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts a text.

    Attributes:
        tokens: how many were predicted.
        nll: mean negative log-likelihood of a token, in nats.
    """

    tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        return exp(self.nll) if self.nll < 700 else float("inf")

    def to_json(self) -> dict[str, float]:
        return {"nll": self.nll, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Quality:
    """One model held against another on the same text.

    Attributes:
        tokens: predictions compared.
        before, after: how well each predicts the text.
        kl_mean, kl_p99: of KL(before || after) over the predictions, in nats.
        top1: share of the predictions whose likeliest token is the same.
        max_difference: the largest difference of a logit over the range of all logits of `before`.
    """

    tokens: int
    before: Likelihood
    after: Likelihood
    kl_mean: float
    kl_p99: float
    top1: float
    max_difference: float

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "kl": {"mean": self.kl_mean, "p99": self.kl_p99},
            "top1": self.top1,
            "max_difference": self.max_difference,
        }


def perplexity(
    artifact: Source,
    *texts: Text,
    context: int | None = None,
    threads: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Likelihood:
    """How well an artifact predicts texts.

    Every window of `context` positions starts from a fresh state, with the model's beginning-of-sequence
    token where it has one; then every token of the text is predicted once, else all but each first.

    Args:
        texts: documents, as text or as token ids; no window spans two.
        context: positions of a window; None is the smallest of the model's maximum, 4096, and what it was
            compiled for.
        max_tokens: of text to take; None takes all.
        progress: called with (what, done, total) after every step.

    Raises:
        UsageError: a text is empty or not ids of the vocabulary; context out of range.
        ArtifactError: text for an artifact without a tokenizer; no language model.
    """
    total, count = 0.0, 0
    for (logits,), targets in _predictions((artifact,), texts, context, threads, max_tokens, progress):
        for rows in _blocks(logits):
            total += float(-_log_softmax(logits[rows])[_at(targets[rows])].sum())
        count += len(targets)
    return Likelihood(count, total / count)


def compare(
    before: Source,
    after: Source,
    *texts: Text,
    context: int | None = None,
    threads: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Hold `after` against `before` on texts; the arguments are those of `perplexity`.

    Text is encoded by the tokenizer of `before`. None as context is the smaller of both models' maxima and
    4096. Formats may differ: a TVM and an ONNX artifact compare like any two.

    Raises:
        UsageError: as `perplexity`; or the vocabularies differ in size, so that no token is the same.
    """
    sums, same, count = np.zeros(2), 0, 0
    divergences = list[Wide]()
    low, high, worst = np.inf, -np.inf, 0.0
    for (a, b), targets in _predictions((before, after), texts, context, threads, max_tokens, progress):
        low, high = min(low, float(a.min())), max(high, float(a.max()))
        for rows in _blocks(a):
            p, q, chosen = _log_softmax(a[rows]), _log_softmax(b[rows]), _at(targets[rows])
            sums -= p[chosen].sum(), q[chosen].sum()
            divergences.append(_divergence(p, q))
            same += int((a[rows].argmax(-1) == b[rows].argmax(-1)).sum())
            worst = float(np.maximum(worst, np.abs(a[rows].astype(np.float64) - b[rows]).max()))
        count += len(targets)
    kl = np.concatenate(divergences)
    p99 = float(np.quantile(kl, 0.99, method="higher"))
    first, second = (Likelihood(count, float(s) / count) for s in sums)
    size = worst / (high - low) if high > low else worst
    return Quality(count, first, second, float(kl.mean()), p99, same / count, float(size))


def _predictions(
    sources: Sequence[Source], texts: Sequence[Text], context: int | None, threads: int | None,
    limit: int | None, progress: Progress | None,
) -> Iterator[tuple[list[npt.NDArray[np.float32]], Ids]]:  # fmt: skip
    """Per step the logits [T,V] of every artifact and the tokens [T] that followed."""
    artifacts = [s if isinstance(s, Artifact) else Artifact.open(s) for s in sources]
    for artifact in artifacts:
        if lacking := {"vocab_size", "bos", "max_positions"} - artifact.meta["model"].keys():
            raise ArtifactError(
                f"is no language model: it says nothing of {', '.join(sorted(lacking))}",
                where=str(artifact.path),
            )
    models = [a.meta["model"] for a in artifacts]
    vocab, bos = int(models[0]["vocab_size"]), models[0]["bos"]
    for artifact, model in zip(artifacts, models, strict=True):
        if int(model["vocab_size"]) != vocab:
            raise UsageError(
                f"has a vocabulary of {model['vocab_size']}", where=str(artifact.path),
                allowed=f"{vocab}, that of {artifacts[0].path}", hint="compare two artifacts of one model",
            )  # fmt: skip
    ids = documents(texts, lambda: tokenizer_of(artifacts[0]), vocab, bos, limit)
    done, total = 0, count_scored(ids, bos)
    if not total:
        raise UsageError("one token predicts nothing", where="text", allowed="at least two tokens")
    longest = min(int(m["max_positions"]) for m in models)
    rooms = [static["context"] for a in artifacts if (static := a.meta.get("onnx", {}).get("static"))]
    length = min(longest, DEFAULT_CONTEXT, *rooms) if context is None else context
    sessions = [Session(a, context=length, threads=threads) for a in artifacts]
    chunk = max(1, min(DEFAULT_CHUNK, STEP_LOGITS // vocab))
    report = progress or (lambda what, done, total: None)
    for inputs, targets in scored(ids, length, bos):
        for session in sessions:
            session.reset()
        for at in range(0, len(inputs), chunk):
            report(WHAT, done, total)
            part = inputs[at : at + chunk]
            yield [session.step(part[None])[0] for session in sessions], targets[at : at + chunk]
            done += len(part)
    report(WHAT, total, total)


def _blocks(logits: npt.NDArray[np.float32]) -> Iterator[slice]:
    """Rows whose logits fit in `BLOCK_LOGITS`."""
    rows = max(1, BLOCK_LOGITS // logits.shape[1])
    return (slice(at, at + rows) for at in range(0, len(logits), rows))


def _log_softmax(logits: npt.NDArray[np.float32]) -> Wide:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def _at(targets: Ids) -> tuple[npt.NDArray[np.intp], Ids]:
    return np.arange(len(targets)), targets


def _divergence(p: Wide, q: Wide) -> Wide:
    """[T] KL(p || q) of log-probabilities [T,V]; never below 0, however sums round."""
    weights = np.exp(p)
    with np.errstate(invalid="ignore"):  # what has no probability adds nothing, even where q has none either
        terms = np.where(weights > 0, weights * (p - q), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0), np.float64)


__all__ = ["Likelihood", "Quality", "compare", "perplexity"]
