"""What V4.1 adds to the text model, as the evaluator means it: numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support import CTX, Arr, B, Case, T

from dsv4c.ir.graph import Value

LOW = -np.inf


def only(case: Case, **inputs: object) -> Arr:
    """The only output of a case."""
    (found,) = case.meaning({k: np.asarray(v) for k, v in inputs.items()}).values()
    return found


# ---------------------------------------------------------------------------------- candidate blocks


def blocks(
    scores: object, pos: list[int], n_valid: list[int], ratio: int = 1, size: int = 2, count: int = 2
) -> list[list[list[int]]]:
    c = Case()
    operands = c.f32("s", B, T, CTX), c.i32("pos", B), c.i32("n", B)
    c.op("candidate_blocks", *operands, ratio=ratio, size=size, count=count)
    found: list[list[list[int]]] = only(c, s=np.array(scores, float), pos=pos, n=n_valid).tolist()
    return found


def test_a_block_is_worth_its_best_entry() -> None:
    """Bests of blocks of two are 5, 6, 4, and the newest; block 1 wins by one entry, block 0 by none."""
    assert blocks([[[5, 5, -9, 6, 4, 4, -8, -8]]], [7], [1]) == [[[1, 3]]]


def test_equal_blocks_go_to_the_lower_id() -> None:
    scores = [[[0, 3, 3, 0, 3, 1, 0, 0]]]  # bests 3, 3, 3, newest
    assert blocks(scores, [7], [1]) == [[[0, 3]]]
    assert blocks(scores, [7], [1], count=3) == [[[0, 1, 3]]]
    assert blocks(np.zeros((1, 1, 8)), [7], [1], count=3) == [[[0, 1, 3]]], "and when all scores are zero"


def test_the_newest_block_is_pinned_where_the_newest_entry_lies() -> None:
    """Nine entries in blocks of four: the third block has one entry, the worst of all, and is taken."""
    scores = [[[1, 2, 3, 4, 5, 6, 7, 8, -100, 99, 99, 99]]]
    assert blocks(scores, [8], [1], size=4) == [[[1, 2]]]
    assert blocks(scores, [7], [1], size=4) == [[[0, 1]]]  # eight entries end with the second block
    assert blocks(scores, [8], [1], size=4, count=1) == [[[2]]]


def test_entries_that_are_not_visible_do_not_count() -> None:
    """Position t sees (t + 1) // 2 entries; the scores behind them are larger, or NaN."""
    scores = [[[1, 2, 9, 9, 9, 9], [3, 0, 1, 9, 9, 9], [0, 1, 5, np.nan, np.nan, np.nan]]]
    assert blocks(scores, [3], [3], ratio=2, size=1) == [[[0, 1], [0, 1], [1, 2]]]


def test_fewer_blocks_than_asked_for_leave_minus_one_at_the_end() -> None:
    assert blocks([[[1, 2, 3, LOW]]], [2], [1], count=4) == [[[0, 1, -1, -1]]]
    assert blocks([[[LOW] * 4]], [0], [1], ratio=2) == [[[-1, -1]]], "no entry is visible yet"


def test_padding_has_no_candidates() -> None:
    scores = np.ones((2, 2, 4))
    assert blocks(scores, [3, 2], [0, 1]) == [[[-1, -1], [-1, -1]], [[0, 1], [-1, -1]]]


def test_a_block_without_a_finite_score_is_no_candidate() -> None:
    """Unless it is the newest."""
    assert blocks([[[LOW, LOW, 1, LOW, LOW, LOW]]], [5], [1], count=3) == [[[1, 2, -1]]]


# ------------------------------------------------------------------------------------- restriction


def test_scores_outside_the_blocks_are_lost() -> None:
    """Blocks of two of five entries: the last is half there, and -1 restricts to nothing."""
    c = Case()
    c.op("index_restrict", c.f32("s", B, T, CTX), c.i32("blocks", B, T, 2), size=2)
    scores = [[[1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5], [1.0, 2, 3, LOW, LOW]]]
    found = only(c, s=scores, blocks=[[[0, 2], [-1, -1], [1, -1]]])
    assert found.tolist() == [[[1, 2, LOW, LOW, 5], [LOW] * 5, [LOW, LOW, 3, LOW, LOW]]]


def index_inputs(keys: list[float], pos: int) -> dict[str, object]:
    """One head of width 1 with q = w = 1: an entry's score is its key, or 0 below zero."""
    return {"q": [[[[1.0]]]], "w": [[[1.0]]], "keys": np.reshape(keys, (1, -1, 1)), "pos": [pos], "n": [1]}


