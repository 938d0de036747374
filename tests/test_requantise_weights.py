"""Weight expressions of storage schemes: values, text, refusals, packed forms, and changes of scheme."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support import Arr, DictStore

from dsv4c.errors import CompileError, IRError, ParseError
from dsv4c.ir import quantised as q
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType, decode, f32_to_bf16
from dsv4c.ir.encode import decode_matrix, encode
from dsv4c.ir.formats import SCHEMES, Scheme
from dsv4c.ir.lexer import Cursor
from dsv4c.ir.packed import (
    Packed,
    format_of,
    is_bf16,
    keeps_values,
    matrices,
    packed_form,
    requantised,
)  # fmt: skip
from dsv4c.ir.recode import EXACT
from dsv4c.ir.text import parse_weight, print_weight
from dsv4c.ir.weights import WeightExpr, materialise, stream, values

RNG = np.random.default_rng(11)
SCALED = [s for s in SCHEMES.values() if not s.plain]


class CountingStore(DictStore):
    """Counts how often each tensor is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def read(self, name: str) -> Arr:
        self.reads.append(name)
        return super().read(name)


STORE = CountingStore()


def matrix(rows: int, cols: int, dtype: DType = DType.F32) -> WeightExpr:
    x = RNG.standard_normal((rows, cols)).astype(np.float32)
    return STORE.add(f"w{len(STORE.tensors)}", dtype, f32_to_bf16(x) if dtype is DType.BF16 else x)


