"""Index selection of one token over many keys, whose scores are spread over threads."""

from __future__ import annotations

import numpy as np
import pytest
from support import B, Case, T, ints, normal

from dsv4c.targets.cpu.tvm.kernels.select import WORTH_A_THREAD

HEADS, WIDTH, CAPACITY, K, SIZE, COUNT = 17, 40, 4096, 9, 8, 400


def case(name: str, **attrs: int) -> Case:
    c = Case()
    _, pos, n_valid = c.step()
    operands = [c.f32("q", B, T, HEADS, WIDTH), c.f32("w", B, T, HEADS), c.f32("keys", B, CAPACITY, WIDTH)]
    operands += [pos, n_valid]
    if name == "index_select" and "size" in attrs:
        operands.append(c.i32("blocks", B, T, COUNT))
    c.multi(name, *operands, outs=("ids", "chosen"), ratio=1, k=K, **attrs)
    return c


@pytest.mark.parametrize("past", [1, 1500, 1600, 4094])
@pytest.mark.parametrize(
    ("name", "attrs"),
    [
        ("index_select", {}),
        ("index_select", {"size": SIZE}),
        ("index_candidates", {"size": SIZE, "count": 100}),
    ],
)
def test_alone(name: str, attrs: dict[str, int], past: int) -> None:
    """The same ids as by meaning, and as the same token beside another one."""
    c, rng = case(name, **attrs), np.random.default_rng(past)
    assert HEADS * WIDTH * 1500 < WORTH_A_THREAD < HEADS * WIDTH * 1600
    keys = normal(rng, 1, CAPACITY, WIDTH)
    keys[:, rng.integers(0, CAPACITY, 300)] = 0  # ties at exactly zero
    keys[:, past + 2 :] = np.nan
    blocks = np.sort(rng.permutation(CAPACITY // SIZE)[:COUNT]).astype(np.int32)
    inputs = {
        "tokens": np.zeros((1, 1), np.int32), "pos": ints(past), "n_valid": ints(1), "keys": keys,
        "q": normal(rng, 1, 1, HEADS, WIDTH), "w": normal(rng, 1, 1, HEADS), "blocks": blocks[None, None],
    }  # fmt: skip
    want, alone = c.meaning(inputs, np.float32), c.run(inputs)
    twice = {k: np.repeat(v, 2, axis=0) for k, v in inputs.items()}
    beside = c.run(twice)
    for output, ids in want.items():
        assert set(alone[output].ravel().tolist()) == set(ids.ravel().tolist()), output
        np.testing.assert_array_equal(beside[output][0], alone[output][0])
