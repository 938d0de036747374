"""Hyper-connections, attention, compressor and indexer of the evaluator: numbers worked out by hand."""

from __future__ import annotations

from math import cos, e, exp, log, sin, sqrt

import numpy as np
from support import CTX, Arr, B, Case, T


def value(case: Case, **inputs: object) -> Arr:
    """The only output of a case."""
    (found,) = case.meaning({k: np.asarray(v) for k, v in inputs.items()}).values()
    return found


def close(found: Arr, want: object) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------- hyper-connections


def hyper(fn: Arr, base: Arr, scale: tuple[float, ...] = (1, 1, 1)) -> tuple[Arr, Arr, Arr]:
    c = Case()
    streams = c.f32("streams", B, T, 4, 1)
    weights = (
        c.weight_of(n, np.asarray(v, np.float32)) for n, v in (("fn", fn), ("base", base), ("scale", scale))
    )
    outs = ("pre", "post", "comb")
    c.multi("hc_mix", streams, *weights, outs=outs, eps=1e-6, norm_eps=1e-6, iters=20)
    found = c.meaning({"streams": np.array([[[[1.0], [2.0], [2.0], [4.0]]]])})
    return found["pre"][0, 0], found["post"][0, 0], found["comb"][0, 0]


SINKHORN = [
    [0.624915, 0.007592, 0.026583, 0.337523],
    [0.374518, 0.029539, 0.043294, 0.549717],
    [0.000049, 0.083310, 0.921243, 0.000021],
    [0.000518, 0.879559, 0.008879, 0.112737],
]
LOGITS = [[6, -6, 0, 0], [5, -5, 0, 0], [0, 0, 7, -7], [1, 1, 1, 1]]


def test_sinkhorn_vector_of_the_specification() -> None:
    """Section 4: m_8.. are these rows, scale 1, base 0; here they come as base and m is 0."""
    base = np.concatenate([np.zeros(8), np.ravel(LOGITS)])
    pre, post, comb = hyper(np.zeros((24, 4)), base)
    np.testing.assert_allclose(comb, SINKHORN, atol=6e-7)
    np.testing.assert_allclose(comb.sum(axis=0), np.full(4, 1 - 1e-6), atol=1e-8)  # ends on columns
    close(pre, np.full(4, 0.5 + 1e-6))
    close(post, np.ones(4))


def test_mixing_normalises_after_the_projection() -> None:
    """x = (1, 2, 2, 4), so rho = (25/4 + eps)^-1/2; row i of fn picks one stream."""
    fn, rho = np.zeros((24, 4)), 1 / sqrt(25 / 4 + 1e-6)
    fn[0, 3], fn[5, 1] = 0.5, 1.0
    fn[8:] = np.ravel(LOGITS)[:, None] / (1.0 * rho) * [1, 0, 0, 0]
    pre, post, comb = hyper(fn, np.zeros(24), (3.0, 2.0, 1.0))
    sigmoid = lambda v: 1 / (1 + exp(-v))  # noqa: E731
    np.testing.assert_allclose(pre, [sigmoid(0.5 * 4 * rho * 3) + 1e-6, *[0.5 + 1e-6] * 3], rtol=1e-7)
    np.testing.assert_allclose(post, [1, 2 * sigmoid(2 * rho * 2), 1, 1], rtol=1e-7)
    np.testing.assert_allclose(comb, SINKHORN, atol=2e-6)


def test_expand_sums_over_the_first_index_of_comb() -> None:
    c = Case()
    x, y = c.f32("x", B, T, 2, 1), c.f32("y", B, T, 1)
    c.op("hc_expand", x, y, c.f32("post", B, T, 2), c.f32("comb", B, T, 2, 2))
    comb = [[[[10.0, 1.0], [100.0, 1000.0]]]]
    found = value(c, x=[[[[1.0], [2.0]]]], y=[[[7.0]]], post=[[[3.0, 5.0]]], comb=comb)
    close(found, [[[[21 + 10 + 200], [35 + 1 + 2000]]]])


def test_collapse_and_head() -> None:
    c = Case()
    c.op("hc_collapse", c.f32("x", B, T, 2, 2), c.f32("pre", B, T, 2))
    close(value(c, x=[[[[1.0, 2.0], [3.0, 4.0]]]], pre=[[[10.0, 0.5]]]), [[[11.5, 22.0]]])
    c = Case()
    weights = (c.weight_of(n, np.array(v, np.float32)) for n, v in
               (("fn", [[1, 0], [0, 2]]), ("base", [0, 0.5]), ("scale", [2])))  # fmt: skip
    c.op("hc_head_mix", c.f32("x", B, T, 2, 1), *weights, eps=1e-6, norm_eps=0.0)
    found = value(c, x=[[[[3.0], [4.0]]]])  # rho = (25/2)^-1/2
    rho = 1 / sqrt(12.5)
    close(found[0, 0], [1 / (1 + exp(-6 * rho)) + 1e-6, 1 / (1 + exp(-16 * rho - 0.5)) + 1e-6])