def index_operands(c: Case) -> tuple[Value, ...]:
    q, w, keys = c.f32("q", B, T, 1, 1), c.f32("w", B, T, 1), c.f32("keys", B, CTX, 1)
    return q, w, keys, c.i32("pos", B), c.i32("n", B)


KEYS = [9.0, 1, 3, 2, 8, 8, 0, 4]


@pytest.mark.parametrize(
    ("pos", "listed", "want"),
    [(7, [0, 1], {0, 2}),  # 9 1 3 2
     (7, [1, 3], {2, 7}),  # 3 2 0 4
     (7, [2, 3], {4, 5}),  # 8 8 0 4
     (4, [1, 2], {4, 2}),  # 3 2 8, the rest of block 2 is not there yet
     (4, [2, -1], {4, -1}),
     (7, [-1, -1], {-1})],
)  # fmt: skip
def test_a_restricted_selection_is_the_best_of_its_blocks(
    pos: int, listed: list[int], want: set[int]
) -> None:
    c = Case()
    c.op("index_select", *index_operands(c), c.i32("blocks", B, T, 2), ratio=1, k=2, size=2)
    found = only(c, **index_inputs(KEYS, pos), blocks=[[listed]])[0, 0].tolist()
    assert set(found) == want and len(found) == 2
    assert sorted(found, key=lambda i: i < 0) == found, "missing ones stand at the end"


def test_candidates_are_chosen_beside_an_unrestricted_selection() -> None:
    """Of blocks (9 1) (3 2) (8 8) (0 4): the best two entries, and the best block beside the newest."""
    c = Case()
    c.multi("index_candidates", *index_operands(c), outs=("ids", "blocks"), ratio=1, k=2, size=2, count=2)
    found = c.meaning({k: np.asarray(v) for k, v in index_inputs(KEYS, 7).items()})
    assert set(found["ids"][0, 0].tolist()) == {0, 4} and found["blocks"].tolist() == [[[0, 3]]]
    found = c.meaning({k: np.asarray(v) for k, v in index_inputs(KEYS, 0).items()})
    assert found["ids"].tolist() == [[[0, -1]]] and found["blocks"].tolist() == [[[0, -1]]]


# ------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("shape", [(2, 3, 10), (2, 3, 2, 9)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotary_by_halves_is_a_complex_product(shape: tuple[int, ...], inverse: bool) -> None:
    """Channel i of the last eight is the real part and channel i + 4 the imaginary part of a number."""
    rng = np.random.default_rng(1)
    x, angle = rng.standard_normal(shape), rng.uniform(-9, 9, (2, 3, 4))
    c = Case()
    c.op("rotary", c.f32("x", B, T, *shape[2:]), c.f32("cos", B, T, 4), c.f32("sin", B, T, 4), halves=True,
         inverse=inverse)  # fmt: skip
    found = only(c, x=x, cos=np.cos(angle), sin=np.sin(angle))
    turn = np.exp((-1j if inverse else 1j) * angle).reshape(2, 3, *[1] * (len(shape) - 3), 4)
    turned = (x[..., -8:-4] + 1j * x[..., -4:]) * turn
    np.testing.assert_allclose(found[..., -8:], np.concatenate([turned.real, turned.imag], -1), rtol=1e-12)
    np.testing.assert_array_equal(found[..., :-8], x[..., :-8])


def test_rotary_pairs_neighbours_unless_told_otherwise() -> None:
    """A quarter turn of (1, 2, 3, 4): the pairs are (1, 2) and (3, 4), or (1, 3) and (2, 4)."""
    for halves, want in ((False, [-2, 1, -4, 3]), (True, [-3, -4, 1, 2])):
        c = Case()
        c.op("rotary", c.f32("x", B, T, 4), c.f32("cos", B, T, 2), c.f32("sin", B, T, 2), halves=halves)
        found = only(c, x=[[[1.0, 2, 3, 4]]], cos=[[[0.0, 0]]], sin=[[[1.0, 1]]])
        np.testing.assert_array_equal(found, [[want]])


# ------------------------------------------------------------------------------------------ routing


def router_biases(c: Case, text: list[float], image: list[float]) -> tuple[Value, Value]:
    return c.weight_of("text", np.array(text, np.float32)), c.weight_of("image", np.array(image, np.float32))


