"""Sampling: the distribution, the order of the cuts, independent rows, restorable streams."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import SessionError, UsageError
from dsv4c.runtime import sampling
from dsv4c.runtime.sampling import Sampler, SamplingParams

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15])).astype(np.float32)
INF, NAN = float("inf"), float("nan")


def draw(count: int, logits: np.ndarray = LOGITS, **params: Any) -> np.ndarray:
    """`count` tokens from one row, in order."""
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 1, **params}))
    return np.array([sampler.pick(logits[None])[0] for _ in range(count)])


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic over the tokens of nonzero probability; infinite if an impossible one came."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    if counts[~possible].any():
        return INF
    expected = len(tokens) * probabilities[possible]
    return float(((counts[possible] - expected) ** 2 / expected).sum())


# The statistic exceeds these once in 10,000 seeds, by degrees of freedom (tables of the distribution).
CRITICAL = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 15: 44.26}


def only(*kept: int, temperature: float = 1.0) -> np.ndarray:
    """The distribution of LOGITS when just these tokens are left."""
    p = np.zeros(len(LOGITS))
    p[list(kept)] = np.exp(LOGITS.astype(np.float64) / temperature)[list(kept)]
    return p / p.sum()


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({}, only(0, 1, 2, 3, 4)),
        ({"temperature": 0.5}, only(0, 1, 2, 3, 4, temperature=0.5)),
        ({"temperature": 2.0}, only(0, 1, 2, 3, 4, temperature=2.0)),
        ({"top_k": 2}, only(1, 3)),
        ({"top_k": 4}, only(1, 2, 3, 4)),
        ({"top_p": 0.69}, only(1, 3)),
        ({"top_p": 0.71}, only(1, 3, 4)),
        ({"top_k": 3, "top_p": 0.8}, only(1, 3)),  # 0.7 of the 0.85 that top-k leaves is enough
        ({"top_k": 3, "top_p": 0.83}, only(1, 3, 4)),
    ],
    ids=str,
)
def test_frequencies_follow_the_probabilities(params: dict[str, Any], want: np.ndarray) -> None:
    tokens = draw(20_000, **params)
    assert chi_square(tokens, want) < CRITICAL[np.count_nonzero(want) - 1]


def test_the_statistic_can_fail() -> None:
    """What the tests above would say of a slightly wrong temperature, a lost token, a stuck stream."""
    tokens = draw(20_000)
    assert chi_square(tokens, only(0, 1, 2, 3, 4, temperature=1.1)) > CRITICAL[4]
    assert chi_square(tokens, only(1, 2, 3, 4)) == INF
    assert chi_square(np.full(20_000, 1), only(0, 1, 2, 3, 4)) > CRITICAL[4]


def test_successive_tokens_are_independent() -> None:
    tokens = draw(20_000, np.zeros(4, np.float32))
    pairs = tokens[0::2] * 4 + tokens[1::2]
    assert chi_square(pairs, np.full(16, 1 / 16)) < CRITICAL[15]


def test_rows_are_independent() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    tokens = np.array([sampler.pick(np.zeros((2, 4), np.float32)) for _ in range(10_000)])
    assert chi_square(tokens[:, 0] * 4 + tokens[:, 1], np.full(16, 1 / 16)) < CRITICAL[15]


CUTS = [(3, 0, 0.9), (3, 50, 0.9), (0.1, 0, 0.7), (1, 3000, 0.95), (2, 7, 1.0), (0, 9, 0.5), (1, 0, 1e-9)]


@pytest.mark.parametrize("guess", [1024, 10**6])
@pytest.mark.parametrize(("scale", "top_k", "top_p"), CUTS)
def test_cuts_match_a_plain_implementation(
    scale: float, top_k: int, top_p: float, guess: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same set as a full sort keeps, with and without the short cut; coarse logits make ties."""
    monkeypatch.setattr(sampling, "_TOP_P_GUESS", guess)
    rng = np.random.default_rng(5)
    logits = (np.round(rng.standard_normal(5000) * 4) * scale / 4).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    kept = sampling._kept(logits, sampling._softmax(logits, 1.0), params)
    assert kept.tolist() == plain_cuts(logits, top_k, top_p)