# -------------------------------------------------------------------------------------- attention


def attend(window: int, kv: list[float], ring: list[float], pos: int, **more: object) -> Arr:
    """One head of width 1 with q = 0: every visible key weighs 1 and the sink exp(log 3) = 3."""
    c = Case()
    operands = [c.f32("q", B, T, 1, 1), c.f32("kv", B, T, 1), c.f32("ring", B, window, 1)]
    operands += [c.weight_of("sink", np.array([log(3)], np.float32)), c.i32("pos", B), c.i32("n_valid", B)]
    if "entries" in more:
        operands.append(c.f32("entries", B, CTX // 2, 1))
    if "selected" in more:
        operands.append(c.i32("selected", B, T, 2))
    c.op("attention", *operands, scale=1.0, window=window, ratio=2 if "entries" in more else 0)
    q = np.zeros((1, len(kv), 1, 1))
    found = value(c, q=q, kv=np.reshape(kv, (1, -1, 1)), ring=np.reshape(ring, (1, -1, 1)), pos=[pos],
                  n_valid=[len(kv)], **more)  # fmt: skip
    return found[0, :, 0, 0]


def test_the_sink_only_enters_the_denominator() -> None:
    np.testing.assert_allclose(attend(4, [6.0, 9.0], [0, 0, 0, 0], 0), [6 / 4, 15 / 5], rtol=1e-6)


def test_the_window_joins_ring_and_call() -> None:
    """Position p lies in slot p mod 3; position 4 sees 2 (slot 2), 3 (slot 0), 4; position 5 sees 3, 4, 5."""
    found = attend(3, [40.0, 50.0], [30.0, -99.0, 20.0], 4)
    np.testing.assert_allclose(found, [(20 + 30 + 40) / 6, (30 + 40 + 50) / 6], rtol=1e-6)


def test_entries_are_visible_to_the_token_that_closes_them() -> None:
    """Ratio 2, window 1: position t sees (t + 1) // 2 entries besides itself."""
    entries = np.reshape([100.0, 200.0, 300.0], (1, 3, 1))
    found = attend(1, [1.0, 2.0, 3.0, 4.0], [0.0], 0, entries=entries)
    np.testing.assert_allclose(found, [1 / 4, 102 / 5, 103 / 5, 304 / 6], rtol=1e-6)


def test_only_selected_entries_count() -> None:
    entries = np.reshape([100.0, 200.0, 300.0], (1, 3, 1))
    selected = [[[-1, -1], [0, -1], [0, -1], [1, 0]]]
    found = attend(1, [1.0, 2.0, 3.0, 4.0], [0.0], 0, entries=entries, selected=selected)
    np.testing.assert_allclose(found, [1 / 4, 102 / 5, 103 / 5, 304 / 6], rtol=1e-6)
    selected = [[[-1, -1], [-1, -1], [0, -1], [1, -1]]]
    found = attend(1, [1.0, 2.0, 3.0, 4.0], [0.0], 0, entries=entries, selected=selected)
    np.testing.assert_allclose(found, [1 / 4, 2 / 4, 103 / 5, 204 / 5], rtol=1e-6)


def test_logits_are_scaled_and_the_sink_is_not() -> None:
    c = Case()
    sink = c.weight_of("sink", np.array([1.0], np.float32))
    operands = (c.f32("q", B, T, 1, 2), c.f32("kv", B, T, 2), c.f32("ring", B, 1, 2), sink, c.i32("pos", B))
    c.op("attention", *operands, c.i32("n_valid", B), scale=0.5, window=1, ratio=0)
    found = value(c, q=[[[[2.0, 4.0]]]], kv=[[[1.0, 0.5]]], ring=[[[0.0, 0.0]]], pos=[7], n_valid=[1])
    weight = exp(2) / (exp(2) + e)
    np.testing.assert_allclose(found, [[[[weight, weight / 2]]]], rtol=1e-7)


def test_rotary_turns_the_last_pairs() -> None:
    c = Case()
    cs = c.f32("cos", B, T, 1), c.f32("sin", B, T, 1)
    x = c.f32("x", B, T, 3)
    c.op("rotary", x, *cs, out="forward")
    c.op("rotary", x, *cs, out="back", inverse=True)
    found = c.meaning(
        {"x": np.array([[[9.0, 2.0, 5.0]]]), "cos": np.array([[[0.6]]]), "sin": np.array([[[0.8]]])}
    )
    close(found["forward"], [[[9, 2 * 0.6 - 5 * 0.8, 2 * 0.8 + 5 * 0.6]]])
    close(found["back"], [[[9, 2 * 0.6 + 5 * 0.8, -2 * 0.8 + 5 * 0.6]]])


def test_rope_angles() -> None:
    c = Case()
    c.multi(
        "rope_angles", c.i32("p", B, T), c.weight_of("f", np.array([1, 0.5], np.float32)), outs=("cos", "sin")
    )
    found = c.meaning({"p": np.array([[0, 3]])})
    close(found["cos"], [[[1, 1], [cos(3), cos(1.5)]]])
    close(found["sin"], [[[0, 0], [sin(3), sin(1.5)]]])


# ------------------------------------------------------------------------------ compressor, indexer


def compressed(overlap: bool, gates: list[float], kv: list[float], pos: int = 0) -> Arr:
    """Ratio 2; with overlap the channels are (first half, second half) = (100 + kv, kv)."""
    c = Case()
    width = 2 if overlap else 1
    names = [("kv", T), ("gate", T), ("kv_ring", 2 * width), ("gate_ring", 2 * width)]
    operands = [c.f32(n, B, rows, width) for n, rows in names]
    c.op("compress", *operands, c.i32("pos", B), c.i32("n_valid", B), ratio=2, overlap=overlap)
    both = [[100 + v, v][-width:] for v in kv]
    gate = [[g] * width for g in gates]
    ring = np.zeros((1, 2 * width, width))
    found = value(c, kv=[both], gate=[gate], kv_ring=ring, gate_ring=ring, pos=[pos], n_valid=[len(kv)])
    return found[0, :, 0]


def test_without_overlap_a_group_is_its_own_softmax() -> None:
    close(compressed(False, [0, log(3), 5, 5, 5], [1.0, 2.0, 3.0, 4.0, 9.0]), [(1 + 3 * 2) / 4, 3.5, 0])


def test_group_zero_has_no_group_before_it() -> None:
    """Entry 0 is its two rows by their second halves; entry 1 adds rows 0 and 1 by their first halves."""
    found = compressed(True, [0, 0, log(2), 0], [1.0, 2.0, 3.0, 4.0])
    close(found, [(1 + 2) / 2, (101 + 102 + 2 * 3 + 4) / 5])


def test_a_group_that_began_in_an_earlier_call_reads_the_ring() -> None:
    c = Case()
    operands = [c.f32(n, B, rows, 1) for n, rows in (("kv", T), ("gate", T), ("kr", 2), ("gr", 2))]
    c.op("compress", *operands, c.i32("pos", B), c.i32("n_valid", B), ratio=2, overlap=False)
    zero = np.zeros((1, 2, 1))
    ring = np.array([[[8.0], [-99.0]]])  # position 2 lies in slot 0
    found = value(c, kv=[[[1.0], [2.0]]], gate=zero, kr=ring, gr=zero, pos=[3], n_valid=[1])
    close(found[0, :, 0], [(8 + 1) / 2])  # position 3 closes the group of 2 and 3; the padding closes nothing


def test_position_bias_goes_round() -> None:
    c = Case()
    c.op("position_bias", c.f32("x", B, T, 1), c.weight_of("ape", np.array([[10], [20], [30]], np.float32)),
         c.i32("pos", B))  # fmt: skip
    close(value(c, x=[[[1.0], [2.0], [3.0]]], pos=[4]), [[[21], [32], [13]]])


def test_index_scores_rectify_each_head() -> None:
    c = Case()
    operands = (c.f32("q", B, T, 2, 1), c.f32("w", B, T, 2), c.f32("keys", B, CTX // 2, 1))
    c.op("index_scores", *operands, c.i32("pos", B), c.i32("n_valid", B), ratio=2)
    found = value(c, q=[[[[1.0], [-1.0]]] * 3], w=[[[10.0, 100.0]] * 3], keys=[[[2.0], [-3.0]]], pos=[1],
                  n_valid=[2])  # fmt: skip
    close(found, [[[20, -np.inf], [20, -np.inf], [-np.inf, -np.inf]]])  # token 2 is padding
    found = value(c, q=[[[[1.0], [-1.0]]]], w=[[[10.0, 100.0]]], keys=[[[2.0], [-3.0]]], pos=[3], n_valid=[1])
    close(found, [[[20, 300]]])


def test_index_topk_prefers_the_lower_id() -> None:
    c = Case()
    c.op("index_topk", c.f32("s", B, T, CTX), k=3)
    low = -np.inf
    scores = [[[1, 5, 5, 5, 5], [0.0, -0.0, 0.0, -0.0, 1], [low, 2, low, low, 3], [low] * 5]]
    found = value(c, s=np.array(scores, float))
    assert [set(row) for row in found[0]] == [{1, 2, 3}, {4, 0, 1}, {1, 4, -1}, {-1}]
    assert found[0, 2].tolist()[-1] == -1, "missing ones stand at the end"
    assert value(c, s=np.zeros((1, 1, 2))).tolist() == [[[0, 1, -1]]]  # fewer entries than k
