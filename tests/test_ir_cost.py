"""What ops cost, counted by hand; whole models are in the tests of estimates."""

from __future__ import annotations

import pytest
from support import CTX, B, Case, T

from dsv4c.ir.cost import Cost, op_cost
from dsv4c.ir.dims import sym
from dsv4c.ir.graph import Op, Value

N, M, IMAGES = sym("N"), sym("M"), sym("I")
HEADS, WIDTH, K, SIZE, COUNT = 3, 16, 5, 8, 4


def index(c: Case) -> tuple[Value, ...]:
    q, w, keys = c.f32("q", B, T, HEADS, WIDTH), c.f32("w", B, T, HEADS), c.f32("keys", B, CTX, WIDTH)
    return q, w, keys, c.i32("pos", B), c.i32("n", B)


def at(op: Op, past: int, **sizes: int) -> Cost:
    return op_cost(op, {"B": 1, "T": 1, "ctx": 4096, "past": past, **sizes})


def test_a_restricted_selection_stops_growing_with_the_context() -> None:
    """32 entries of the blocks: 15 seen entries are fewer, 32 and 4000 are not; each is scored by 3 heads."""
    c = Case()
    op = c.multi(
        "index_select", *index(c), c.i32("blocks", B, T, COUNT), outs=("ids",), ratio=1, k=K, size=SIZE
    )
    flops = {past: at(op, past).flops for past in (14, 30, 31, 4000)}
    per_entry = 2 * HEADS * (WIDTH + 1)
    assert flops == {14: 15 * per_entry, 30: 31 * per_entry, 31: 32 * per_entry, 4000: 32 * per_entry}
    assert at(op, 31).data_bytes == at(op, 4000).data_bytes < 4 * 40 * WIDTH


@pytest.mark.parametrize("name", ["index_scores", "index_select", "index_candidates"])
def test_selections_over_everything_grow_with_the_context(name: str) -> None:
    c = Case()
    attrs = {
        "index_scores": {},
        "index_select": {"k": K},
        "index_candidates": {"k": K, "size": SIZE, "count": COUNT},
    }
    op = c.multi(name, *index(c), outs=("ids", "blocks"), ratio=2, **attrs[name])
    assert [at(op, past).flops for past in (0, 1, 3999)] == [0, 102, 2000 * 102]
    assert at(op, 3999).data_bytes == 4 * (HEADS * WIDTH + 2000 * WIDTH)


def test_full_attention_is_quadratic_in_the_patches() -> None:
    c = Case()
    op = c.multi("full_attention", *(c.f32(n, B, N, 2, 8) for n in "qkv"), outs=("y",), scale=1.0)
    cost = op_cost(op, {"B": 2, "N": 100})
    assert cost == Cost(2 * 2 * 2 * (2 * 100 * 100 * 8), 0, 4 * (4 * 2 * 100 * 16))


@pytest.mark.parametrize("given", [False, True])
def test_weights_from_outside_do_not_change_what_a_border_computes(given: bool) -> None:
    """Per token the projection of 2 x 6 numbers to 8, and 6 operations a number; to expand them 5 more."""
    c = Case()
    x, y, pre, comb = (
        c.f32("x", B, T, 2, 6),
        c.f32("y", B, T, 6),
        c.f32("pre", B, T, 2),
        c.f32("c", B, T, 2, 2),
    )
    parameters = c.weight("fn", 8, 12), c.weight("base", 8), c.weight("scale", 3), c.weight("w", 6)
    attrs = {"eps": 1e-6, "norm_eps": 1e-6, "iters": 3, "out_eps": 1e-6}
    more, sizes = ([pre] if given else []), {"B": 1, "T": 7}
    first = op_cost(c.multi("hc_pre", x, *parameters, *more, outs=("a",), **attrs), sizes)
    second = op_cost(c.multi("hc_post_pre", x, y, pre, comb, *parameters, *more, outs=("b",), **attrs), sizes)
    assert first.flops == 7 * (2 * 8 * 12 + 6 * 12) and second.flops == 7 * (2 * 8 * 12 + 11 * 12)
    assert first.weight_bytes == second.weight_bytes == 4 * (96 + 8 + 3 + 6)
    results = 7 * (6 + 2 + 4 + (2 if given else 0))
    assert first.data_bytes == 4 * (7 * 12 + results + (14 if given else 0))


def test_moving_rows_computes_nothing() -> None:
    c = Case()
    x, tokens, images = c.f32("x", B, T, 6), c.i32("tokens", B, T), c.f32("images", B, IMAGES, 6)
    marks = [c.weight(n, 6) for n in ("start", "newline", "end")]
    ops = [
        c.multi("merge_heads", c.f32("heads", B, T, 2, 3), outs=("1",)),
        c.multi("gather_cells", x, c.i32("cells", B, M, 4), outs=("2",)),
        c.multi("image_span", x, tokens, *marks, outs=("3",)),
        c.multi("merge_images", x, tokens, images, c.i32("n", B), outs=("4",), image_token=1),
    ]  # fmt: skip
    costs = [op_cost(op, {"B": 2, "T": 5, "M": 3, "I": 4}) for op in ops]
    assert [cost.flops for cost in costs] == [0, 0, 0, 0]
    assert costs[1].data_bytes == 4 * (60 + 24 + 144) and costs[3].data_bytes == 4 * (60 + 10 + 48 + 2 + 60)
    assert costs[2].weight_bytes == 3 * 24
    assert op_cost(c.multi("gelu", x, outs=("5",)), {"B": 2, "T": 5}).flops == 10 * 60
