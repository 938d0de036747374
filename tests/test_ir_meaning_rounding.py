"""Rounding rules and rounded ops of the evaluator: the specification's vector, numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import Arr, B, Case, T, ints

from dsv4c.ir.dtypes import E2M1, DType, bf16_to_f32, decode
from dsv4c.ir.meaning.quantise import E2M1_FLOOR, E4M3_FLOOR, ONE_6TH, ONE_448TH, bf16, power_of_two

EVERY_BF16 = bf16_to_f32(np.arange(1, 0x7F80, dtype=np.uint16))
"""Every finite positive number."""


def rounded(x: Any, rule: str, precision: type = np.float32, **attrs: int) -> Arr:
    """The last axis through `round_values`."""
    c, values = Case(), np.asarray(x, np.float64)
    c.op("round_values", c.f32("x", B, T, values.shape[-1]), rule=rule, **attrs)
    flat = values.reshape(1, -1, values.shape[-1])
    return c.meaning({"x": flat}, precision)["round_values"].reshape(values.shape)


# -------------------------------------------------------------------------------- section 7 and 3.1

VALUES = [0, .1, -.2, .3, .7, 1.1, -1.3, 2.6, 3.3, -4.9, 5.1, .01, -.02, .6, 1.9, -7.25]  # fmt: skip
VECTOR = bf16(np.array(VALUES * 2))
AS_E4M3 = [0, .1015625, -.203125, .3125, .6875, 1.125, -1.25, 2.5, 3.25, -5, 5, .009765625, -.01953125, .625,
           1.875, -7]  # fmt: skip
AS_E2M1 = [0, 0, -0.0, 0, 1, 1, -1, 3, 3, -4, 6, 0, -0.0, 1, 2, -8]


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_the_vector_of_the_specification(precision: type) -> None:
    for rule, want in (("e4m3", AS_E4M3), ("e2m1", AS_E2M1)):
        found = rounded(VECTOR, rule, precision, block=32)
        np.testing.assert_array_equal(found, want * 2)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(want * 2))


RULES = [(448, ONE_448TH, E4M3_FLOOR), (6, ONE_6TH, E2M1_FLOOR)]


@pytest.mark.parametrize(("top", "reciprocal", "floor"), RULES)
def test_scales_are_exact_ceilings_for_every_bf16_amax(top: int, reciprocal: Any, floor: Any) -> None:
    """Multiplying by the FP32 reciprocal gives the same power of two as dividing without rounding."""
    amax = np.maximum(EVERY_BF16, floor)
    mantissa, exponent = np.frexp(amax.astype(np.float64) / top)
    want = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    np.testing.assert_array_equal(power_of_two(amax * reciprocal), want)


# ------------------------------------------------------------------------------------------- codes


AS_E2M1_E4M3 = [0, 0, -0.0, 0, .625, 1.25, -1.25, 2.5, 3.75, -5, 5, 0, -0.0, .625, 1.875, -7.5]  # fmt: skip


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_the_vector_of_v41(precision: type) -> None:
    """Blocks of 16 under a scale of 1.25, the nearest E4M3 number to 7.25 / 6."""
    found = rounded(VECTOR, "e2m1_e4m3", precision, block=16)
    np.testing.assert_array_equal(found, AS_E2M1_E4M3 * 2)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(AS_E2M1_E4M3 * 2))


def test_scales_in_e4m3_for_every_bf16_amax() -> None:
    """The largest value of a block is code 6 of the E4M3 number nearest to a sixth of it, by a table."""
    amax = EVERY_BF16[(EVERY_BF16 > 2.0**-20) & (EVERY_BF16 < 2.0**13)]
    found = rounded(np.stack([amax, np.zeros_like(amax)], axis=-1), "e2m1_e4m3", block=2)[:, 0]
    table = decode(np.arange(1, 127, dtype=np.uint8), DType.F8E4M3).astype(np.float64)
    sixth = np.maximum(amax.astype(np.float64), 6 * 2.0**-9) / 6
    above = np.searchsorted(table, np.minimum(sixth, 448)).clip(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    even = np.where((above + 1) % 2 == 0, high, low)  # table[i] is code i + 1
    scale = np.where(sixth * 2 == low + high, even, np.where(sixth * 2 < low + high, low, high))
    scale = np.where(sixth >= 448, 448, scale)
    codes = E2M1[:8].astype(np.float64)
    nearest = np.abs(np.minimum(amax / scale, 6)[:, None] - codes)
    tie = np.isclose(np.sort(nearest, axis=1)[:, 0], np.sort(nearest, axis=1)[:, 1], rtol=0, atol=0)
    np.testing.assert_array_equal(found[~tie], (codes[nearest.argmin(axis=1)] * scale)[~tie])
    assert tie.mean() < 0.05


@pytest.mark.parametrize(("rule", "top"), [("e4m3", 448.0), ("e2m1", 6.0)])
def test_every_code_stays_and_every_midpoint_goes_to_the_even_one(rule: str, top: float) -> None:
    """Beside the largest code the scale is 1, so values are codes; a code's parity is its lowest bit."""
    table = decode(np.arange(127, dtype=np.uint8), DType.F8E4M3) if rule == "e4m3" else E2M1[:8]
    codes = table.astype(np.float64)
    pair = np.stack([codes, np.full(len(codes), top)], axis=-1)
    np.testing.assert_array_equal(rounded(pair, rule), pair)
    np.testing.assert_array_equal(rounded(-pair, rule), -pair)
    middle = (codes[1:] + codes[:-1]) / 2
    even = np.where(np.arange(len(middle)) % 2 == 0, codes[:-1], codes[1:])
    for nudge, want in ((0, even), (-1e-6, codes[:-1]), (1e-6, codes[1:])):
        x = np.stack([middle * (1 + nudge), np.full(len(middle), top)], axis=-1)
        np.testing.assert_array_equal(rounded(x, rule)[:, 0], want)


