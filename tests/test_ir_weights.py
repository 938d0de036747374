"""Lazy weights: every operation's shape, value, stream and text, and the numbers of the rotary tables."""

from __future__ import annotations

import numpy as np
import pytest
from support import Arr, DictStore

from dsv4c.errors import CompileError, IRError
from dsv4c.ir import layouts, maps
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType, f32_to_bf16
from dsv4c.ir.lexer import Cursor
from dsv4c.ir.quantised import QUANTISED_OPS
from dsv4c.ir.text import parse_weight, print_weight
from dsv4c.ir.weights import WEIGHT_OPS, WeightExpr, materialise, stream, values

F32, BF16 = DType.F32, DType.BF16
STORE = DictStore()
RNG = np.random.default_rng(3)


def source(name: str, *shape: int, dtype: DType = F32) -> WeightExpr:
    """A random checkpoint tensor; small integers, so that every cast that should be exact is."""
    array = RNG.integers(-64, 64, shape)
    if dtype is BF16:
        return STORE.add(name, dtype, f32_to_bf16(array.astype(np.float32)))
    return STORE.add(name, dtype, array.astype(dtype.storage))


A, A2 = source("a", 5, 6), source("a2", 5, 6)
CUBE = source("cube", 3, 4, 6)
CODES = STORE.add("codes", DType.F8E4M3, np.arange(15, dtype=np.uint8).reshape(3, 5) * 8)
TILES = STORE.add("tiles", DType.F8E8M0, np.array([[127, 128, 126], [129, 127, 130]], np.uint8))
BYTES = STORE.add("bytes", DType.F8E4M3, np.arange(30, dtype=np.uint8).reshape(5, 6))
NIBBLES = STORE.add("nibbles", DType.F4E2M1X2, np.arange(36, dtype=np.uint8).reshape(2, 18) * 7)
GROUPS = STORE.add("groups", DType.F8E8M0, np.array([[127, 128], [126, 129]], np.uint8))


def array(name: str) -> Arr:
    return STORE.tensors[name]


