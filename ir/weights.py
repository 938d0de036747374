"""Lazy weights: expressions over checkpoint tensors that passes edit and emission evaluates.

An expression knows its dtype and shape without reading a byte. `materialise` reads and transforms;
`stream` does the same one leading slice at a time, so that memory stays bounded by one expert and
not by a layer of them. Knows nothing of files: bytes come from a `TensorStore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import numpy as np

from dsv4c.errors import CompileError

from .dtypes import Array, DType, F32Array, decode, f32_to_bf16
from .encode import Encoded
from .expr import TensorStore as TensorStore
from .expr import WeightExpr as WeightExpr
from .expr import describe as describe
from .expr import expect
from .layouts import LAYOUT_OPS
from .maps import MAP_OPS
from .quantised import ENCODINGS, QUANTISED_OPS, encoded_from, encoded_part, round_trip
from .quantised import encoded as both_parts
from .rows import rows_of
from .tables import reroute_table

# ------------------------------------------------------------------------------ constructors


def source(name: str, dtype: DType, shape: tuple[int, ...]) -> WeightExpr:
    """A tensor as it lies in the checkpoint."""
    return WeightExpr(
        "source", (), (("name", name), ("dtype", dtype), ("shape", tuple(shape))), dtype, tuple(shape)
    )


def decode_fp8(codes: WeightExpr, scale: WeightExpr, block: tuple[int, int]) -> WeightExpr:
    """[o, i] E4M3 with one scale per `block` tile (the last tiles may be ragged) -> f32 [o, i]."""
    expect(len(codes.shape) == 2, "decode_fp8 takes a matrix", codes)
    tiles = (-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1]))
    expect(scale.shape == tiles, f"decode_fp8 needs a scale of shape {list(tiles)}", scale)
    return WeightExpr("decode_fp8", (codes, scale), (("block", block),), DType.F32, codes.shape)


def decode_fp4(codes: WeightExpr, scale: WeightExpr) -> WeightExpr:
    """[o, i/2] packed E2M1 with one scale per row and 32 columns -> f32 [o, i]."""
    rows, cols = codes.shape[0], 2 * codes.shape[1]
    expect(
        scale.shape == (rows, -(-cols // 32)),
        f"decode_fp4 needs a scale of [{rows}, {-(-cols // 32)}]",
        scale,
    )
    return WeightExpr("decode_fp4", (codes, scale), (), DType.F32, (rows, cols))


def cast(x: WeightExpr, dtype: DType) -> WeightExpr:
    """A change of element type that must not change a value; checked when the bytes are made."""
    return x if x.dtype is dtype else WeightExpr("cast", (x,), (("dtype", dtype),), dtype, x.shape)


def take(x: WeightExpr, index: int) -> WeightExpr:
    """Entry `index` of the leading axis."""
    expect(0 <= index < x.shape[0], f"take {index} is out of range", x)
    return WeightExpr("take", (x,), (("index", index),), x.dtype, x.shape[1:])


def rows(x: WeightExpr, start: int, stop: int) -> WeightExpr:
    """Rows start..stop-1 of the leading axis."""
    expect(0 <= start < stop <= x.shape[0], f"rows {start}:{stop} are out of range", x)
    return WeightExpr("rows", (x,), (("start", start), ("stop", stop)), x.dtype, (stop - start, *x.shape[1:]))


def concat(xs: tuple[WeightExpr, ...]) -> WeightExpr:
    """Join along the leading axis."""
    first = xs[0]
    for x in xs:
        expect(x.shape[1:] == first.shape[1:] and x.dtype is first.dtype, "concat needs equal row shapes", x)
    return WeightExpr("concat", xs, (), first.dtype, (sum(x.shape[0] for x in xs), *first.shape[1:]))


def stack(xs: tuple[WeightExpr, ...]) -> WeightExpr:
    """A new leading axis over equal tensors."""
    first = xs[0]
    for x in xs:
        expect(x.shape == first.shape and x.dtype is first.dtype, "stack needs equal tensors", x)
    return WeightExpr("stack", xs, (), first.dtype, (len(xs), *first.shape))


def transpose(x: WeightExpr) -> WeightExpr:
    """Swap the last two axes."""
    expect(len(x.shape) >= 2, "transpose needs a matrix", x)
    return WeightExpr("transpose", (x,), (), x.dtype, (*x.shape[:-2], x.shape[-1], x.shape[-2]))


def reshape(x: WeightExpr, shape: tuple[int, ...]) -> WeightExpr:
    expect(prod(shape) == prod(x.shape), f"reshape to {list(shape)} changes the element count", x)
    return (
        x
        if shape == x.shape
        else WeightExpr("reshape", (x,), (("shape", tuple(shape)),), x.dtype, tuple(shape))
    )


def panel(x: WeightExpr, width: int) -> WeightExpr:
    """[n, k] -> [ceil(n/width), k, width]: panels of `width` output rows, k-major, zero-padded."""
    expect(len(x.shape) == 2, "panel takes a matrix", x)
    n, k = x.shape
    return WeightExpr("panel", (x,), (("width", width),), x.dtype, (-(-n // width), k, width))


def pair_rows(x: WeightExpr, width: int) -> WeightExpr:
    """[2i, k] -> [2 ceil(i/width) width, k]: blocks of `width` rows of the first and second half in turn.

    Both halves are zero-padded to whole blocks. It puts the gate and up rows of an MLP side by side.
    """
    expect(len(x.shape) == 2 and x.shape[0] % 2 == 0, "pair_rows takes a matrix of two halves", x)
    blocks = -(-(x.shape[0] // 2) // width)
    return WeightExpr("pair_rows", (x,), (("width", width),), x.dtype, (2 * blocks * width, x.shape[1]))


def reroute(table: WeightExpr, experts: int, choices: tuple[int, ...]) -> WeightExpr:
    """[V,k] ids of `experts` experts -> [V,k] ids under new numbers, distinct in every row.

    `choices` is a matrix with a row per old expert, flattened: the new numbers that may stand for it, best
    first, then -1. How ties in a row are settled says `tables.reroute_table`.
    """
    expect(len(table.shape) == 2 and table.dtype.storage.kind == "i", "reroute takes a table of ids", table)
    fits = experts > 0 and len(choices) > 0 and len(choices) % experts == 0
    expect(fits, f"reroute needs a row of choices for each of {experts} experts", table)
    attrs = (("experts", experts), ("choices", tuple(choices)))
    return WeightExpr("reroute", (table,), attrs, table.dtype, table.shape)


def rope_frequencies(
    dim: int,
    theta: float,
    factor: float = 1.0,
    original: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> WeightExpr:
    """[dim/2] f32 rotary frequencies, with YaRN when `original` > 0 (specification, section 3.6)."""
    attrs = (("dim", dim), ("theta", float(theta)), ("factor", float(factor)), ("original", original),
             ("beta_fast", float(beta_fast)), ("beta_slow", float(beta_slow)))  # fmt: skip
    return WeightExpr("rope_frequencies", (), attrs, DType.F32, (dim // 2,))


# -------------------------------------------------------------------------------- evaluation


def _cast(x: WeightExpr, args: list[Array]) -> Array:
    source_dtype, values = x.args[0].dtype, decode(args[0], x.args[0].dtype)
    if x.dtype is DType.F32:
        return values.astype(np.float32)
    if x.dtype is DType.BF16:
        bits = f32_to_bf16(values)
        exact = np.array_equal(decode(bits, DType.BF16), values, equal_nan=True)
        out: Array = bits
    else:
        out = values.astype(x.dtype.storage)
        exact = np.array_equal(out, values)
    if not exact:
        raise CompileError(
            f"values of {source_dtype.value} do not fit {x.dtype.value} exactly", where=describe(x),
            hint="compile with --weights f32",
        )  # fmt: skip
    return out


def _panel(x: WeightExpr, args: list[Array]) -> Array:
    blocks, k, width = x.shape
    padded = np.zeros((blocks * width, k), args[0].dtype)
    padded[: args[0].shape[0]] = args[0]
    return np.ascontiguousarray(padded.reshape(blocks, width, k).transpose(0, 2, 1))


def _pair_rows(x: WeightExpr, args: list[Array]) -> Array:
    width, (count, k) = _int(x, "width"), x.shape
    half = args[0].shape[0] // 2
    out = np.zeros((2, count // 2, k), args[0].dtype)
    out[0, :half], out[1, :half] = args[0][:half], args[0][half:]
    return out.reshape(2, -1, width, k).transpose(1, 0, 2, 3).reshape(count, k)


def _reroute(x: WeightExpr, args: list[Array]) -> Array:
    choices = np.array(x.attr("choices"), np.int64).reshape(_int(x, "experts"), -1)
    return reroute_table(args[0], choices, describe(x))


def _rope_frequencies(x: WeightExpr, _: list[Array]) -> Array:
    dim, theta, factor, original, fast, slow = (v for _, v in x.attrs)
    return rope_table(int(dim), float(theta), float(factor), int(original), float(fast), float(slow))  # type: ignore[arg-type]


def rope_table(dim: int, theta: float, factor: float, original: int, fast: float, slow: float) -> F32Array:
    """[dim/2] float32, every step rounded to FP32 as the reference does (section 3.6)."""
    f32 = np.float32
    exponent = np.arange(0, dim, 2, dtype=np.float32) / f32(dim)
    base: F32Array = (f32(1) / np.power(f32(theta), exponent)).astype(np.float32)
    if original <= 0 or factor == 1.0:
        return base

    def corner(turns: float) -> float:
        return float(dim * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(theta)))

    low, high = max(np.floor(corner(fast)), 0), min(np.ceil(corner(slow)), dim - 1)
    span = f32(high - low) if high != low else f32(0.001)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - f32(low)) / span, 0, 1).astype(np.float32)
    keep = f32(1) - ramp
    return np.asarray(base / f32(factor) * (f32(1) - keep) + base * keep, np.float32)


def _int(x: WeightExpr, name: str) -> int:
    value = x.attr(name)
    assert isinstance(value, int)
    return value


_Evaluate = Callable[[WeightExpr, list[Array]], Array]
WEIGHT_OPS: dict[str, _Evaluate | None] = {
    "source": None,
    "decode_fp8": None,
    "decode_fp4": None,
    "cast": _cast,
    "take": lambda x, a: a[0][_int(x, "index")],
    "rows": None,
    "concat": lambda x, a: np.concatenate(a),
    "stack": lambda x, a: np.stack(a),
    "transpose": lambda x, a: np.swapaxes(a[0], -1, -2),
    "reshape": lambda x, a: a[0].reshape(x.shape),
    "panel": _panel,
    "pair_rows": _pair_rows,
    "reroute": _reroute,
    "rope_frequencies": _rope_frequencies,
    **QUANTISED_OPS,
    **LAYOUT_OPS,
    **MAP_OPS,
}
"""Every weight operation and how it is evaluated on raw storage arrays; None where `materialise` says how."""


def materialise(x: WeightExpr, store: TensorStore) -> Array:
    """The raw storage of an expression, shape `x.shape`, dtype `x.dtype.storage`.

    Raises:
        CompileError: a cast would change a value.
        CheckpointError: the store cannot give a source.
    """
    if x.op == "source":
        return store.read(str(x.attr("name")))

    def whole(y: WeightExpr) -> Array:
        return materialise(y, store)

    if x.op in ENCODINGS:
        return encoded_part(x, whole)
    if encoding := encoded_from(x):
        return round_trip(encoding, whole)
    if x.op in ("rows", "decode_fp8", "decode_fp4"):
        return rows_of(x, whole)(slice(0, x.shape[0]))
    evaluate = WEIGHT_OPS[x.op]
    assert evaluate is not None
    return np.asarray(evaluate(x, [materialise(a, store) for a in x.args]))


def encoded(x: WeightExpr, store: TensorStore) -> Encoded:
    """Codes and scales of an `encode_codes`, from one reading of its values.

    Raises:
        CompileError: a value is NaN or infinite.
    """
    return both_parts(x, lambda y: materialise(y, store))


def stream(x: WeightExpr, store: TensorStore) -> Iterator[Array]:
    """`materialise` in C-contiguous pieces whose bytes, joined, are those of the whole."""
    if x.op in ("stack", "concat"):
        for arg in x.args:
            yield from stream(arg, store)
    else:
        yield np.ascontiguousarray(materialise(x, store))


def values(x: WeightExpr, store: TensorStore) -> Array:
    """The expression as float32 numbers (integers stay integers)."""
    return decode(materialise(x, store), x.dtype)