def test_floors_of_the_scales() -> None:
    """An amax of 2e-5 is scaled as 1e-4 is, by P(1e-4/448) = 2^-22; the second value is a subnormal code."""
    np.testing.assert_array_equal(rounded([2e-5, 3e-9], "e4m3"), [2**-22 * 80, 2**-31 * 6])
    np.testing.assert_array_equal(rounded([0.0, 2.0**-140], "e2m1"), [0, 0])
    np.testing.assert_array_equal(rounded([2.0**-9, 2.0**-11], "e2m1_e4m3"), [2**-9, 0])
    np.testing.assert_array_equal(rounded([1e6, 448.0], "e2m1_e4m3"), [448 * 6, 448])


def test_int8_is_symmetric_with_one_scale_a_row() -> None:
    np.testing.assert_array_equal(rounded([127, 2.5, -3.5, 0.4], "int8"), [127, 2, -4, 0])
    np.testing.assert_array_equal(rounded([[0, 0], [1, -254]], "int8"), [[0, 0], [0, -254]])


def test_bf16_by_way_of_float32() -> None:
    """1 + 2^-8 is a tie and goes to even; what float64 has above it is lost in the float32 cast."""
    x = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 + 2**-40]
    np.testing.assert_array_equal(rounded(x, "bf16", np.float64), [1, 1 + 2**-6, 1 + 2**-7, 1])


def test_fp16_ends_at_65504_and_at_its_subnormals() -> None:
    x = [1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, -1e9, 2**-24 * 1.5, 2**-25, np.nan]
    want = [1, 1 + 2**-9, 65504, np.inf, -np.inf, 2**-23, 0, np.nan]
    for precision in (np.float32, np.float64):
        np.testing.assert_array_equal(rounded(x, "fp16", precision), want)


def test_blocks_and_channels() -> None:
    """With a scale of 2^-6 or less 0.0105 becomes 11/1024; beside 448 it is 5/512, a subnormal code."""
    x = np.array([448, 1.01, 4.48, 0.0105, 0.0105, 0.0105], np.float32)
    near, far = 11 / 1024, 5 / 512
    np.testing.assert_array_equal(rounded(x, "e4m3", block=2, channels=5), [448, 1, 4.5, near, near, x[5]])
    np.testing.assert_array_equal(rounded(x, "e4m3", channels=5), [448, 1, 4.5, far, far, x[5]])
    assert rounded(x, "bf16", channels=1)[1] == np.float32(1.01)


def test_hadamard_is_sylvesters() -> None:
    c = Case()
    c.op("hadamard", c.f32("x", B, T, 4))
    found = c.meaning({"x": np.eye(4)[None] * 3})["hadamard"][0]
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(found, np.array(signs) * 1.5)


# ------------------------------------------------------------------------------------------ ops


def test_unit_norm_rounds_every_step() -> None:
    """Squares 1 and 1.01568.. -> 1.015625, mean 1.0078125, the inverse of its root .99612.. -> .99609375."""
    c = Case()
    c.op("unit_norm", c.f32("x", B, T, 2), eps=1e-6, rounding="reference")
    found = c.meaning({"x": np.array([[[1, 1.0078125]]])})["unit_norm"][0, 0]
    np.testing.assert_array_equal(found, [0.99609375, 1.0])


