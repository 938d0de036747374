"""Packed storage of whole weights: which expressions stand for codes and scales, and changing the scheme.

Pushes the decoding of single matrices through stacks, joins and slices, so that a kernel can read codes
where the graph shows float32. Reads no bytes and knows no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import quantised as q
from . import weights as w
from .dtypes import DType
from .expr import WeightExpr
from .formats import SCHEMES, Scheme
from .recode import EXACT


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as it is stored.

    Attributes:
        scheme: how its matrices [rows, cols] are stored.
        codes: [..., rows, cols / values_per_byte], with the leading axes of the weight.
        scales: [..., scale rows, scale cols], the same leading axes.
        tensor_scale: f32 [..., n] for schemes that have it, one for each of n equal bands of rows.
    """

    scheme: Scheme
    codes: WeightExpr
    scales: WeightExpr
    tensor_scale: WeightExpr | None = None

    @property
    def parts(self) -> tuple[WeightExpr, ...]:
        """What is stored, codes first."""
        some = (self.codes, self.scales)
        return some if self.tensor_scale is None else (*some, self.tensor_scale)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def each(self, f: Callable[[WeightExpr], WeightExpr]) -> Packed:
        """`f` of every part."""
        return _packed(self.scheme, [f(part) for part in self.parts])


def _packed(scheme: Scheme, parts: Sequence[WeightExpr]) -> Packed:
    return Packed(scheme, parts[0], parts[1], parts[2] if len(parts) > 2 else None)


def packed_form(x: WeightExpr) -> Packed | None:
    """The storage that `x` decodes; None where it decodes none, or one that does not align.

    Decoding the parts, matrix by matrix, gives exactly the values of `x`. Joins of rows and slices of rows
    align where they cut between blocks; tensor scales where they cut between bands of equal height.
    """
    match x.op:
        case "decode":
            return _packed(q.scheme_of(x), x.args)
        case "decode_fp8" | "decode_fp4":
            block = x.attr("block") if x.op == "decode_fp8" else (1, 32)
            return next(
                (_packed(s, x.args) for s in SCHEMES.values() if not s.tensor_scale and s.block == block
                 and (s.code, s.scale) == (x.args[0].dtype, x.args[1].dtype)), None
            )  # fmt: skip
        case "stack" | "concat":
            return _joined(x)
        case "take":
            held, index = packed_form(x.args[0]), x.attr("index")
            assert isinstance(index, int)
            return held and held.each(lambda part: w.take(part, index))
        case "rows":
            return _rows(x)
        case _:
            return None


