"""Experts, state, core ops and the evaluator itself against numbers worked out by hand."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
from support import CTX, Arr, B, Case, L, T, ints

from dsv4c.errors import EvalError
from dsv4c.ir.meaning import Evaluator


def value(case: Case, **inputs: object) -> Arr:
    """The only output of a case."""
    (found,) = case.meaning({k: np.asarray(v) for k, v in inputs.items()}).values()
    return found


def close(found: Arr, want: object) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------ router, experts


def test_router() -> None:
    c = Case()
    c.op("sqrt_softplus", c.f32("x", B, T, 3))
    found = value(c, x=[[[0.0, 1000.0, -1000.0]]])
    close(found, [[[sqrt(log(2)), sqrt(1000), 0]]])
    c = Case()
    c.op("route_topk", c.f32("s", B, T, 4), c.weight_of("bias", np.array([0, 2, 0, 1], np.float32)), k=3)
    assert value(c, s=[[[3.0, 1.0, 3.0, 1.0]]]).tolist() == [[[0, 1, 2]]]  # 3, 3, 3, 2
    c = Case()
    c.op("route_weights", c.f32("s", B, T, 3), c.i32("ids", B, T, 2), factor=1.5, eps=1.0)
    close(value(c, s=[[[1.0, 7.0, 3.0]]], ids=[[[2, 0]]]), [[[1.5 * 3 / 5, 1.5 * 1 / 5]]])
    c = Case()
    c.op("route_hash", c.i32("t", B, T), c.weight_of("table", np.array([[0, 1], [2, 3]], np.int32)))
    assert value(c, t=[[1, 0, 1]]).tolist() == [[[2, 3], [0, 1], [2, 3]]]


def test_input_statistics() -> None:
    """Two tokens of one row and none of the other, on top of what was summed."""
    c = Case()
    c.op("input_statistics", c.state("sums", 2), c.f32("x", B, T, 2), c.i32("n_valid", B))
    c.module.outputs["sums"] = c.module.outputs.pop("input_statistics")
    x = [[[1.0, -2.0], [3.0, 4.0]], [[7.0, 7.0], [7.0, 7.0]]]
    close(value(c, sums=[0.5, 1.0], x=x, n_valid=[2, 0]), [0.5 + 1 + 9, 1.0 + 4 + 16])


def test_expert_statistics() -> None:
    """Two real tokens, 1 and 3 (clamped to 2 inside), and one of padding, on top of what was counted."""
    c = Case()
    x, ids, g, n = c.f32("x", B, T, 1), c.i32("ids", B, T, 2), c.f32("g", B, T, 2), c.i32("n_valid", B)
    w13 = c.weight_of("w13", np.array([[[1.0], [2.0]], [[0.0], [1.0]], [[1.0], [1.0]]], np.float32))
    w2 = c.weight_of("w2", np.array([[[3.0]], [[5.0]], [[-4.0]]], np.float32))
    counts = c.state("counts", 3, 3)
    c.op("expert_statistics", counts, x, ids, g, n, w13, w2, limit=2.0)
    c.module.outputs["counts"] = c.module.outputs.pop("expert_statistics")
    start = np.array([[10.0, 20.0, 30.0], [0, 0, 0], [0, 0, 0]])
    found = value(c, x=[[[1.0], [3.0], [7.0]]], ids=[[[0, 1], [2, 0], [0, 1]]], n_valid=[2], counts=start,
                  g=[[[0.5, 0.25], [2.0, 1.0], [9.0, 9.0]]])  # fmt: skip
    silu1, silu2 = 1 / (1 + exp(-1)), 2 / (1 + exp(-2))
    close(found, [
        [12, 20 + 0.5 + 1, 30 + 0.5 * silu1 * 2 * 3 + 1 * silu2 * 2 * 3],
        [1, 0.25, 0],  # silu(0) = 0
        [1, 2, 2 * silu2 * 2 * 4],  # a norm has no sign
    ])  # fmt: skip


def test_dispatch_and_combine() -> None:
    """Rows by expert in token order; padding is dropped; combine adds them up again."""
    c = Case()
    x, ids, g, n = c.f32("x", B, T, 1), c.i32("ids", B, T, 2), c.f32("g", B, T, 2), c.i32("n_valid", B)
    outs = ("x0", "g0", "x1", "g1", "x2", "g2")
    rows = c.multi("dispatch", x, ids, g, n, outs=outs, experts=3, label="R").results
    c.op("combine", ids, n, *(c.b.op("scale_rows", rows[2 * i], rows[2 * i + 1]) for i in range(3)))
    found = c.meaning({
        "x": np.array([[[1.0], [2.0], [99.0]], [[3.0], [4.0], [5.0]]]), "n_valid": ints(2, 3),
        "ids": np.array([[[2, 0], [0, 1], [1, 2]], [[0, 1], [2, 1], [1, 0]]]),
        "g": np.arange(12.0).reshape(2, 3, 2),
    })  # fmt: skip
    assert found["x0"].ravel().tolist() == [1, 2, 3, 5] and found["g0"].tolist() == [1, 2, 6, 11]
    assert found["x1"].ravel().tolist() == [2, 3, 4, 5] and found["x2"].ravel().tolist() == [1, 4]
    close(found["combine"][:, :, 0], [[0 + 1, 4 + 6, 0], [18 + 21, 32 + 36, 50 + 55]])


def test_expert_mlp_is_dispatch_experts_and_combine() -> None:
    """One expert of width 1: w1 = 2, w3 = 5, w2 = 10; limit 3 clamps both; the weight comes before w2."""
    c = Case()
    w13, w2 = (c.weight_of(n, np.array(v, np.float32)) for n, v in (("w13", [[[2], [5]]]), ("w2", [[[10]]])))
    ids, g = c.i32("ids", B, T, 1), c.f32("g", B, T, 1)
    c.op("expert_mlp", c.f32("x", B, T, 1), ids, g, c.i32("n_valid", B), w13, w2, limit=3.0)
    found = value(
        c, x=[[[0.5], [-4.0], [8.0]]], ids=[[[0], [0], [0]]], g=[[[1.0], [2.0], [1.0]]], n_valid=[2]
    )
    silu = lambda v: v / (1 + exp(-v))  # noqa: E731
    close(found[0, :, 0], [silu(1) * 2.5 * 10, silu(-8) * -3 * 2 * 10, 0])


# ------------------------------------------------------------------------------------------- state


def test_a_ring_wraps_around() -> None:
    c = Case()
    ring = c.state("ring", B, 3, 1)
    c.op("ring_write", ring, c.f32("rows", B, T, 1), c.i32("pos", B), c.i32("n_valid", B), out="ring")
    start = np.array([[[0.0], [1.0], [2.0]]] * 3)
    rows = np.array([[[10.0], [11.0], [12.0], [13.0]]] * 3)
    found = c.meaning({"ring": start, "rows": rows, "pos": ints(2, 5, 7), "n_valid": ints(2, 4, 0)})["ring"]
    assert found[:, :, 0].tolist() == [[11, 1, 10], [11, 12, 13], [0, 1, 2]]


def test_entries_are_appended_behind_the_closed_ones() -> None:
    c = Case()
    entries = c.state("entries", B, CTX // 4, 1)
    c.op("entries_append", entries, c.f32("rows", B, L, 1), c.i32("pos", B), c.i32("n_valid", B), ratio=4,
         out="entries")  # fmt: skip
    rows = np.array([[[10.0], [11.0]]] * 4)
    inputs = {"rows": rows, "pos": ints(3, 4, 7, 0), "n_valid": ints(5, 3, 1, 0)}
    found = c.meaning({"entries": np.zeros((4, 3, 1)), **inputs})["entries"]
    assert found[:, :, 0].tolist() == [[10, 11, 0], [0, 0, 0], [0, 10, 0], [0, 0, 0]]


def test_positions() -> None:
    c = Case()
    tokens, pos, n = c.step()
    c.op("positions", tokens, pos)
    c.op("entry_positions", tokens, pos, ratio=4)
    c.op("advance", pos, n)
    found = c.meaning({"tokens": np.zeros((2, 5), int), "pos": ints(0, 7), "n_valid": ints(5, 2)})
    assert found["positions"].tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    assert found["entry_positions"].tolist() == [[0, 4], [4, 8]]
    assert found["advance"].tolist() == [5, 9]


# -------------------------------------------------------------------------------------------- core


def test_products_and_norms() -> None:
    c = Case()
    x = c.f32("x", B, T, 2)
    c.op("linear", x, c.weight_of("w", np.array([[1, 10], [2, 0], [0, 3]], np.float32)))
    c.op("rms_norm", x, c.weight_of("n", np.array([1, 2], np.float32)), eps=0.5)
    c.op("unit_norm", x, eps=0.0)
    c.op("scale", x, factor=-2.0)
    c.op("add", x, x)
    c.op("repeat_streams", x, n=2)
    found = c.meaning({"x": np.array([[[3.0, 4.0]]])})
    close(found["linear"], [[[43, 6, 12]]])
    close(found["rms_norm"], [[[3 / sqrt(13), 8 / sqrt(13)]]])
    close(found["unit_norm"], [[[3 / sqrt(12.5), 4 / sqrt(12.5)]]])
    close(found["scale"], [[[-6, -8]]])
    close(found["add"], [[[6, 8]]])
    close(found["repeat_streams"], [[[[3, 4], [3, 4]]]])


def test_groups_have_their_own_blocks() -> None:
    c = Case()
    h = c.op("split_heads", c.f32("x", B, T, 4), heads=4)
    c.op(
        "grouped_linear",
        h,
        c.weight_of("w", np.array([[1, 10], [2, 0], [0, 3], [1, 1]], np.float32)),
        groups=2,
    )
    found = c.meaning({"x": np.array([[[1.0, 2.0, 3.0, 4.0]]])})
    close(found["split_heads"], [[[[1], [2], [3], [4]]]])
    close(found["grouped_linear"], [[[21, 2, 12, 7]]])


def test_swiglu_and_its_clamps() -> None:
    c = Case()
    gate, up = c.f32("gate", B, T, 3), c.f32("up", B, T, 3)
    c.op("swiglu", gate, up)
    c.op("clamped_swiglu", gate, up, limit=2.0)
    c.op("clamp", up, low=-1.0, high=2.0)
    inputs = {"gate": np.array([[[1.0, 5.0, -5.0]]]), "up": np.array([[[3.0, -3.0, 0.5]]])}
    found = c.meaning(inputs)
    silu = lambda v: v / (1 + exp(-v))  # noqa: E731
    close(found["swiglu"], [[[silu(1) * 3, silu(5) * -3, silu(-5) * 0.5]]])
    close(found["clamped_swiglu"], [[[silu(1) * 2, silu(2) * -2, silu(-5) * 0.5]]])
    close(found["clamp"], [[[2, -1, 0.5]]])


def test_gathers() -> None:
    c = Case()
    c.op("embed", c.i32("tokens", B, T), c.weight_of("e", np.array([[1, 2], [3, 4]], np.float32), bf16=True))
    assert value(c, tokens=[[1, 0]]).tolist() == [[[3, 4], [1, 2]]]
    c = Case()
    c.op("gather_rows", c.f32("x", B, T, 1), c.i32("rows", B, L))
    found = value(c, x=[[[1.0], [2.0]], [[3.0], [4.0]]], rows=[[1, 1, 0], [0, 1, 0]])
    assert found[:, :, 0].tolist() == [[2, 2, 1], [3, 4, 3]]


# --------------------------------------------------------------------------------------- the evaluator


def test_arguments_are_checked() -> None:
    c = Case()
    c.op("add", c.f32("x", B, T, 2), c.f32("y", B, T, 2))
    with pytest.raises(EvalError, match="argument 'y' is missing"):
        c.meaning({"x": np.zeros((1, 1, 2))})
    with pytest.raises(EvalError, match=r"argument 'y' has shape \[1, 3, 2\]; allowed: \[B=1, T=1, 2\]"):
        c.meaning({"x": np.zeros((1, 1, 2)), "y": np.zeros((1, 3, 2))})
    with pytest.raises(EvalError, match="argument 'x' has shape"):
        c.meaning({"x": np.zeros((1, 2)), "y": np.zeros((1, 3, 2))})
    with pytest.raises(EvalError, match="the module has no weights to evaluate"):
        Evaluator(c.module)


def test_precision_and_trace() -> None:
    c = Case()
    y = c.op("scale", c.f32("x", B, T, 1), factor=0.1)
    inputs = {"x": np.array([[[1.0]]])}
    assert c.meaning(inputs, np.float32)["scale"].dtype == np.float32
    assert c.meaning(inputs)["scale"][0, 0, 0] == 0.1
    step = Evaluator(c.module, c.store)(inputs, {}, trace=True)
    assert [op.name for op in step.trace] == ["scale"] and y.producer in step.trace
    ring = Case()
    ring.state("ring", B, CTX // 4, 3)
    ring.module.outputs["ring"] = ring.module.states["ring"]
    assert Evaluator(ring.module, ring.store).fresh_state(B=2, ctx=21)["ring"].shape == (2, 5, 3)


def test_an_expert_without_rows_costs_no_weight() -> None:
    c = Case()
    c.op(
        "linear",
        c.f32("x", L, 2),
        c.b.weight(c.store.add("gone", c.weight("w", 3, 2).type.dtype, np.ones((3, 2)))),
    )
    del c.store.tensors["gone"]
    assert value(c, x=np.zeros((0, 2))).shape == (0, 3)
