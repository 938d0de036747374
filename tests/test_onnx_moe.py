"""The router and expert lowerings: ties, hash routes, empty experts, one expert for all, padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_onnx_harness import Arr, B, Case, DictStore, T, close, ints, numbers

from dsv4c.ir.dtypes import DType
from dsv4c.ir.weights import concat, source, stack

E, K, D, I = 5, 2, 6, 4  # noqa: E741


def test_router(tmp_path: Path) -> None:
    case = Case(tmp_path)
    scores = case.b.op("sqrt_softplus", case.f32("x", B, T, E))
    ids = case.b.op("route_topk", scores, case.f32("bias", E), k=3)
    case.output(scores, ids, case.b.op("route_weights", scores, ids, factor=1.5, eps=1e-20)).build()
    for b, t in [(1, 1), (3, 1), (2, 9)]:
        case.compare({"x": 8 * numbers(1, b, t, E), "bias": numbers(2, E)})


def test_router_ties_go_to_the_lower_id(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.output(case.b.op("route_topk", case.f32("scores", B, T, 6), case.f32("bias", 6), k=3)).build()
    scores = np.float32([[[1, 2, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 3, 3]]])
    assert case.onnx({"scores": scores, "bias": np.zeros(6, np.float32)})["out0"].tolist() == [
        [[1, 2, 3], [0, 1, 2], [0, 4, 5]]
    ]


def test_softplus_far_out(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.output(case.b.op("sqrt_softplus", case.f32("x", B, T, 4))).build()
    x = np.float32([[[-60, -20, 30, 200]]])
    found = case.onnx({"x": x})["out0"]
    expected = case.meaning({"x": x})["out0"]
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


def test_hash_routes(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.output(case.b.op("route_hash", case.i32("tokens", B, T), case.i32("table", 7, K))).build()
    table = np.random.default_rng(0).integers(0, E, (7, K)).astype(np.int32)
    case.compare({"tokens": ints([6, 0, 3], [1, 1, 2]), "table": table})


@pytest.fixture
def experts(tmp_path: Path) -> Case:
    """expert_mlp over stored weights."""
    store, f = DictStore(), DType.F32
    for e in range(E):
        store.tensors |= {f"{e}.w1": numbers(e, I, D), f"{e}.w3": numbers(50 + e, I, D)}
        store.tensors[f"{e}.w2"] = numbers(90 + e, D, I)
    w13 = stack(tuple(concat((source(f"{e}.w1", f, (I, D)), source(f"{e}.w3", f, (I, D)))) for e in range(E)))
    w2 = stack(tuple(source(f"{e}.w2", f, (D, I)) for e in range(E)))
    case = Case(tmp_path)
    operands = [case.f32("x", B, T, D), case.i32("ids", B, T, K), case.f32("weights", B, T, K)]
    operands.append(case.i32("n_valid", B))
    weights = case.b.weight(w13, "w13"), case.b.weight(w2, "w2")
    return case.output(case.b.op("expert_mlp", *operands, *weights, limit=1.0)).build(store)


def routed(ids: Arr, n_valid: Arr) -> dict[str, Arr]:
    b, t, k = ids.shape
    return {"x": numbers(7, b, t, D), "ids": ids, "weights": numbers(8, b, t, k), "n_valid": n_valid}


@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 1), (2, 7), (1, 40)])
def test_experts(experts: Case, b: int, t: int) -> None:
    rng = np.random.default_rng(b * t)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(b * t)]).reshape(b, t, K).astype(np.int32)
    experts.compare(routed(ids, rng.integers(0, t + 1, b).astype(np.int32)))
    experts.compare(routed(ids, np.full(b, t, np.int32)))


def test_some_experts_get_nothing(experts: Case) -> None:
    experts.compare(routed(np.full((2, 5, K), 3, np.int32) - ints(0, 2), ints(5, 2)))


def test_one_expert_takes_every_token(experts: Case) -> None:
    for expert in (0, E - 1):
        experts.compare(routed(np.full((2, 9, K), expert, np.int32), ints(9, 9)))


def test_no_token_at_all(experts: Case) -> None:
    inputs = routed(np.zeros((2, 3, K), np.int32), ints(0, 0))
    assert np.abs(experts.onnx(inputs)["out0"]).max() == 0


def test_padding_reaches_no_expert(experts: Case) -> None:
    inputs = routed(ints([[0, 1], [2, 3], [0, 2]])[:1], ints(2))
    clean = experts.onnx(inputs)["out0"]
    inputs["x"], inputs["ids"] = inputs["x"].copy(), inputs["ids"].copy()
    inputs["x"][:, 2], inputs["ids"][:, 2] = np.nan, 12345
    close(experts.onnx(inputs)["out0"], clean)


def test_only_chosen_experts_are_computed(experts: Case) -> None:
    """An expert nobody chose may hold NaN: nothing of it is read."""
    store = experts.store
    ids = ints([[0, 1], [1, 3]])
    clean = experts.onnx(routed(ids, ints(2)))["out0"]
    for name in [f"{e}.{w}" for e in (2, 4) for w in ("w1", "w2", "w3")]:
        store.tensors[name] = np.full_like(store.tensors[name], np.nan)
    experts.build(store)
    close(experts.onnx(routed(ids, ints(2)))["out0"], clean)