def plain_cuts(logits: np.ndarray, top_k: int, top_p: float) -> list[int]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = [math.exp(float(logits[i] - logits[order[0]])) for i in order]
    kept, goal, reached = [], top_p * math.fsum(weights), 0.0
    for i, weight in zip(order, weights, strict=True):
        kept.append(i)
        reached += weight
        if reached >= goal and top_p < 1:
            break
    return sorted(kept)


# ---------------------------------------------------------------- single cases


def test_temperature_zero_takes_the_largest_and_the_lowest_of_equals() -> None:
    logits = np.array([[0, 7, 7, 1], [-INF, -3, -INF, -3], [2, 2, 2, 2]], np.float32)
    picked = Sampler(SamplingParams()).pick(logits)
    assert picked.tolist() == [1, 1, 0]
    assert picked.dtype == np.int64


def test_tiny_top_p_keeps_one_token() -> None:
    assert set(draw(50, top_p=1e-300)) == {1}
    assert set(draw(50, np.zeros(9, np.float32), top_p=1e-300)) == {0}


def test_top_p_stops_exactly_at_its_share() -> None:
    four = np.zeros(4, np.float32)
    assert set(draw(200, four, top_p=0.5)) == {0, 1}
    assert set(draw(200, four, top_p=0.5 + 1e-9)) == {0, 1, 2}


def test_top_k_takes_the_lowest_of_equals() -> None:
    assert set(draw(200, np.array([0, 1, 0, 1, 1], np.float32), top_k=2)) == {1, 3}


def test_top_k_of_the_whole_vocabulary_changes_nothing() -> None:
    plain = draw(100).tolist()
    assert all(draw(100, top_k=k).tolist() == plain for k in (5, 6, 10**9))


def test_extreme_temperatures() -> None:
    assert set(draw(50, temperature=1e-300)) == {1}
    assert chi_square(draw(5000, temperature=1e300), np.full(5, 0.2)) < CRITICAL[4]


def test_barred_tokens_never_come() -> None:
    logits = np.array([-INF, 0, -INF, 0, -INF], np.float32)
    assert set(draw(500, logits)) == set(draw(500, logits, top_k=4)) == {1, 3}


def test_the_ends_of_the_unit_interval_pick_possible_tokens() -> None:
    logits, params = np.array([-INF, 0, 0.1, -INF], np.float32), SamplingParams(temperature=1.0)
    assert sampling._pick_row(logits, 0.0, params) == 1
    assert sampling._pick_row(logits, 1 - 2**-53, params) == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_types_work(dtype: type) -> None:
    exact = np.array([0, 1, 2, 3], dtype)
    assert draw(50, exact).tolist() == draw(50, exact.astype(np.float32)).tolist()


def test_stop_ids_do_not_change_the_choice() -> None:
    assert draw(50, stop_ids=(1, 3)).tolist() == draw(50).tolist()


# ---------------------------------------------------------------- streams and their state


def batch(rows: int, count: int, sampler: Sampler) -> np.ndarray:
    return np.array([sampler.pick(np.tile(LOGITS, (rows, 1))) for _ in range(count)]).T


def new(seed: int | None = 7) -> Sampler:
    return Sampler(SamplingParams(temperature=1.0, seed=seed))


def test_a_seed_fixes_the_tokens() -> None:
    assert np.array_equal(batch(2, 50, new()), batch(2, 50, new()))
    assert not np.array_equal(batch(2, 50, new()), batch(2, 50, new(8)))


def test_the_streams_are_what_they_were() -> None:
    """A change here changes every seeded text that users have written down."""
    assert batch(2, 12, new()).tolist() == [
        [3, 1, 3, 4, 3, 1, 1, 3, 1, 1, 2, 4],
        [2, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1],
    ]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    alone, crowd = batch(1, 50, new())[0], batch(4, 50, new())
    assert np.array_equal(alone, crowd[0])
    assert not np.array_equal(crowd[0], crowd[1])
    sampler, other = new(), np.random.default_rng(0)
    mixed = [sampler.pick(np.stack([other.random(5, np.float32), LOGITS])) for _ in range(50)]
    assert np.array_equal(np.array(mixed)[:, 1], crowd[1])