def _joined(x: WeightExpr) -> Packed | None:
    held = [packed_form(a) for a in x.args]
    found = [h for h in held if h is not None]
    if len(found) != len(held) or len({h.scheme.name for h in found}) != 1:
        return None
    scheme, join = found[0].scheme, w.stack if x.op == "stack" else w.concat
    if x.op == "concat" and len(x.shape) == 2:
        high = scheme.block[0]
        if high == 0 or any(a.shape[0] % high for a in x.args[:-1]):
            return None
        bands = {(h.codes.shape[0], h.tensor_scale.shape) for h in found if h.tensor_scale is not None}
        if len({rows // shape[0] for rows, shape in bands}) > 1:
            return None
    parts = list(zip(*(h.parts for h in found), strict=True))
    if any(len({p.shape[x.op == "concat" :] for p in some}) != 1 for some in parts):
        return None  # tensor scales for bands of another height
    return _packed(scheme, [join(some) for some in parts])


def _rows(x: WeightExpr) -> Packed | None:
    held = packed_form(x.args[0])
    start, stop = x.attr("start"), x.attr("stop")
    assert isinstance(start, int) and isinstance(stop, int)
    if held is None or len(x.shape) > 2:
        return held and held.each(lambda part: w.rows(part, start, stop))
    rows = x.args[0].shape[0]

    def cut(part: WeightExpr, high: int) -> WeightExpr | None:
        """The rows of a part of which each covers `high` rows of the weight."""
        if high == 0 or start % high or (stop % high and stop != rows):
            return None
        return w.rows(part, start // high, -(-stop // high))

    scales, tensor = cut(held.scales, held.scheme.block[0]), held.tensor_scale
    if tensor is not None:
        high = rows // tensor.shape[0]
        inside = start // high == (stop - 1) // high
        tensor = w.rows(tensor, start // high, start // high + 1) if inside else cut(tensor, high)
        if tensor is None:
            return None
    return Packed(held.scheme, w.rows(held.codes, start, stop), scales, tensor) if scales else None


# ------------------------------------------------------------------------------ change of scheme


def matrices(x: WeightExpr) -> Iterator[WeightExpr]:
    """The matrices that `x` stacks and joins, in order: the units that are encoded on their own."""
    if x.op in ("stack", "concat"):
        for arg in x.args:
            yield from matrices(arg)
    else:
        yield x


def format_of(x: WeightExpr) -> str:
    """In which scheme or element type one of `matrices` is stored."""
    held = packed_form(x)
    return held.scheme.name if held else stored_as(x).dtype.value


def stored_as(x: WeightExpr) -> WeightExpr:
    """`x` without the casts to f32 on top of it."""
    while x.op == "cast" and x.dtype is DType.F32:
        x = x.args[0]
    return x


def keeps_values(x: WeightExpr, scheme: Scheme) -> bool:
    """Whether `requantised` gives the same values: the same scheme, an exact recoding, or a wider type."""
    if scheme.plain:
        if scheme.code is DType.F16:
            return stored_as(x).dtype is DType.F16
        return scheme.code is DType.F32 or is_bf16(x)
    held = packed_form(x)
    return held is not None and (held.scheme is scheme or (held.scheme.name, scheme.name) in EXACT)


def requantised(
    x: WeightExpr, scheme: q.Named, search: bool = False, importance: WeightExpr | None = None
) -> WeightExpr:
    """`x` with every matrix below its stacks and joins stored in `scheme`, as f32 or the plain type.

    A matrix that is stored so already stays; one that `EXACT` can recode is recoded; any other is encoded.

    Raises:
        IRError: a matrix has an odd number of columns for a packed type, or is none.
    """
    s = q.named(scheme)
    if x.op in ("stack", "concat"):
        parts = tuple(requantised(a, s, search, importance) for a in x.args)
        return w.stack(parts) if x.op == "stack" else w.concat(parts)
    held = packed_form(x)
    if held is not None and held.scheme is s:
        return x
    if s.plain:
        return x if x.dtype is s.code and held is None else q.encode_codes(x, scheme=s)
    if held is not None and (held.scheme.name, s.name) in EXACT:
        old = held.scheme.name
        codes = q.recode_codes(held.codes, held.scales, old=old, new=s.name)
        scales = q.recode_scales(held.scales, old=old, new=s.name, shape=x.shape)
        return q.decode(codes, scales, scheme=s)
    tensor = q.encode_tensor_scale(x, scheme=s) if s.tensor_scale else None
    codes = q.encode_codes(x, importance, scheme=s, search=search)
    return q.decode(codes, q.encode_scales(x, importance, scheme=s, search=search), tensor, scheme=s)


def is_bf16(x: WeightExpr) -> bool:
    """Whether every value is a BF16 number by construction of its format.

    FP8 and FP4 carry at most 4 significant bits and an E8M0 scale only moves the exponent.
    """
    match x.op:
        case "source" | "encode_codes":  # in the scheme "bf16"
            return x.dtype is DType.BF16
        case "decode_fp8" | "decode_fp4" | "decode":
            return x.args[1].dtype is DType.F8E8M0
        case "cast" | "take" | "rows" | "concat" | "stack" | "transpose" | "reshape" | "panel" | "pair_rows":
            return all(is_bf16(a) for a in x.args)
        case "scale_columns" | "evaluated":  # times powers of two
            times = x.op == "scale_columns" or x.attr("of") == "scale"
            return times and all(is_bf16(a) for a in x.args)
        case _:
            return False