def test_index_scores_round_three_times() -> None:
    """Dot 1 + 2^-8 -> 1; 1 x 1.0078125 stays; second head 3 x 85 = 255; 256.0078 -> 256."""
    c = Case()
    operands = [c.f32("q", B, T, 2, 2), c.f32("w", B, T, 2), c.f32("k", B, 1, 2)]
    c.op("index_scores", *operands, c.i32("pos", B), c.i32("n_valid", B), ratio=1, rounding="reference")
    inputs = {
        "q": np.array([[[[1, 2**-8], [1, 2]]]]), "w": np.array([[[1.0078125, 85]]]), "k": np.ones((1, 1, 2)),
        "pos": ints(0), "n_valid": ints(1),
    }  # fmt: skip
    assert c.meaning(inputs)["index_scores"] == 256.0
    inputs["w"] = np.array([[[1.0078125, -85]]])
    inputs["q"] = np.array([[[[1, 2**-8], [-1, -2]]]])
    assert c.meaning(inputs)["index_scores"] == 1.0078125, "the dot product was rounded"
    inputs["q"][0, 0, 0] = [1, 2**-7]
    assert c.meaning(inputs)["index_scores"] == 1.015625, "the product 1.01568.. was rounded"


def test_probabilities_are_rounded_but_not_their_sum() -> None:
    """Logits 0 and -ln(1.005): p = .995025 -> .99609375 in the numerator; a sink of 0 joins the sum."""
    c = Case()
    operands = [c.f32("q", B, T, 1, 2), c.f32("kv", B, T, 2), c.f32("ring", B, 2, 2)]
    sinks = c.weight_of("sinks", np.array([0.0], np.float32))
    c.op("attention", *operands, sinks, c.i32("pos", B), c.i32("n_valid", B), scale=1.0, window=2,
         rounding="reference")  # fmt: skip
    low = -np.log(1.005)
    inputs = {
        "q": np.array([[[[0, 0]], [[1, 0]]]]), "kv": np.array([[[low, 1], [0, 0]]]),
        "ring": np.zeros((1, 2, 2)), "pos": ints(0), "n_valid": ints(2),
    }  # fmt: skip
    found = c.meaning(inputs)["attention"][0, 1, 0, 1]
    np.testing.assert_allclose(found, 0.99609375 / (1 / 1.005 + 1 + 1), rtol=1e-12)


def test_the_window_keeps_its_slots_while_it_fills() -> None:
    """With a window of 64, of which one key is there, the entry opens the second block: p of the key is 1 in
    a block of its own, and not .995025 against the entry's logit of ln(1.005)."""
    for window, first in ((64, 1.0), (63, 0.99609375)):
        c = Case()
        operands = [c.f32("q", B, T, 1, 2), c.f32("kv", B, T, 2), c.f32("ring", B, window, 2)]
        sinks = c.weight_of("sinks", np.array([-100.0], np.float32))
        c.op("attention", *operands, sinks, c.i32("pos", B), c.i32("n_valid", B), c.f32("entries", B, 1, 2),
             scale=1.0, window=window, ratio=1, rounding="reference")  # fmt: skip
        inputs = {
            "q": np.array([[[[1, 0]]]]), "kv": np.array([[[0, 1]]]), "ring": np.zeros((1, window, 2)),
            "entries": np.array([[[np.log(1.005), 0]]]), "pos": ints(0), "n_valid": ints(1),
        }  # fmt: skip
        found = c.meaning(inputs)["attention"][0, 0, 0, 1]
        p = first / 1.005 if first == 1 else first
        np.testing.assert_allclose(found, p / (1 / 1.005 + 1), rtol=1e-12)


def test_expert_mlp_rounds_products_hidden_values_and_sums_in_order() -> None:
    """x 1 through w1 = w3 = 1: silu(1) = .731058.. -> BF16 .73046875 -> E4M3 .75 (in steps of 1/16).

    In FP16 it is 1497 / 2048.
    """
    want = {"none": 0.7310585786300049, "bf16": 0.73046875, "e4m3": 0.75}
    want |= {"fp16": 1497 / 2048, "mxfp8": 0.75}
    for rounding, value in want.items():
        c = Case()
        w13, w2 = (c.weight_of(n, np.ones(s, np.float32)) for n, s in (("w13", (1, 2, 1)), ("w2", (1, 1, 1))))
        operands = [c.f32("x", B, T, 1), c.i32("ids", B, T, 1), c.f32("g", B, T, 1), c.i32("n_valid", B)]
        c.op("expert_mlp", *operands, w13, w2, limit=3.0, rounding=rounding)
        one, ids = np.ones((1, 1, 1)), np.zeros((1, 1, 1), np.int32)
        found = c.meaning({"x": one, "ids": ids, "g": one, "n_valid": ints(1)})
        np.testing.assert_allclose(found["expert_mlp"], [[[value]]], rtol=1e-9)