def test_rows_may_come_later() -> None:
    sampler, whole = new(), batch(3, 20, new())
    assert np.array_equal(batch(1, 10, sampler)[0], whole[0, :10])
    late = batch(3, 10, sampler)
    assert np.array_equal(late[0], whole[0, 10:])
    assert np.array_equal(late[2], whole[2, :10])


def test_fresh_entropy_differs_and_can_be_repeated() -> None:
    first, second = new(None), new(None)
    tokens = batch(2, 50, first)
    assert not np.array_equal(tokens, batch(2, 50, second))
    assert np.array_equal(tokens, batch(2, 50, new(first.seed)))


def test_state_survives_json() -> None:
    sampler = new()
    batch(2, 9, sampler)
    state = json.loads(json.dumps(sampler.state()))
    want = batch(3, 30, sampler)  # the third row starts after the save
    copy = new(None)
    copy.restore(state)
    assert np.array_equal(batch(3, 30, copy), want)
    assert copy.seed == 7


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        {"seed": "1"},
        {"seed": "x", "rows": []},
        {"seed": "-1", "rows": []},
        {"seed": "1", "rows": 3},
        {"seed": "1", "rows": [["1"]]},
        {"seed": "1", "rows": [["-1", "1"]]},
        {"seed": "1", "rows": [[str(1 << 128), "1"]]},
    ],
    ids=str,
)
def test_a_malformed_state_changes_nothing(state: Any) -> None:
    sampler = new()
    batch(1, 5, sampler)
    before = sampler.state()
    with pytest.raises(SessionError, match="saved sampler state is malformed"):
        sampler.restore(state)
    assert sampler.state() == before


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; allowed: a finite number >= 0"),
        ({"temperature": NAN}, "temperature is nan"),
        ({"temperature": INF}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_k": -1}, "top_k is -1; allowed: an integer >= 0; 0 keeps all"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: a number > 0 and <= 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": NAN}, "top_p is nan"),
        ({"seed": -1}, "seed is -1; allowed: an integer >= 0, or None"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"stop_ids": [1]}, r"stop_ids is \[1\]; allowed: a tuple of token ids"),
        ({"stop_ids": (-1,)}, r"stop_ids is \(-1,\)"),
        ({"stop_ids": 1}, "stop_ids is 1"),
    ],
    ids=str,
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match="^sampling: " + message):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("value", "message"),
    [(NAN, "the logits of row 1 contain NaN"), (INF, r"the logits of row 1 contain \+inf")],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_values_are_refused(value: float, message: str, temperature: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = value
    with pytest.raises(SessionError, match=message):
        Sampler(SamplingParams(temperature=temperature)).pick(logits)


def test_nothing_left_to_pick_is_refused() -> None:
    with pytest.raises(SessionError, match="the logits of row 0 are all -inf"):
        Sampler(SamplingParams()).pick(np.full((1, 4), -INF, np.float32))


def test_a_refused_call_draws_nothing() -> None:
    sampler, other = new(), new()
    with pytest.raises(SessionError):
        sampler.pick(np.full((1, 5), NAN, np.float32))
    assert np.array_equal(batch(1, 20, sampler), batch(1, 20, other))


@pytest.mark.parametrize(
    ("logits", "got"),
    [
        (np.zeros(4, np.float32), r"float32\[4\]"),
        (np.zeros((1, 2, 3), np.float32), r"float32\[1, 2, 3\]"),
        (np.zeros((2, 0), np.float32), r"float32\[2, 0\]"),
        (np.zeros((2, 4), np.uint16), r"uint16\[2, 4\]"),
        ([[0.0, 1.0]], "list"),
    ],
    ids=str,
)
def test_bad_arrays(logits: Any, got: str) -> None:
    with pytest.raises(UsageError, match=f"the logits are {got}; allowed: floating point"):
        Sampler(SamplingParams()).pick(logits)


def test_an_empty_batch_is_an_empty_answer() -> None:
    assert new().pick(np.zeros((0, 4), np.float32)).shape == (0,)
