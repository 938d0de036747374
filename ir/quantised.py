"""Weight operations of the storage schemes: encode, decode, and the changes of storage that keep values.

Owns their shapes and attributes and ties them to the arithmetic of `encode.py` and `recode.py`. Knows
nothing of the other weight operations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4c.errors import CompileError, IRError, unknown

from . import encode
from .attrs import Attr
from .dtypes import Array, DType
from .dtypes import decode as numbers
from .expr import WeightExpr, describe, expect
from .formats import SCHEMES, Scheme
from .recode import EXACT
from .rows import Whole, rows_of

Named = Scheme | str


def scheme_of(x: WeightExpr) -> Scheme:
    """The scheme that an operation of this module names."""
    return SCHEMES[str(x.attr("scheme"))]


def named(scheme: Named) -> Scheme:
    """A scheme by its name; raises `IRError` for one that is not in the table."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise unknown("scheme", str(scheme), SCHEMES, IRError)
    return SCHEMES[scheme]


# ------------------------------------------------------------------------------ constructors


def encode_codes(
    x: WeightExpr, importance: WeightExpr | None = None, *, scheme: Named, search: bool = False
) -> WeightExpr:
    """The codes of a float matrix [rows, cols] in `scheme`; a packed type counts bytes.

    Args:
        importance: f32 [cols], what the squared error of a column counts for; only with `search`.
        search: pick each scale by least squared error, see `encode.encode`.
    """
    s = named(scheme)
    expect(len(x.shape) == 2 and x.dtype.is_float, "encode_codes takes a matrix of numbers", x)
    expect(x.shape[1] % s.values_per_byte == 0, f"{s.name} packs pairs of columns", x)
    return _encoding("encode_codes", x, importance, s, search, s.code, s.code_shape(*x.shape))


def encode_scales(
    x: WeightExpr, importance: WeightExpr | None = None, *, scheme: Named, search: bool = False
) -> WeightExpr:
    """The scales that belong to `encode_codes` of the same operands and attributes."""
    s = named(scheme)
    expect(len(x.shape) == 2 and x.dtype.is_float, "encode_scales takes a matrix of numbers", x)
    if s.scale is None:
        raise IRError(f"{s.name} has no scales", where=describe(x))
    return _encoding("encode_scales", x, importance, s, search, s.scale, s.scale_shape(*x.shape))


def encode_tensor_scale(x: WeightExpr, *, scheme: Named) -> WeightExpr:
    """The one more scale, f32 [1], of a scheme that has it."""
    s = named(scheme)
    expect(s.tensor_scale, f"{s.name} has no tensor scale", x)
    return WeightExpr("encode_tensor_scale", (x,), (("scheme", s.name),), DType.F32, (1,))


def _encoding(
    op: str, x: WeightExpr, importance: WeightExpr | None, s: Scheme, search: bool, dtype: DType,
    shape: tuple[int, ...],
) -> WeightExpr:  # fmt: skip
    if importance is not None:
        fits = search and importance.shape == x.shape[1:]
        expect(fits, f"{op} takes one importance per column, with search", importance)
    if search and (s.plain or s.tile(*x.shape)[0] != 1):
        raise IRError(f"{s.name} has no scale of its own per row to search for", where=describe(x))
    args = (x,) if importance is None else (x, importance)
    attrs: tuple[tuple[str, Attr], ...] = (("scheme", s.name), ("search", search))
    return WeightExpr(op, args, attrs, dtype, shape)


def decode(
    codes: WeightExpr, scales: WeightExpr, tensor_scale: WeightExpr | None = None, *, scheme: Named
) -> WeightExpr:
    """Codes and scales of one matrix in `scheme` -> f32 [rows, cols].

    Args:
        tensor_scale: f32 [n], n dividing the rows, one for each of the n equal bands of rows; given for the
            schemes that have it and for no other.
    """
    s = named(scheme)
    if s.scale is None:
        raise IRError(f"{s.name} needs no decoding", where=describe(codes))
    expect(len(codes.shape) == 2 and codes.dtype is s.code, f"{s.name} has codes {s.code.value}", codes)
    rows, cols = codes.shape[0], codes.shape[1] * s.values_per_byte
    wanted = s.scale_shape(rows, cols)
    fits = scales.dtype is s.scale and scales.shape == wanted
    expect(fits, f"{s.name} needs scales {s.scale.value}{list(wanted)}", scales)
    if (tensor_scale is not None) != s.tensor_scale:
        raise IRError(f"{s.name} takes {'a' if s.tensor_scale else 'no'} tensor scale", where=describe(codes))
    args: tuple[WeightExpr, ...] = (codes, scales)
    if tensor_scale is not None:
        t = tensor_scale
        even = t.dtype is DType.F32 and len(t.shape) == 1 and rows % t.shape[0] == 0
        expect(even, f"{s.name} needs f32 tensor scales for equal bands of {rows} rows", t)
        args = (codes, scales, t)
    return WeightExpr("decode", args, (("scheme", s.name),), DType.F32, (rows, cols))


def recode_codes(codes: WeightExpr, scales: WeightExpr, *, old: str, new: str) -> WeightExpr:
    """Codes of scheme `new` for the very values that codes and scales of scheme `old` stand for."""
    how, before, after = EXACT[_pair(old, new, codes)], SCHEMES[old], SCHEMES[new]
    expect(codes.dtype is before.code, f"{old} has codes {before.code.value}", codes)
    rows, cols = codes.shape[0], codes.shape[1] * before.values_per_byte
    expect(scales.shape == before.scale_shape(rows, cols), f"recode_codes needs the scales of {old}", scales)
    if how.codes is None:
        return codes
    attrs = (("old", old), ("new", new))
    return WeightExpr("recode_codes", (codes, scales), attrs, after.code, after.code_shape(rows, cols))