def decoded_fp8() -> Arr:
    """Tiles of 2 x 2 over a 3 x 5 matrix, by the formula of one element."""
    out = np.zeros((3, 5), np.float32)
    for i, j in np.ndindex(3, 5):
        code = int(array("codes")[i, j])
        exponent, mantissa = code >> 3 & 15, code & 7
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        out[i, j] = value * 2.0 ** (int(array("tiles")[i // 2, j // 2]) - 127)
    return out


def decoded_fp4() -> Arr:
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    out = np.zeros((2, 36), np.float32)
    for i, j in np.ndindex(2, 36):
        code = int(array("nibbles")[i, j // 2]) >> 4 * (j % 2) & 15
        sign = -1 if code & 8 else 1
        out[i, j] = sign * table[code & 7] * 2.0 ** (int(array("groups")[i, j // 32]) - 127)
    return out


def paired(width: int) -> Arr:
    """Rows of 10 as two halves of 5 in blocks of `width`, zero-padded."""
    half = array("tall").shape[0] // 2
    rows = []
    for start in range(0, half, width):
        for first in (0, half):
            block = np.zeros((width, 6), np.float32)
            count = min(width, half - start)
            block[:count] = array("tall")[first + start : first + start + count]
            rows.append(block)
    return np.concatenate(rows)


TALL = source("tall", 10, 6)
POWERS = STORE.add("powers", F32, np.array([1, 2, 0.5, 4, 0.25, 1], np.float32))
TABLE = STORE.add("layers.0.ffn.gate.tid2eid", DType.I32, np.array([[3, 2], [1, 2]]))

CASES: dict[str, list[tuple[WeightExpr, Arr]]] = {
    "source": [(A, array("a"))],
    "decode_fp8": [(w.decode_fp8(CODES, TILES, (2, 2)), decoded_fp8())],
    "decode_fp4": [(w.decode_fp4(NIBBLES, GROUPS), decoded_fp4())],
    "cast": [
        (w.cast(A, BF16), f32_to_bf16(array("a"))),
        (w.cast(source("half", 2, 3, dtype=DType.F16), F32), array("half").astype(np.float32)),
        (w.cast(source("ids", 4, 2, dtype=DType.I64), DType.I32), array("ids").astype(np.int32)),
        (w.cast(w.cast(A, BF16), F32), array("a")),
    ],
    "take": [(w.take(CUBE, 2), array("cube")[2])],
    "rows": [(w.rows(A, 1, 4), array("a")[1:4])],
    "concat": [
        (w.concat((A, source("row", 1, 6), A2)), np.concatenate([array("a"), array("row"), array("a2")]))
    ],
    "stack": [(w.stack((A, A2)), np.stack([array("a"), array("a2")]))],
    "transpose": [(w.transpose(CUBE), array("cube").transpose(0, 2, 1)), (w.transpose(A), array("a").T)],
    "reshape": [(w.reshape(CUBE, (2, 36)), array("cube").reshape(2, 36))],
    "panel": [
        (w.panel(A, 4), np.stack([array("a")[:4].T, np.pad(array("a")[4:], ((0, 3), (0, 0))).T])),
        (w.panel(A, 5), array("a").T[None]),
    ],
    "pair_rows": [(w.pair_rows(TALL, 2), paired(2)), (w.pair_rows(TALL, 5), paired(5)),
                  (w.pair_rows(TALL, 8), paired(8))],
    # panels of 3 rows; each row's bytes in fours, even columns first, filled up with zeros
    "lane_words": [
        (layouts.lane_words(BYTES, 3),
         np.array([[[[0, 2, 1, 3], [6, 8, 7, 9], [12, 14, 13, 15]],
                    [[4, 0, 5, 0], [10, 0, 11, 0], [16, 0, 17, 0]]],
                   [[[18, 20, 19, 21], [24, 26, 25, 27], [0, 0, 0, 0]],
                    [[22, 0, 23, 0], [28, 0, 29, 0], [0, 0, 0, 0]]]], np.uint8)),
        # eight codes of 4 bits in a word: columns 0 2 4 6, then 1 3 5 7
        (layouts.lane_words(
            STORE.add("words4", DType.F4E2M1X2, np.array([[0x10, 0x32, 0x54, 0x76, 0x98]])), 1),
         np.array([[[[0x20, 0x64, 0x31, 0x75]], [[0x08, 0, 0x09, 0]]]], np.uint8)),
        # two of 16 bits
        (layouts.lane_words(STORE.add("words16", BF16, np.array([[1, 2, 3], [4, 5, 6]])), 2),
         np.array([[[[1, 2], [4, 5]], [[3, 0], [6, 0]]]], np.uint16)),
    ],
    "row_scales": [(layouts.row_scales(TILES, 3, 2),
                    np.array([[127, 128, 126], [127, 128, 126], [129, 127, 130]], np.uint8)),
                   (layouts.row_scales(TILES, 2, 1), np.array([[127, 128, 126], [129, 127, 130]], np.uint8))],
    "scale_columns": [(maps.scale_columns(A, POWERS), array("a") * array("powers"))],
    "evaluated": [
        (maps.evaluated(A, "scale", factor=0.5), array("a") * np.float32(0.5)),
        (maps.evaluated(A, "clamp", low=-1.0, high=0.5), np.clip(array("a"), -1, 0.5)),
    ],
    "unpacked": [(layouts.unpacked(A), array("a"))],
    "reroute": [
        # expert 1 goes: token 0 finds 2 taken and gets 0 instead, token 2 gets the nearest, which is 2
        (w.reroute(STORE.add("table", DType.I32, np.array([[3, 1], [0, 2], [1, 0]])), 4,
                   (0, -1, 2, 0, 1, -1, 2, -1)), np.array([[2, 0], [0, 1], [2, 0]])),
        # 0 and 1 go: the earlier slot chooses first, whatever the ids
        (w.reroute(STORE.add("ids64", DType.I64, np.array([[1, 0, 3], [0, 1, 2]])), 5,
                   (2, 0, 1, 2, 0, 1, 0, -1, -1, 1, -1, -1, 2, -1, -1)),
         np.array([[2, 0, 1], [2, 1, 0]])),
    ],
    "rope_frequencies": [(w.rope_frequencies(4, 100.0), np.array([1.0, 0.1], np.float32))],
}  # fmt: skip
ALL = [(name, expr, want) for name, cases in CASES.items() for expr, want in cases]
NESTED = w.stack((w.concat((w.cast(A, BF16), w.cast(A2, BF16))), w.cast(w.pair_rows(TALL, 5), BF16)))


def test_every_weight_operation_is_exercised_here() -> None:
    assert set(CASES) == set(WEIGHT_OPS) - set(QUANTISED_OPS)  # those are in test_requantise_weights
    assert all(expr.op == name for name, expr, _ in ALL)


@pytest.mark.parametrize(("name", "expr", "want"), ALL, ids=[n for n, _, _ in ALL])
def test_value_shape_and_stream(name: str, expr: WeightExpr, want: Arr) -> None:
    found = materialise(expr, STORE)
    np.testing.assert_array_equal(found, want)
    assert (found.shape, found.dtype) == (expr.shape, expr.dtype.storage)
    assert expr.nbytes == found.nbytes
    assert b"".join(piece.tobytes() for piece in stream(expr, STORE)) == found.tobytes()
    assert all(piece.flags.c_contiguous for piece in stream(expr, STORE))


@pytest.mark.parametrize("expr", [*(e for _, e, _ in ALL), NESTED])
def test_text_round_trip(expr: WeightExpr) -> None:
    text = print_weight(expr)
    again = parse_weight(Cursor(text))
    assert again.same(expr) and print_weight(again) == text
    assert (again.dtype, again.shape) == (expr.dtype, expr.shape)


def test_stacks_stream_one_leaf_at_a_time() -> None:
    pieces = list(stream(NESTED, STORE))
    assert [p.shape for p in pieces] == [(5, 6), (5, 6), (10, 6)]
    assert b"".join(p.tobytes() for p in pieces) == materialise(NESTED, STORE).tobytes()
    assert [str(s.attr("name")) for s in NESTED.sources()] == ["a", "a2", "tall"]


def test_same_tells_structures_apart() -> None:
    assert w.take(CUBE, 1).same(w.take(CUBE, 1)) and not w.take(CUBE, 1).same(w.take(CUBE, 2))
    assert not w.stack((A, A)).same(w.stack((A, A2))) and not w.stack((A,)).same(w.stack((A, A)))
    assert w.cast(A, F32) is A and w.reshape(A, (5, 6)) is A


def test_values_are_numbers_whatever_the_storage() -> None:
    np.testing.assert_array_equal(values(w.cast(A, BF16), STORE), array("a"))
    assert values(w.cast(A, BF16), STORE).dtype == np.float32


@pytest.mark.parametrize("value", [1 + 2.0**-9, 2.0**-140, 3.0e38 * 1.13])
def test_a_cast_that_would_change_a_value_names_the_tensor(value: float) -> None:
    fine = STORE.add("layers.7.attn.wq_a.weight", F32, np.array([1.0, value], np.float32))
    with pytest.raises(
        CompileError, match=r"layers\.7\.attn\.wq_a\.weight: values of f32 do not fit bf16"
    ) as info:
        materialise(w.cast(w.reshape(fine, (1, 2)), BF16), STORE)
    assert "--weights f32" in info.value.hint


def test_integer_casts_are_checked_as_well() -> None:
    ids = STORE.add("tid2eid", DType.I64, np.array([1, 2**40]))
    with pytest.raises(CompileError, match="tid2eid: values of i64 do not fit i32"):
        materialise(w.cast(ids, DType.I32), STORE)
    np.testing.assert_array_equal(materialise(w.cast(w.rows(ids, 0, 1), DType.I32), STORE), [1])


def test_nan_survives_a_cast() -> None:
    odd = STORE.add("odd", F32, np.array([np.nan, np.inf, -0.0], np.float32))
    found = values(w.cast(odd, BF16), STORE)
    assert np.isnan(found[0]) and found[1] == np.inf and np.signbit(found[2])


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: w.decode_fp8(CODES, GROUPS, (2, 2)), r"needs a scale of shape \[2, 3\]"),
        (lambda: w.decode_fp8(CUBE, GROUPS, (2, 2)), "decode_fp8 takes a matrix"),
        (lambda: w.decode_fp4(NIBBLES, TILES), r"needs a scale of \[2, 2\]"),
        (lambda: w.take(CUBE, 3), "take 3 is out of range"),
        (lambda: w.take(CUBE, -1), "take -1 is out of range"),
        (lambda: w.rows(A, 2, 6), "rows 2:6 are out of range"),
        (lambda: w.rows(A, 2, 2), "rows 2:2 are out of range"),
        (lambda: w.concat((A, CUBE)), "concat needs equal row shapes"),
        (lambda: w.concat((A, w.cast(A, BF16))), "concat needs equal row shapes"),
        (lambda: w.stack((A, TALL)), "stack needs equal tensors"),
        (lambda: w.transpose(w.take(A, 0)), "transpose needs a matrix"),
        (lambda: w.reshape(A, (4, 7)), "changes the element count"),
        (lambda: w.panel(CUBE, 4), "panel takes a matrix"),
        (lambda: w.pair_rows(A, 4), "two halves"),
        (lambda: w.reroute(A, 2, (0, 1)), "reroute takes a table of ids, got f32"),
        (lambda: w.reroute(TABLE, 3, (0, 1)), "a row of choices for each of 3 experts"),
        (lambda: w.reroute(TABLE, 0, ()), "a row of choices for each of 0 experts"),
    ],
)
def test_expressions_that_do_not_fit_are_refused(build: object, what: str) -> None:
    assert callable(build)
    with pytest.raises(IRError, match=what):
        build()


@pytest.mark.parametrize(
    ("choices", "what"),
    [
        ((0, 1, 2), "token 0 goes to an expert beyond 2"),
        ((0, 1, 1, 0), "token 1 finds no distinct experts"),
        ((0, 1, 2, 2), "token 0 finds no distinct experts"),
    ],
)
def test_a_table_that_cannot_be_rerouted_names_the_token(choices: tuple[int, ...], what: str) -> None:
    with pytest.raises(CompileError, match=f"layers.0.ffn.gate.tid2eid: {what}"):
        materialise(w.reroute(TABLE, len(choices), choices), STORE)


def test_rotary_frequencies_of_the_specification() -> None:
    """Section 3.6: theta 160000, factor 16, YaRN from 65536 positions, 64 rotated channels."""
    plain = w.rope_table(64, 10000.0, 1.0, 0, 32.0, 1.0)
    np.testing.assert_allclose(plain, 10000.0 ** (-np.arange(32) / 32), rtol=3e-7)
    found = w.rope_table(64, 160000.0, 16.0, 65536, 32.0, 1.0)
    given = {16: 2.26562493e-3, 20: 2.96977785e-4, 25: 5.37231244e-6, 31: 5.6805294e-7}
    np.testing.assert_allclose(found[list(given)], list(given.values()), rtol=3e-7)
    base = 160000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(found[:16], base[:16], rtol=3e-7)  # up to lo = 15 nothing changes
    np.testing.assert_allclose(found[25:], base[25:] / 16, rtol=3e-7)  # from hi = 25 all is divided
    assert found.dtype == np.float32