def test_image_tokens_choose_experts_by_a_bias_of_their_own() -> None:
    """Sums are (1 5 3) at a text token and (3 4 9) at an image token, 77; the second row ties at 2."""
    c = Case()
    text, image = router_biases(c, [0, 3, 0], [2, 2, 6])
    c.op("route_topk", c.f32("s", B, T, 3), text, c.i32("tokens", B, T), image, k=2, image_token=77)
    scores = [[[1.0, 2, 3], [1, 2, 3], [1, 2, 3]], [[6, 6, 2], [5, -1, 2], [0, 0, -4]]]
    found = only(c, s=scores, tokens=[[5, 77, -77], [77, 5, 77]])
    assert found.tolist() == [[[1, 2], [2, 1], [1, 2]], [[0, 1], [0, 1], [0, 1]]]


def test_no_token_is_an_image_without_an_image_token() -> None:
    c = Case()
    text, image = router_biases(c, [0, 1], [9, 0])
    c.op("route_topk", c.f32("s", B, T, 2), text, c.i32("tokens", B, T), image, k=1)
    assert only(c, s=[[[0.0, 0], [0, 0]]], tokens=[[0, 1]]).tolist() == [[[1], [1]]]


# -------------------------------------------------------------------------------- hyper-connections


def border(name: str, inputs: dict[str, Arr], given: bool) -> dict[str, Arr]:
    """Two streams of width 2 and a projection of zeros: the mix gives pre = 1/2, post = 1, comb = 1/2."""
    c = Case()
    zeros = [c.weight_of(n, np.zeros(s, np.float32)) for n, s in (("fn", (8, 4)), ("base", 8), ("scale", 3))]
    operands = [c.f32("x", B, T, 2, 2)]
    if name == "hc_post_pre":
        operands += [c.f32("y", B, T, 2), c.f32("post", B, T, 2), c.f32("comb", B, T, 2, 2)]
    operands += [*zeros, c.weight_of("w", np.array([1, 10], np.float32))]
    operands += [c.f32("pre", B, T, 2)] if given else []
    outs = (*(("z",) if name == "hc_post_pre" else ()), "normed", "next post", "next comb", "own")
    c.multi(name, *operands, outs=outs, eps=0.0, norm_eps=1.0, iters=2, out_eps=0.0)
    return c.meaning(inputs)


STREAMS = np.array([[[[1.0, 0.0], [0.0, 2.0]]]])
HALVES = np.full((1, 1, 2, 2), 0.5)


def test_weights_from_outside_collapse_and_those_of_the_mix_are_handed_on() -> None:
    """3 (1, 0) + 2 (0, 2) = (3, 4), whose root mean square is sqrt(12.5)."""
    found = border("hc_pre", {"x": STREAMS, "pre": np.array([[[3.0, 2.0]]])}, given=True)
    np.testing.assert_allclose(found["normed"], [[np.array([3, 40]) / np.sqrt(12.5)]], rtol=1e-12)
    np.testing.assert_allclose(found["own"], [[[0.5, 0.5]]], rtol=1e-12)
    np.testing.assert_allclose(found["next post"], [[[1, 1]]], rtol=1e-12)
    np.testing.assert_allclose(found["next comb"], HALVES, rtol=1e-12)
    without = border("hc_pre", {"x": STREAMS}, given=False)
    np.testing.assert_allclose(without["normed"], [[np.array([1, 20]) / np.sqrt(2.5)]], rtol=1e-12)
    assert "own" not in without


def test_weights_from_outside_collapse_the_expanded_streams() -> None:
    """Expanded by post (1, 0) and a comb that swaps: (10, 20) + (0, 2) and (1, 0); the second is taken."""
    inputs = {"x": STREAMS, "y": np.array([[[10.0, 20.0]]]), "post": np.array([[[1.0, 0.0]]]),
              "comb": np.array([[[[0.0, 1.0], [1.0, 0.0]]]]), "pre": np.array([[[0.0, 1.0]]])}  # fmt: skip
    found = border("hc_post_pre", inputs, given=True)
    np.testing.assert_allclose(found["z"], [[[[10, 22], [1, 0]]]], rtol=1e-12)
    np.testing.assert_allclose(found["normed"], [[[np.sqrt(2), 0]]], rtol=1e-12)
    np.testing.assert_allclose(found["own"], [[[0.5, 0.5]]], rtol=1e-12)
    without = border("hc_post_pre", inputs, given=False)
    np.testing.assert_allclose(without["normed"], [[np.array([5.5, 110]) / np.sqrt((5.5**2 + 121) / 2)]])
    assert "own" not in without
