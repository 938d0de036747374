"""The image encoder and how its rows enter the text, as the evaluator means it: by loops and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support import Arr, B, Case, T

from dsv4c.ir.dims import sym

N, M, S, IMAGES = sym("N"), sym("M"), sym("S"), sym("I")
NAN = float("nan")


def only(case: Case, **inputs: object) -> Arr:
    """The only output of a case."""
    (found,) = case.meaning({k: np.asarray(v) for k, v in inputs.items()}).values()
    return found


def test_angles_of_a_grid_are_those_of_the_row_and_then_of_the_column() -> None:
    c = Case()
    c.multi("grid_angles", c.i32("p", B, N, 2), c.weight_of("f", np.array([1, 0.25], np.float32)),
            outs=("cos", "sin"))  # fmt: skip
    found = c.meaning({"p": np.array([[[0, 0], [2, 3]], [[3, 0], [0, 1]]])})
    angles = np.array([[[0, 0, 0, 0], [2, 0.5, 3, 0.75]], [[3, 0.75, 0, 0], [0, 0, 1, 0.25]]])
    np.testing.assert_allclose(found["cos"], np.vectorize(math.cos)(angles), rtol=1e-12)
    np.testing.assert_allclose(found["sin"], np.vectorize(math.sin)(angles), rtol=1e-12)


def test_the_angle_is_rounded_before_its_cosine() -> None:
    """3 times the float32 next to 0.1 is no float32; its rounding moves the cosine in the ninth place."""
    c, frequency = Case(), np.float32(0.1)
    c.multi("grid_angles", c.i32("p", B, N, 2), c.weight_of("f", np.array([frequency])), outs=("cos", "sin"))
    found = c.meaning({"p": np.array([[[3, 0]]])})["cos"][0, 0, 0]
    assert found == math.cos(float(np.float32(3) * frequency)) != math.cos(3 * float(frequency))


def attention(q: Arr, k: Arr, v: Arr, scale: float) -> Arr:
    """One number at a time."""
    out = np.zeros_like(q)
    images, patches, heads, width = q.shape
    for b, i, h in np.ndindex(images, patches, heads):
        weights = [math.exp(scale * sum(q[b, i, h, c] * k[b, j, h, c] for c in range(width)))
                   for j in range(patches)]  # fmt: skip
        for c in range(width):
            out[b, i, h, c] = sum(w * v[b, j, h, c] for j, w in enumerate(weights)) / sum(weights)
    return out


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 5, 3, 4)])
def test_every_patch_sees_every_patch(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for _ in range(3))
    c = Case()
    c.op("full_attention", *(c.f32(n, B, N, *shape[2:]) for n in "qkv"), scale=0.7)
    np.testing.assert_allclose(only(c, q=q, k=k, v=v), attention(q, k, v, 0.7), rtol=1e-11)


def test_large_logits_do_not_overflow() -> None:
    c = Case()
    c.op("full_attention", *(c.f32(n, B, N, 1, 1) for n in "qkv"), scale=1.0)
    q, k, v = ([[[[1e3]], [[-1e3]]]], [[[[5.0]], [[-5.0]]]], [[[[2.0]], [[3.0]]]])
    np.testing.assert_allclose(only(c, q=q, k=k, v=v), [[[[2]], [[3]]]], rtol=1e-12)


def test_heads_are_merged_in_their_order() -> None:
    c = Case()
    c.op("merge_heads", c.f32("x", B, T, 2, 3))
    assert only(c, x=[[[[1.0, 2, 3], [4, 5, 6]]]]).tolist() == [[[1, 2, 3, 4, 5, 6]]]


def test_gelu_is_that_of_the_error_function() -> None:
    """Not the approximation by tanh, which is off by up to 5e-4."""
    x = np.linspace(-6, 6, 49).reshape(1, 7, 7)
    c = Case()
    c.op("gelu", c.f32("x", B, T, 7))
    want = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.ravel()]
    np.testing.assert_allclose(only(c, x=x).ravel(), want, rtol=1e-9, atol=1e-15)


def test_cells_are_flattened_channel_by_channel() -> None:
    """Rows (1, 10), (2, 20), (3, 30): a cell of rows 2, 0, -1 is 3 1 0 of channel 0, then 30 10 0."""
    c = Case()
    c.op("gather_cells", c.f32("x", B, N, 2), c.i32("cells", B, M, 3))
    x = [[[1.0, 10], [2, 20], [3, 30]], [[4, 40], [5, 50], [NAN, NAN]]]
    cells = [[[2, 0, -1], [1, 1, 1]], [[-1, -1, -1], [0, -1, 1]]]
    want = [[[3, 1, 0, 30, 10, 0], [2, 2, 2, 20, 20, 20]], [[0] * 6, [4, 0, 5, 40, 0, 50]]]
    assert only(c, x=x, cells=cells).tolist() == want


def test_a_grid_of_patches_in_cells_of_three_by_three() -> None:
    """Section 9.3 on four rows of five patches: entry 9 c + 3 ky + kx of a token is channel c at (ky, kx)."""
    rows, columns, width = 4, 5, 2
    grid = np.arange(rows * columns * width, dtype=float).reshape(rows, columns, width) + 1
    padded = np.zeros((6, 6, width))
    padded[:rows, :columns] = grid
    want = [[padded[3 * y + ky, 3 * x + kx, c] for c in range(width) for ky in range(3) for kx in range(3)]
            for y in range(2) for x in range(2)]  # fmt: skip
    spots = np.full((6, 6), -1)
    spots[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    cells = spots.reshape(2, 3, 2, 3).swapaxes(1, 2).reshape(1, 4, 9)
    c = Case()
    c.op("gather_cells", c.f32("x", B, N, width), c.i32("cells", B, M, 9))
    assert only(c, x=grid.reshape(1, -1, width), cells=cells)[0].tolist() == want


def test_a_span_is_start_rows_newlines_and_end() -> None:
    """Section 9.4: two rows of two tokens; the second image lays its rows out backwards."""
    c = Case()
    marks = [c.weight_of(n, np.array(v, np.float32)) for n, v in
             (("start", [-1, -10]), ("newline", [-2, -20]), ("end", [-3, -30]))]  # fmt: skip
    c.op("image_span", c.f32("rows", B, M, 2), c.i32("layout", B, S), *marks)
    rows = [[[1.0, 10], [2, 20], [3, 30], [4, 40]], [[5, 50], [6, 60], [7, 70], [8, 80]]]
    found = only(c, rows=rows, layout=[[-1, 0, 1, -2, 2, 3, -2, -3], [3, 2, 1, 0, -3, -3, -2, -1]])
    assert found[..., 0].tolist() == [[-1, 1, 2, -2, 3, 4, -2, -3], [8, 7, 6, 5, -3, -3, -2, -1]]
    np.testing.assert_array_equal(found[..., 1], found[..., 0] * 10)


def merged(image_token: int) -> Case:
    c = Case()
    x, tokens, images = c.f32("x", B, T, 1), c.i32("tokens", B, T), c.f32("images", B, IMAGES, 1)
    c.op("merge_images", x, tokens, images, c.i32("n", B), image_token=image_token)
    return c


@pytest.mark.parametrize(
    ("tokens", "count", "want"),
    [([9, 1, 9, 9], 3, [101, 2, 102, 103]),  # as many rows as image tokens
     ([9, 1, 9, 9], 2, [101, 2, 102, 4]),  # a row is missing: the token keeps its embedding
     ([9, 1, 1, 2], 3, [101, 2, 3, 4]),  # rows are left over
     ([9, 9, 9, 9], 7, [101, 102, 103, 4]),  # n_images says more than the rows that are there
     ([9, 9, 9, 9], 0, [1, 2, 3, 4]),
     ([1, 2, 3, 4], 3, [1, 2, 3, 4])],
)  # fmt: skip
def test_rows_of_images_replace_image_tokens_in_order(tokens: list[int], count: int, want: list[int]) -> None:
    """Three rows 101, 102, 103; those from `count` on hold NaN and are read by nobody."""
    images = np.array([[[101.0], [102.0], [103.0]]])
    images[:, count:] = NAN
    c = merged(image_token=9)
    found = only(c, x=[[[1.0], [2], [3], [4]]], tokens=[tokens], images=images, n=[count])
    assert found[0, :, 0].tolist() == want


def test_every_row_of_a_batch_counts_its_own_images() -> None:
    c = merged(image_token=0)
    inputs = {"x": np.ones((3, 3, 1)), "tokens": [[0, 5, 0], [5, 5, 0], [0, 0, 0]], "n": [2, 1, 0],
              "images": [[[10.0], [11]], [[20], [NAN]], [[NAN], [NAN]]]}  # fmt: skip
    assert only(c, **inputs)[..., 0].tolist() == [[10, 1, 11], [1, 1, 20], [1, 1, 1]]