def recode_scales(scales: WeightExpr, *, old: str, new: str, shape: tuple[int, ...]) -> WeightExpr:
    """The scales that belong to `recode_codes`; `shape` is [rows, cols] of the values."""
    how, before, after = EXACT[_pair(old, new, scales)], SCHEMES[old], SCHEMES[new]
    rows, cols = shape
    fits = scales.dtype is before.scale and scales.shape == before.scale_shape(rows, cols)
    expect(fits, f"recode_scales needs the scales of {old} for {list(shape)}", scales)
    if how.scales is None:
        return scales
    attrs: tuple[tuple[str, Attr], ...] = (("old", old), ("new", new), ("shape", (rows, cols)))
    assert after.scale is not None
    return WeightExpr("recode_scales", (scales,), attrs, after.scale, after.scale_shape(rows, cols))


def _pair(old: str, new: str, x: WeightExpr) -> tuple[str, str]:
    if (old, new) not in EXACT:
        what = f"no conversion from {old} to {new} keeps every value"
        raise IRError(what, where=describe(x), allowed=", ".join(f"{a} to {b}" for a, b in EXACT))
    return old, new


# -------------------------------------------------------------------------------- evaluation


def encoded(x: WeightExpr, whole: Whole) -> encode.Encoded:
    """What an operation of `ENCODINGS` makes: of `encode_codes` all parts, of the others the part they name.

    Raises:
        CompileError: a value is NaN or infinite.
    """
    values, scheme = x.args[0], scheme_of(x)
    raw = rows_of(values, whole)
    importance = None
    if len(x.args) > 1:
        importance = np.asarray(numbers(whole(x.args[1]), x.args[1].dtype), np.float32)

    def read(band: slice) -> Array:
        return numbers(raw(band), values.dtype)

    try:
        if x.op == "encode_tensor_scale":
            none = np.empty(0, np.float32)
            return encode.Encoded(none, none, encode.tensor_scale_rows(read, values.shape, scheme))
        search, only_scales = x.attr("search") is True, x.op == "encode_scales"
        return encode.encode_rows(read, values.shape, scheme, search, importance, only_scales)
    except CompileError as error:
        error.where = error.where or describe(x)
        raise


def encoded_part(x: WeightExpr, whole: Whole) -> Array:
    """The raw storage of an operation of `ENCODINGS`."""
    made = encoded(x, whole)
    if x.op == "encode_tensor_scale":
        assert made.tensor_scale is not None
        return made.tensor_scale
    return made.codes if x.op == "encode_codes" else made.scales


def _decode(x: WeightExpr, args: list[Array]) -> Array:
    return encode.decode_matrix(args[0], args[1], args[2] if len(args) > 2 else None, scheme_of(x))


def encoded_from(x: WeightExpr) -> WeightExpr | None:
    """The `encode_codes` below a decode whose scales come from the very same values, if that is what x is.

    Such a pair is evaluated by `round_trip`, which reads and encodes the values once and not once per part.
    """
    if x.op != "decode" or x.args[0].op != "encode_codes" or x.args[1].op != "encode_scales":
        return None
    codes, *others = x.args
    if codes.attrs != others[0].attrs or any(o.args[0] is not codes.args[0] for o in others):
        return None
    return codes if len(codes.args) == 1 or codes.args[1] is others[0].args[1] else None


def round_trip(codes: WeightExpr, whole: Whole) -> Array:
    """What the decode of `encoded_from` gives, from its `encode_codes`."""
    made = encoded(codes, whole)
    return encode.decode_matrix(made.codes, made.scales, made.tensor_scale, scheme_of(codes))


def _recode(part: str) -> Callable[[WeightExpr, list[Array]], Array]:
    def evaluate(x: WeightExpr, args: list[Array]) -> Array:
        how = EXACT[str(x.attr("old")), str(x.attr("new"))]
        try:
            if part == "codes":
                assert how.codes is not None
                return how.codes(args[0], args[1])
            shape = x.attr("shape")
            assert how.scales is not None and isinstance(shape, tuple)
            return how.scales(args[0], shape[0], shape[1])
        except CompileError as error:
            error.where = error.where or describe(x)
            raise

    return evaluate


ENCODINGS = frozenset({"encode_codes", "encode_scales", "encode_tensor_scale"})
"""What `encoded_part` evaluates, some rows at a time."""

QUANTISED_OPS: dict[str, Callable[[WeightExpr, list[Array]], Array] | None] = {
    **dict.fromkeys(ENCODINGS),
    "decode": _decode,
    "recode_codes": _recode("codes"),
    "recode_scales": _recode("scales"),
}
"""The weight operations of this module and how they are evaluated on raw storage arrays; see `ENCODINGS`."""

CONSTRUCTORS: dict[str, Callable[..., WeightExpr]] = {
    "encode_codes": encode_codes, "encode_scales": encode_scales,
    "encode_tensor_scale": encode_tensor_scale, "decode": decode, "recode_codes": recode_codes,
    "recode_scales": recode_scales,
}  # fmt: skip
"""How they are made, by name."""