def test_expert_mlp_rounds_hidden_values_in_its_blocks() -> None:
    """A value 2^18 as large makes 101.5 subnormal in its block, in steps of 128; else it becomes 104."""
    w13, inner = np.full((1, 8, 1), 1 + 2.0**-6, np.float32), 4
    w13[0, :inner, 0] = 100
    w13[0, inner, 0] = 2**18
    w2 = np.array([[[0, 1, 1, 1]]], np.float32)
    for block, want in ((0, 3 * 128), (4, 3 * 128), (2, 128 + 2 * 104), (1, 3 * 104)):
        c = Case()
        operands = [c.f32("x", B, T, 1), c.i32("ids", B, T, 1), c.f32("g", B, T, 1), c.i32("n_valid", B)]
        weights = c.weight_of("w13", w13), c.weight_of("w2", w2)
        c.op("expert_mlp", *operands, *weights, limit=1e6, rounding="e4m3", block=block)
        one, ids = np.ones((1, 1, 1)), np.zeros((1, 1, 1), np.int32)
        found = c.meaning({"x": one, "ids": ids, "g": one, "n_valid": ints(1)})["expert_mlp"]
        assert found == want, (block, found)


def test_selected_entries_by_score_or_by_id() -> None:
    missing = -np.inf
    scores = np.array([[[3, 7, missing, 5, 7, 1], [missing, 2, 1, missing, missing, missing]]])
    for ascending, want in ((False, [[1, 4, 3, 0], [1, 2, -1, -1]]), (True, [[0, 1, 3, 4], [1, 2, -1, -1]])):
        c = Case()
        c.op("index_topk", c.f32("scores", B, T, 6), k=4, ascending=ascending)
        np.testing.assert_array_equal(c.meaning({"scores": scores})["index_topk"][0], want)


def test_expert_mlp_rounds_hidden_values_to_int8_by_whole_rows() -> None:
    """127, 50, .4 and -100: the scale is 1, and what is below half of it becomes nothing."""
    c = Case()
    w13 = np.array([100, 100, 100, 100, 1.27, 0.5, 0.004, -1], np.float32).reshape(1, 8, 1)
    weights = c.weight_of("w13", w13), c.weight_of("w2", np.array([[[0, 1, 1, 1]]], np.float32))
    operands = [c.f32("x", B, T, 1), c.i32("ids", B, T, 1), c.f32("g", B, T, 1), c.i32("n_valid", B)]
    c.op("expert_mlp", *operands, *weights, limit=1e6, rounding="int8_token")
    one, ids = np.ones((1, 1, 1)), np.zeros((1, 1, 1), np.int32)
    (found,) = c.meaning({"x": one, "ids": ids, "g": one, "n_valid": ints(1)})["expert_mlp"].ravel()
    assert found == 50 - 100


@pytest.mark.parametrize(("rounding", "block"), [("mxfp8", 128), ("e4m3_rows", 32)])
def test_expert_mlp_in_mxfp8_rounds_hidden_values_only(rounding: str, block: int) -> None:
    """Blocks of 32 channels: a large one makes others of its block subnormal, and none of the next."""
    c, inner = Case(), 64
    w13, w2 = np.zeros((1, 2 * inner, 1), np.float32), np.ones((1, 1, inner), np.float32)
    w13[0, inner:, 0] = 1 + 2.0**-12  # neither a BF16 nor an FP16 number
    w13[0, :inner, 0] = 100  # silu of it is itself
    w2[0, 0, 0] = 0
    w13[0, inner, 0] = 60000  # scale 2^14
    operands = [c.f32("x", B, T, 1), c.i32("ids", B, T, 1), c.f32("g", B, T, 1), c.i32("n_valid", B)]
    weights = c.weight_of("w13", w13), c.weight_of("w2", w2)
    c.op("expert_mlp", *operands, *weights, limit=1e6, rounding=rounding, block=block)
    one, ids = np.ones((1, 1, 1)), np.zeros((1, 1, 1), np.int32)
    (found,) = c.meaning({"x": one, "ids": ids, "g": one, "n_valid": ints(1)})["expert_mlp"].ravel()
    assert found == 31 * 3 * 2.0 ** (14 - 9) + 32 * 104  # 100.02 in steps of 32, and of 8