def fp8(rows: int, cols: int, block: tuple[int, int] = (128, 128)) -> WeightExpr:
    codes = RNG.integers(0, 0x7F, (rows, cols)) | RNG.choice([0, 0x80], (rows, cols))
    scales = RNG.integers(110, 130, (-(-rows // block[0]), -(-cols // block[1])))
    name = f"w{len(STORE.tensors)}"
    return w.decode_fp8(
        STORE.add(name, DType.F8E4M3, codes), STORE.add(name + ".scale", DType.F8E8M0, scales), block
    )


def fp4(rows: int, cols: int) -> WeightExpr:
    name = f"w{len(STORE.tensors)}"
    return w.decode_fp4(
        STORE.add(name, DType.F4E2M1X2, RNG.integers(0, 256, (rows, cols // 2))),
        STORE.add(name + ".scale", DType.F8E8M0, RNG.integers(115, 122, (rows, -(-cols // 32)))),
    )


def unpacked(p: Packed) -> Arr:
    """The values of a packed weight, matrix by matrix, from nothing but its parts."""
    parts = [materialise(part, STORE) for part in p.parts]
    if parts[0].ndim == 2:
        return decode_matrix(parts[0], parts[1], parts[2] if len(parts) > 2 else None, p.scheme)
    rows = [
        decode_matrix(one[0], one[1], one[2] if len(one) > 2 else None, p.scheme)
        for one in zip(*parts, strict=True)
    ]
    return np.stack(rows)


# ------------------------------------------------------------------------------ single operations


@pytest.mark.parametrize("scheme", SCALED, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_encodings_are_those_of_the_arithmetic(scheme: Scheme, dtype: DType) -> None:
    x = matrix(131, 70, dtype)
    made = encode(np.asarray(values(x, STORE), np.float32), scheme)
    codes, scales = q.encode_codes(x, scheme=scheme), q.encode_scales(x, scheme=scheme.name)
    pairs = [(codes, made.codes), (scales, made.scales)]
    tensor = None
    if made.tensor_scale is not None:
        tensor = q.encode_tensor_scale(x, scheme=scheme)
        pairs.append((tensor, made.tensor_scale))
    for expr, want in pairs:
        found = materialise(expr, STORE)
        assert np.array_equal(found, want)
        assert (found.shape, found.dtype) == (expr.shape, expr.dtype.storage) and expr.nbytes == found.nbytes
    whole = q.decode(codes, scales, tensor, scheme=scheme)
    want = decode_matrix(made.codes, made.scales, made.tensor_scale, scheme)
    assert np.array_equal(values(whole, STORE), want)
    assert (whole.dtype, whole.shape) == (DType.F32, (131, 70))
    assert whole.same(requantised(x, scheme))


@pytest.mark.parametrize("scheme", SCALED, ids=lambda s: s.name)
def test_text_round_trips_and_means_the_same(scheme: Scheme) -> None:
    x = matrix(4, 64)
    importance = STORE.add("importance", DType.F32, RNG.random(64))
    exprs = [requantised(x, scheme)]
    if scheme.block[0] == 1:
        exprs += [requantised(x, scheme, True), requantised(x, scheme, True, importance)]
    for expr in exprs:
        again = parse_weight(Cursor(print_weight(expr)))
        assert again.same(expr) and print_weight(again) == print_weight(expr)
        assert q.encoded_from(again) is None, "equal text is not the same object: the general way is taken"
        assert np.array_equal(values(again, STORE), values(expr, STORE))


def test_recodings_print_and_parse() -> None:
    for old, new in EXACT:
        expr = requantised(fp8(130, 64) if old == "fp8" else fp4(130, 64), new)
        assert parse_weight(Cursor(print_weight(expr))).same(expr)
        assert packed_form(expr).scheme.name == new  # type: ignore[union-attr]


def test_a_round_trip_reads_its_values_once() -> None:
    x = matrix(8, 64)
    for scheme in ("int8", "nvfp4"):
        STORE.reads.clear()
        values(requantised(x, scheme), STORE)
        assert STORE.reads == [x.attr("name")]


def test_streams_go_one_matrix_at_a_time() -> None:
    parts = [matrix(6, 32) for _ in range(4)]
    stacked = requantised(w.stack((w.concat((parts[0], parts[1])), w.concat((parts[2], parts[3])))), "int4")
    held = packed_form(stacked)
    assert held is not None
    assert [p.shape for p in stream(held.codes, STORE)] == [(6, 16)] * 4
    joined = b"".join(p.tobytes() for p in stream(held.codes, STORE))
    assert joined == materialise(held.codes, STORE).tobytes()


def test_plain_schemes_round_or_unpack() -> None:
    x = matrix(3, 8)
    narrow = requantised(x, "bf16")
    assert np.array_equal(materialise(narrow, STORE), f32_to_bf16(materialise(x, STORE)))
    assert narrow.dtype is DType.BF16 and is_bf16(narrow)
    assert requantised(x, "f32") is x and requantised(narrow, "bf16") is narrow
    wide = requantised(fp8(3, 8), "f32")
    assert packed_form(wide) is None and format_of(wide) == "f32" and not is_bf16(wide)
    assert np.array_equal(materialise(wide, STORE), values(wide.args[0], STORE))
    assert format_of(requantised(fp8(3, 8), "bf16")) == "bf16"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_no_scheme_can_hold_are_refused_by_name(bad: float) -> None:
    x = STORE.add("layers.9.attn.wq_a.weight", DType.F32, np.array([[1, bad]]))
    for expr in (q.encode_codes(x, scheme="int8"), q.encode_scales(x, scheme="fp8"), requantised(x, "mxfp4")):
        with pytest.raises(CompileError, match=r"layers\.9\.attn\.wq_a\.weight: a value to encode is NaN"):
            materialise(expr, STORE)


def test_a_recoding_that_is_not_exact_names_the_tensor() -> None:
    wide = w.decode_fp4(
        STORE.add("layers.1.ffn.experts.0.w1.weight", DType.F4E2M1X2, np.full((1, 32), 0x11)),
        STORE.add("wide.scale", DType.F8E8M0, np.array([[120, 100]])),
    )
    expr = requantised(wide, "fp8")
    with pytest.raises(CompileError, match=r"layers\.1\.ffn\.experts\.0\.w1\.weight: scales inside one"):
        materialise(expr, STORE)
    assert np.array_equal(values(requantised(wide, "mxfp8"), STORE), values(wide, STORE))


X, ODD, CUBE, TABLE = matrix(4, 64), matrix(4, 7), matrix(4, 64), w.source("t", DType.I32, (4, 64))
CODES, SCALES = q.encode_codes(X, scheme="int8"), q.encode_scales(X, scheme="int8")
N4 = (q.encode_codes(X, scheme="nvfp4"), q.encode_scales(X, scheme="nvfp4"))


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: q.encode_codes(X, scheme="int9"), "unknown scheme 'int9'; .*\n.*did you mean 'int8'"),
        (lambda: q.encode_codes(w.stack((X, X)), scheme="int8"), "takes a matrix of numbers"),
        (lambda: q.encode_scales(TABLE, scheme="int8"), "takes a matrix of numbers"),
        (lambda: q.encode_codes(ODD, scheme="mxfp4"), "mxfp4 packs pairs of columns, got f32"),
        (lambda: q.encode_scales(X, scheme="bf16"), "bf16 has no scales"),
        (lambda: q.encode_tensor_scale(X, scheme="int8"), "int8 has no tensor scale"),
        (lambda: q.encode_codes(X, scheme="fp8", search=True), "fp8 has no scale of its own per row"),
        (lambda: q.encode_codes(X, w.rows(X, 0, 1), scheme="int8", search=True), "one importance per column"),
        (lambda: q.encode_codes(X, w.take(X, 0), scheme="int8"), "one importance per column"),
        (lambda: q.decode(CODES, SCALES, scheme="f32"), "f32 needs no decoding"),
        (lambda: q.decode(X, SCALES, scheme="int8"), "int8 has codes i8, got f32"),
        (lambda: q.decode(CODES, w.rows(SCALES, 0, 2), scheme="int8"), r"int8 needs scales f32\[4, 1\]"),
        (lambda: q.decode(CODES, w.cast(SCALES, DType.BF16), scheme="int8"), "int8 needs scales f32"),
        (lambda: q.decode(CODES, SCALES, w.take(X, 0), scheme="int8"), "int8 takes no tensor scale"),
        (lambda: q.decode(*N4, scheme="nvfp4"), "nvfp4 takes a tensor scale"),
        (lambda: q.decode(*N4, w.source("t", DType.F32, (3,)), scheme="nvfp4"), "equal bands of 4 rows"),
        (lambda: q.recode_codes(CODES, SCALES, old="int8", new="fp8"), "no conversion from int8 to fp8"),
        (lambda: q.recode_codes(CODES, SCALES, old="fp8", new="mxfp8"), "fp8 has codes f8e4m3"),
        (lambda: q.recode_scales(SCALES, old="fp8", new="mxfp8", shape=(4, 64)), "needs the scales of fp8"),
    ],
)  # fmt: skip
def test_expressions_that_do_not_fit_are_refused(build: Callable[[], WeightExpr], what: str) -> None:
    with pytest.raises(IRError, match=what):
        build()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("encode_codes(X){scheme = 3}", "encode_codes.scheme = 3 is mistyped"),
        ("encode_codes(X){scheme = \"int8\", search = 1}", "search = 1 is mistyped"),
        ("decode(X)", "bad operands of weight operation decode"),
        ("encode_scales(X)", "bad operands of weight operation encode_scales"),
    ],
)
def test_text_that_does_not_fit_is_refused(text: str, what: str) -> None:
    with pytest.raises(ParseError, match=what):
        parse_weight(Cursor(text.replace("X", 'source{name = "x", dtype = f32, shape = [2, 2]}')))


# ------------------------------------------------------------------------------------ packed forms


def cases() -> list[tuple[str, WeightExpr, str | None]]:
    """(name, expression, scheme of its packed form)"""
    w13 = w.stack(tuple(w.concat((fp4(24, 64), fp4(24, 64))) for _ in range(3)))
    n4 = [requantised(matrix(6, 32), "nvfp4") for _ in range(5)]
    tall = requantised(matrix(12, 32), "nvfp4")
    both = w.concat((n4[0], n4[1]))
    return [
        ("fp8", fp8(130, 40), "fp8"),
        ("mxfp8 as decode_fp8", fp8(3, 64, (1, 32)), "mxfp8"),
        ("tiles of another size", fp8(130, 40, (64, 64)), None),
        ("fp4", fp4(3, 66), "mxfp4"),
        ("experts", w13, "mxfp4"),
        ("one expert", w.take(w13, 1), "mxfp4"),
        ("some experts", w.rows(w13, 1, 3), "mxfp4"),
        ("rows of one expert", w.rows(w.take(w13, 2), 5, 30), "mxfp4"),
        ("experts of other schemes", w.stack((requantised(fp4(4, 32), "int8"), fp4(4, 32))), None),
        ("half decoded", w.concat((fp4(4, 32), matrix(4, 32))), None),
        ("whole tiles, then a ragged one", w.concat((fp8(256, 40), fp8(7, 40))), "fp8"),
        ("a ragged tile in the middle", w.concat((fp8(7, 40), fp8(256, 40))), None),
        ("rows between tiles", w.rows(fp8(300, 40), 128, 300), "fp8"),
        ("whole tiles", w.rows(fp8(300, 40), 0, 256), "fp8"),
        ("rows that cut a tile below", w.rows(fp8(300, 40), 0, 200), None),
        ("rows that cut a tile above", w.rows(fp8(300, 40), 1, 128), None),
        ("rows of int8", w.rows(requantised(matrix(9, 31), "int8"), 2, 5), "int8"),
        ("two tensor scales", both, "nvfp4"),
        ("experts with two tensor scales", w.stack((both, w.concat((n4[2], n4[3])))), "nvfp4"),
        ("tensor scales of unequal bands", w.concat((n4[0], tall)), None),
        ("tensor scales that cannot stack", w.stack((tall, both)), None),
        ("rows of one band", w.rows(both, 7, 11), "nvfp4"),
        ("rows of both bands", w.rows(both, 4, 9), None),
        ("one of three bands", w.rows(w.concat((*n4[:3],)), 6, 12), "nvfp4"),
        ("two of three bands", w.rows(w.concat((*n4[:3],)), 6, 18), "nvfp4"),
        ("transposed", w.transpose(fp4(32, 32)), None),
        ("plain", matrix(2, 2), None),
        ("narrowed", w.cast(fp8(2, 2), DType.BF16), None),
    ]


@pytest.mark.parametrize(("name", "x", "scheme"), (c := cases()), ids=[n for n, _, _ in c])
def test_a_packed_form_stands_for_the_same_values(name: str, x: WeightExpr, scheme: str | None) -> None:
    held = packed_form(x)
    assert (held.scheme.name if held else None) == scheme
    if held:
        assert np.array_equal(unpacked(held), values(x, STORE))
        assert held.codes.dtype is held.scheme.code and held.scales.dtype is held.scheme.scale
        assert held.codes.shape[:-2] == x.shape[:-2] == held.scales.shape[:-2]
        assert held.nbytes == sum(materialise(p, STORE).nbytes for p in held.parts)


# --------------------------------------------------------------------------------- change of scheme


@pytest.mark.parametrize(("old", "new"), list(EXACT))
def test_exact_changes_are_exact_at_every_depth(old: str, new: str) -> None:
    one = [fp8(256, 64) if old == "fp8" else fp4(256, 64) for _ in range(4)]
    x = w.stack((w.concat((one[0], one[1])), w.concat((one[2], one[3]))))
    changed = requantised(x, new)
    held = packed_form(changed)
    assert held is not None and held.scheme is SCHEMES[new]
    assert np.array_equal(values(changed, STORE), values(x, STORE))
    assert np.array_equal(unpacked(held), values(x, STORE))
    assert all(keeps_values(m, SCHEMES[new]) for m in matrices(x))
    assert not any(e.op.startswith("encode") for m in matrices(changed) for e in m.args)


def test_a_scheme_that_is_there_stays() -> None:
    for x in (fp8(5, 64), fp4(5, 64), requantised(matrix(5, 64), "int4_g64")):
        name = format_of(x)
        assert requantised(x, name) is x and keeps_values(x, SCHEMES[name])
    assert not keeps_values(fp8(5, 64), SCHEMES["int8"]) and not keeps_values(matrix(5, 64), SCHEMES["fp8"])
    assert keeps_values(fp8(5, 64), SCHEMES["bf16"]) and keeps_values(matrix(5, 64), SCHEMES["f32"])
    assert not keeps_values(matrix(5, 64), SCHEMES["bf16"])


def test_what_is_bf16_by_construction() -> None:
    assert all(is_bf16(requantised(matrix(4, 64), s)) for s in ("fp8", "mxfp8", "mxfp4", "fp8_fnuz", "bf16"))
    assert not any(is_bf16(requantised(matrix(4, 64), s)) for s in ("int8", "int4", "nvfp4", "fp8_f32"))
    x = requantised(matrix(40, 64), "mxfp4")
    exact = decode(materialise(w.cast(x, DType.BF16), STORE), DType.BF16)
    assert np.array_equal(exact, values(x, STORE))
