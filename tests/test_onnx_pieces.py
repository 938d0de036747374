"""Weights in pieces: the bytes of the whole, one reading per matrix, bounded work ahead, errors in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support import Arr, DictStore

from dsv4c.errors import CompileError
from dsv4c.ir import quantised as q
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.expr import WeightExpr
from dsv4c.ir.packed import packed_form, requantised
from dsv4c.ir.rows import by_rows, rows_of
from dsv4c.targets.onnx import pieces
from dsv4c.targets.onnx.stored import transposed

RNG = np.random.default_rng(5)


class CountingStore(DictStore):
    """Counts how often each tensor is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def read(self, name: str) -> Arr:
        self.reads.append(name)
        return super().read(name)


def fp4(store: DictStore, rows: int, cols: int) -> WeightExpr:
    name = f"w{len(store.tensors)}"
    codes = store.add(name, DType.F4E2M1X2, RNG.integers(0, 256, (rows, cols // 2)))
    scales = store.add(name + ".scale", DType.F8E8M0, RNG.integers(118, 130, (rows, -(-cols // 32))))
    return w.decode_fp4(codes, scales)


def fp8(store: DictStore, rows: int, cols: int, block: tuple[int, int] = (16, 24)) -> WeightExpr:
    name = f"w{len(store.tensors)}"
    codes = RNG.integers(0, 0x7F, (rows, cols)) | RNG.choice([0, 0x80], (rows, cols))
    scales = RNG.integers(118, 130, (-(-rows // block[0]), -(-cols // block[1])))
    source = store.add(name, DType.F8E4M3, codes)
    return w.decode_fp8(source, store.add(name + ".scale", DType.F8E8M0, scales), block)


def bf16(store: DictStore, rows: int, cols: int) -> WeightExpr:
    return store.add(f"w{len(store.tensors)}", DType.BF16, RNG.integers(0x3E00, 0x4000, (rows, cols)))


MADE: dict[str, Callable[[DictStore], WeightExpr]] = {
    "fp4": lambda s: fp4(s, 70, 96),
    "fp4 in groups that end early": lambda s: fp4(s, 70, 40),
    "fp8 in ragged tiles": lambda s: fp8(s, 70, 50),
    "bf16": lambda s: bf16(s, 70, 33),
    "a cast": lambda s: w.cast(bf16(s, 70, 33), DType.F32),
    "rows of fp8": lambda s: w.rows(fp8(s, 70, 50), 5, 61),
    "a stack of joins": lambda s: w.stack(
        tuple(w.concat((fp4(s, 20, 64), fp4(s, 36, 64))) for _ in range(3))
    ),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("piece", [1, 64 * 7, 1 << 23])
def test_numbers_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[DictStore], WeightExpr], piece: int
) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    store = DictStore()
    x = made(store)
    want = np.asarray(decode(w.materialise(x, store), x.dtype), np.float32)
    found = list(pieces.pieces(x, store))
    assert b"".join(f.tobytes() for f in found) == want.tobytes()
    assert {f.dtype for f in found} == {np.dtype(np.float32)}
    if piece == 1:
        assert len(found) == want.size // want.shape[-1], "a row each"


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("piece", [64 * 7, 1 << 23])
def test_codes_and_scales_come_from_one_reading(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[DictStore], WeightExpr], swapped: bool, piece: int
) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    store = CountingStore()
    held = packed_form(requantised(made(store), "int8"))
    assert held is not None
    if swapped and held.codes.op == "stack" and held.codes.args[0].op == "concat":
        pytest.skip("what is transposed is a stack of single matrices")
    codes = transposed(held.codes) if swapped else held.codes
    want = [w.materialise(codes, store), w.materialise(held.scales, store)]
    store.reads.clear()
    scales: list[Arr] = []
    found = list(pieces.code_pieces(codes, held.scales, store, scales))
    assert b"".join(f.tobytes() for f in found) == want[0].tobytes()
    assert b"".join(s.tobytes() for s in scales) == want[1].tobytes()
    if piece == 1 << 23:
        assert len(store.reads) == len(set(store.reads)) == len(store.tensors)


def test_codes_with_scales_of_their_own_are_taken_as_they_are() -> None:
    store = DictStore()
    codes = store.add("c", DType.I8, RNG.integers(-127, 128, (12, 7)))
    scales = store.add("s", DType.F32, RNG.random((12, 1)))
    made: list[Arr] = []
    found = np.concatenate(list(pieces.code_pieces(codes, scales, store, made)))
    assert np.array_equal(found, store.tensors["c"]) and np.array_equal(made[0], store.tensors["s"])


def test_scales_of_other_values_are_not_taken_for_those_of_the_codes() -> None:
    store = DictStore()
    a, b = fp4(store, 8, 64), fp4(store, 8, 64)
    codes, scales = q.encode_codes(a, scheme="int8"), q.encode_scales(b, scheme="int8")
    made: list[Arr] = []
    list(pieces.code_pieces(codes, scales, store, made))
    assert np.array_equal(made[0], w.materialise(scales, store))
    assert not np.array_equal(made[0], w.materialise(q.encode_scales(a, scheme="int8"), store))


@pytest.mark.parametrize("shape", [(1, 8), (64, 16), (65, 24), (200, 7), (3, 9)])
def test_transposed_bytes(shape: tuple[int, int]) -> None:
    x = RNG.integers(-128, 128, shape).astype(np.int8)
    found = pieces._transposed(x)
    assert np.array_equal(found, x.T) and found.flags.c_contiguous


@pytest.mark.parametrize("start,stop", [(0, 1), (15, 17), (16, 32), (31, 70), (69, 70)])
def test_rows_are_those_of_the_whole_wherever_tiles_end(start: int, stop: int) -> None:
    for made in (lambda s: fp8(s, 70, 50), lambda s: fp4(s, 70, 40)):
        store = DictStore()
        x = made(store)
        read = rows_of(x, lambda y, store=store: w.materialise(y, store))
        assert by_rows(x)
        assert np.array_equal(read(slice(start, stop)), w.materialise(x, store)[start:stop])


# ------------------------------------------------------------------------------------- in order


def test_results_keep_their_order_and_little_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "THREADS", 3)
    started, taken, most, lock = 0, 0, 0, threading.Lock()

    def job(i: int) -> int:
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - taken)
        return i

    jobs: Iterator[Callable[[], int]] = ((lambda i=i: job(i)) for i in range(100))
    for i, result in enumerate(pieces.in_order(jobs)):
        assert result == i
        with lock:
            taken += 1
    assert taken == 100 and most <= 2 * 3 + 1


def test_an_error_comes_in_its_place_and_stops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "THREADS", 2)
    ran: list[int] = []

    def job(i: int) -> int:
        ran.append(i)
        if i == 5:
            raise CompileError("no such number")
        return i

    jobs: Iterator[Callable[[], int]] = ((lambda i=i: job(i)) for i in range(1000))
    seen: list[int] = []
    with pytest.raises(CompileError, match="no such number"):
        for result in pieces.in_order(jobs):
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4] and len(ran) <= 10


def test_a_value_that_cannot_be_encoded_is_named() -> None:
    store = DictStore()
    numbers = np.ones((4, 8), np.float32)
    numbers[2, 3] = np.nan
    held = packed_form(requantised(store.add("layers.0.w", DType.F32, numbers), "int8"))
    assert held is not None
    with pytest.raises(CompileError, match="NaN or infinite") as caught:
        list(pieces.code_pieces(held.codes, held.scales, store, []))
    assert caught.value.where == "layers.0.w"
