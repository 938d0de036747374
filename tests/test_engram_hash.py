"""Multipliers, primes and row ids: published constants and vectors, and a second opinion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support import Arr, B, Case, T, ints

from dsv4c.errors import ConfigError
from dsv4c.frontend.engram import EngramConfig, Variant
from dsv4c.frontend.engram_hash import LayerHash, layer_hashes, layer_multipliers
from dsv4c.ir.dtypes import DType

DATA = Path(__file__).parent / "data" / "engram"
RELEASED = EngramConfig(Variant.PROD, (1, 14), (16_000_000,) * 3, 8, 256, 5120, 4, 99_092, 2, 129_280)
DEMO = EngramConfig(Variant.DEMO, (1, 15), (646_400,) * 2, 8, 64, 1024, 4, 99_092, 2, 129_280)

# u_0.. of one token -> its rows (Engram specification, section 4)
VECTORS = {
    (1, (10, 20, 30, 40)): (
        10250667, 16051853, 42761335, 48437066, 64953759, 91793642, 97213675, 124972355, 130904169, 147647512,
        174479789, 176217609, 193213014, 209711443, 226459680, 248375762, 266647502, 284737834, 292200621,
        319934002, 327756510, 339491046, 365830131, 381142068,
    ),
    (14, (10, 20, 30, 40)): (
        13402985, 31185432, 33324312, 50751051, 67464774, 94528317, 100959033, 120176944, 128818944,
        152218109, 160998468, 191796781, 195587060, 214176773, 229162919, 250160180, 260141385, 283855289,
        300526134, 319101158, 333879786, 349356468, 360884307, 370522085,
    ),
    (1, (5, 2, 2, 2)): (
        5412672, 18319159, 35492627, 60880252, 74962984, 95657733, 98005115, 127351390, 143494632, 151789366,
        171410756, 185435171, 207165545, 218031260, 226330336, 247008214, 256353435, 276423911, 295874085,
        305599364, 322749888, 348475788, 367405771, 372009279,
    ),
}  # fmt: skip


def test_released_constants() -> None:
    first, second = RELEASED.hashes[1], RELEASED.hashes[14]
    assert first.multipliers == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert second.multipliers == (67716810739261, 51510806800915, 30921347202721, 82619226485591)
    near = [p - 16_000_000 for p in first.primes]
    assert near[:9] == [57, 79, 81, 97, 121, 129, 133, 183, 189] and near[-1] == 463
    near = [p - 16_000_000 for p in second.primes]
    assert near[:9] == [477, 487, 499, 507, 511, 573, 609, 627, 667] and near[-1] == 889
    assert (first.rows, second.rows) == (384_006_168, 384_016_682)
    assert first.offsets[:2] == (0, 16_000_057) and first.offsets[-1] + first.primes[-1] == first.rows


def test_demonstration_constants() -> None:
    assert [p - 646_000 for p in DEMO.hashes[1].primes] == [
        403, 411, 421, 423, 433, 453, 519, 523, 537, 543, 549, 571, 573, 577, 609, 619,
    ]  # fmt: skip
    assert (DEMO.hashes[1].rows, DEMO.hashes[15].rows) == (10_344_164, 10_348_242)


def test_a_shorter_draw_is_a_prefix() -> None:
    assert layer_multipliers(14, 99_092, 4)[:3] == layer_multipliers(14, 99_092, 3)
    assert layer_multipliers(3, 1, 2)[0] % 2 == 1 and layer_multipliers(3, 2**62, 2) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [{"heads": 0}, {"sizes": (1009, 0)}, {"layers": (-1,)}, {"compressed_vocab": 0}, {"sizes": (2**31,)}],
)  # fmt: skip
def test_a_hash_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    given = {"layers": (1,), "sizes": (1009, 1009), "heads": 2, "compressed_vocab": 400} | change
    with pytest.raises(ConfigError, match="engram"):
        layer_hashes(**given)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- row ids


def rows_case(hash_: LayerHash, heads: int, pad: int, dead: bool) -> Case:
    c = Case()
    ids, history = c.i32("ids", B, T), c.state("history", B, len(hash_.multipliers) - 1, dtype=DType.I32)
    pos, n_valid = c.i32("pos", B), c.i32("n_valid", B)
    c.op("ngram_rows", ids, history, pos, n_valid, out="rows", pad=pad, multipliers=hash_.multipliers,
         primes=hash_.primes, offsets=hash_.offsets, heads=heads, dead=dead)  # fmt: skip
    c.op("ngram_history", history, ids, pos, n_valid, out="history")
    return c


def stepped(case: Case, ids: Arr, cuts: tuple[int, ...], compiled: bool) -> Arr:
    """Rows [T,columns] of one sequence fed in pieces of these sizes."""
    slots = case.module.states["history"].type.shape[1]
    assert isinstance(slots, int)
    history, at, out = np.zeros((1, slots), np.int32), 0, []
    for count in cuts:
        inputs = {"ids": ids[None, at : at + count].astype(np.int32), "history": history, "pos": ints(at),
                  "n_valid": ints(count)}  # fmt: skip
        found = case.run(inputs) if compiled else case.meaning(inputs)
        history, at = found["history"], at + count
        out.append(found["rows"][0])
    assert at == len(ids)
    return np.concatenate(out)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", [1, 14])
def test_vectors_of_the_specification(layer: int, compiled: bool) -> None:
    case = rows_case(RELEASED.hashes[layer], 8, 2, True)
    for (of, u), want in VECTORS.items():
        if of == layer:
            ids = np.array(u[::-1] if u[1] != 2 else u[:1])  # oldest first; pads come of themselves
            assert tuple(stepped(case, ids, (len(ids),), compiled)[-1]) == want
            assert tuple(stepped(case, ids, (1,) * len(ids), compiled)[-1]) == want
    if layer == 1:
        largest = stepped(case, np.full(4, 99_091), (4,), compiled)[-1]
        assert (largest[0], largest[-1]) == (12193612, 375130424)


def second_opinion(
    hash_: LayerHash, heads: int, pad: int, dead: bool, ids: npt.NDArray[np.int64]
) -> list[list[int]]:
    """The formulas of section 4 over a whole sequence, with an explicit b_i and Python's integers."""
    out = []
    for t in range(len(ids)):
        h, row = 0, []
        for i, m in enumerate(hash_.multipliers):
            seen = [int(ids[t - k]) if t >= k else None for k in range(i + 1)]
            blocked = any(s is None or s < 0 for s in seen) if dead else seen[i] is None
            last = seen[i]
            h ^= (pad if blocked or last is None else last) * m
            if i:
                for a in range(heads):
                    k = (i - 1) * heads + a
                    row.append(h - h // hash_.primes[k] * hash_.primes[k] + sum(hash_.primes[:k]))
        out.append(row)
    return out


@pytest.mark.parametrize("config", [RELEASED, DEMO], ids=["prod", "demo"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_random_sequences_however_they_are_cut(config: EngramConfig, share: float) -> None:
    """Also where negative ids go into the hash as they are, which DEMO lets them."""
    rng, dead = np.random.default_rng(11), config.variant is Variant.PROD
    ids = np.where(rng.random(40) < share, -1, rng.integers(0, 99_092, 40))
    for layer, hash_ in config.hashes.items():
        case = rows_case(hash_, config.heads, config.pad, dead)
        want = second_opinion(hash_, config.heads, config.pad, dead, ids)
        for cuts in ((40,), (1,) * 40, (1, 2, 3, 34), (17, 1, 1, 21)):
            for compiled in (False, True):
                found = stepped(case, ids, cuts, compiled)
                np.testing.assert_array_equal(found, want, err_msg=f"{layer} {cuts}")


def test_equal_ngrams_have_equal_rows_wherever_they_stand() -> None:
    ids = np.array([7, 8, 9, 10, 3, 7, 8, 9, 10])
    found = stepped(rows_case(RELEASED.hashes[1], 8, 2, True), ids, (9,), False)
    np.testing.assert_array_equal(found[3], found[8])
    np.testing.assert_array_equal(found[2, :16], found[7, :16])  # orders 2 and 3
    assert not np.array_equal(found[2], found[7])


@pytest.mark.parametrize("name", ["v41", "v41_text"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_the_reduced_model(name: str, compiled: bool) -> None:
    """Row ids that an independent evaluator of V4.1 gave, with an image span in one of the prompts."""
    data = np.load(DATA / f"{name}.npz")
    config = EngramConfig(Variant.PROD, (1, 3), (1009,) * 3, 2, 32, 128, 4, 400, int(data["map"][2]), 512)
    image = 510
    assert (np.flatnonzero(data["image_mask"]) == np.flatnonzero(data["input_ids"] == image)).all()
    c = Case()
    table = c.weight_of("map", data["map"].astype(np.int32))
    c.op("compress_tokens", c.i32("tokens", B, T), table, dead=True, dead_token=image)
    inputs = {"tokens": data["input_ids"][None].astype(np.int32)}
    (ids,) = (c.run(inputs) if compiled else c.meaning(inputs)).values()
    assert (ids[0] < 0).sum() == data["image_mask"].sum()
    for i, layer in enumerate(config.layers):
        hash_ = config.hashes[layer]
        assert hash_.multipliers == tuple(data["engram.multipliers"][i])
        assert hash_.primes == tuple(data["engram.primes"][i].reshape(-1))
        case = rows_case(hash_, 2, config.pad, True)
        for cuts in ((len(ids[0]),), (8, 1, 3, len(ids[0]) - 12)):
            found = stepped(case, ids[0], cuts, compiled)
            np.testing.assert_array_equal(found, data[f"engram.rows.{layer}"])
