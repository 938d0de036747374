"""From logits to the next token: owns temperature, top-k, top-p and the random streams.

It must not know what produced the logits or what the tokens mean. Each batch row draws from a
stream of its own, one number per token, so a row's text depends neither on its neighbours nor on
how many there are. Probabilities are computed in float64, whatever the logits were computed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import SessionError, UsageError

Probabilities = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# Most top-p sets are this small; sorting only these spares sorting the whole vocabulary.
_TOP_P_GUESS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Args:
        temperature: divides the logits; 0 takes the largest logit, ties to the lowest id.
        top_k: keep the k most probable tokens, ties to the lowest ids; 0 keeps all.
        top_p: then keep the fewest most probable tokens whose probabilities (after top-k) sum to
            at least this; always at least one.
        seed: fixes every draw; None takes fresh entropy, which `Sampler.seed` reports.
        stop_ids: token ids that end a row's text; for the caller's loop, sampling ignores them.

    Raises:
        UsageError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        t, p = self.temperature, self.top_p
        _require(_is_number(t) and math.isfinite(t) and t >= 0, "temperature", t, "a finite number >= 0")
        _require(_is_count(self.top_k), "top_k", self.top_k, "an integer >= 0; 0 keeps all tokens")
        _require(_is_number(p) and 0 < p <= 1, "top_p", p, "a number > 0 and <= 1; 1 keeps all tokens")
        _require(self.seed is None or _is_count(self.seed), "seed", self.seed, "an integer >= 0, or None")
        ids = self.stop_ids
        _require(isinstance(ids, tuple) and all(map(_is_count, ids)), "stop_ids", ids, "a tuple of token ids")


class Sampler:
    """Chooses one token per batch row and call; the only state is the rows' random streams.

    `seed` is the seed in use, so that a run with fresh entropy can be repeated.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed: int = _fresh_seed() if params.seed is None else params.seed
        self._streams: list[np.random.Generator] = []

    def pick(self, logits: npt.NDArray[np.floating[Any]]) -> Ids:
        """The next token of every row.

        Args:
            logits: [B, V] floating point; -inf bars a token. Row b uses stream b.

        Returns:
            [B] int64 token ids.

        Raises:
            UsageError: the array is not [B, V] of a floating type with V > 0.
            SessionError: a row holds NaN or +inf, or bars every token.
        """
        _check_logits(logits)
        if self.params.temperature == 0:
            return np.asarray(logits.argmax(axis=1), np.int64)  # argmax takes the first of equals
        self._grow(len(logits))
        draws = [stream.random() for stream in self._streams[: len(logits)]]
        picks = [_pick_row(row, draw, self.params) for row, draw in zip(logits, draws, strict=True)]
        return np.array(picks, np.int64)

    def state(self) -> dict[str, Any]:
        """The position of every stream, for JSON; 128-bit numbers are text, as JSON readers round them."""
        states = [stream.bit_generator.state["state"] for stream in self._streams]
        return {"seed": str(self.seed), "rows": [[str(s["state"]), str(s["inc"])] for s in states]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state()` gave; a malformed state raises SessionError and changes nothing."""
        try:
            seed, rows = int(state["seed"]), [(int(s), int(inc)) for s, inc in state["rows"]]
            np.random.SeedSequence(seed)  # refuses what could not start a new row later
            streams = [_stream_at(*row) for row in rows]
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise SessionError(f"the saved sampler state is malformed: {e!r}") from e
        self.seed, self._streams = seed, streams

    def _grow(self, rows: int) -> None:
        """Streams are made when a row first needs one; row b's depends on the seed and b alone."""
        for row in range(len(self._streams), rows):
            sequence = np.random.SeedSequence(self.seed, spawn_key=(row,))
            self._streams.append(np.random.Generator(np.random.PCG64(sequence)))


def _pick_row(logits: npt.NDArray[np.floating[Any]], draw: float, params: SamplingParams) -> int:
    """Inverts the cumulative distribution of the kept tokens, in the order of ids, at `draw` in [0, 1)."""
    weights = _softmax(logits, params.temperature)
    ids = _kept(logits, weights, params)
    cumulative = np.cumsum(weights[ids])
    # side="right" skips tokens of probability zero. The place is always inside: draws are multiples
    # of 2**-53 below 1, so the product rounds to less than the total.
    return int(ids[np.searchsorted(cumulative, draw * cumulative[-1], side="right")])


def _kept(logits: npt.NDArray[np.floating[Any]], weights: Probabilities, params: SamplingParams) -> Ids:
    """Ids that top-k and then top-p leave, ascending."""
    ids = np.arange(len(logits))
    if 0 < params.top_k < len(ids):
        ids = _top_k(logits, params.top_k)
    if params.top_p < 1:
        ids = ids[_top_p(weights[ids], params.top_p)]
    return ids


def _softmax(logits: npt.NDArray[np.floating[Any]], temperature: float) -> Probabilities:
    x = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: the quotient is -inf, which is right
        p = np.exp((x - x.max()) / temperature)
    return np.asarray(p / p.sum(), np.float64)


def _top_k(values: npt.NDArray[np.floating[Any]], k: int) -> Ids:
    """Ids of the k largest, ascending; equals at the border are taken from the lowest id on."""
    border = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _top_p(weights: Probabilities, top_p: float) -> Ids:
    """Places of the fewest largest weights whose share of the sum reaches `top_p`, ascending."""
    goal = top_p * weights.sum()
    for count in (_TOP_P_GUESS, len(weights)):
        places = _top_k(weights, count) if count < len(weights) else np.arange(len(weights))
        places = places[np.argsort(-weights[places], kind="stable")]
        reached = np.cumsum(weights[places]) >= goal
        if reached.any():
            return np.sort(places[: int(reached.argmax()) + 1])
    return np.arange(len(weights))  # rounding kept the sum just below the goal: all are needed


def _check_logits(logits: npt.NDArray[np.floating[Any]]) -> None:
    array = isinstance(logits, np.ndarray)
    if not (array and logits.ndim == 2 and logits.shape[1] and np.issubdtype(logits.dtype, np.floating)):
        got = f"{logits.dtype}{list(logits.shape)}" if array else type(logits).__name__
        raise UsageError(f"the logits are {got}", where="sampling", allowed="floating point [B, V], V > 0")
    peaks = logits.max(axis=1)  # NaN wins every maximum, so this one pass finds all that is wrong
    for row in np.flatnonzero(~np.isfinite(peaks)):
        what = {"nan": "contain NaN", "inf": "contain +inf", "-inf": "are all -inf"}[str(float(peaks[row]))]
        hint = "run `dsv4c verify` to find the first op that goes wrong"
        raise SessionError(f"the logits of row {row} {what}", where="sampling", hint=hint)


def _stream_at(state: int, inc: int) -> np.random.Generator:
    bits = np.random.PCG64(0)
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": inc},
        "has_uint32": 0,  # only doubles are drawn, so there is never half a word left over
        "uinteger": 0,
    }
    return np.random.Generator(bits)


def _fresh_seed() -> int:
    entropy = np.random.SeedSequence().entropy
    assert isinstance(entropy, int)
    return entropy


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise UsageError(f"{name} is {value!r}", where="sampling", allowed=allowed)
