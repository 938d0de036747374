"""Lazy weight operations that compute with values and still never round: scaled columns, folded constants.

Passes choose them where they hold; evaluation checks it again and names the tensor where they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np

from dsv4c.errors import CompileError

from .dtypes import Array, DType, decode
from .expr import WeightExpr, describe, expect

FOLDABLE = ("scale", "clamp")
"""Ops on weights that `evaluated` stands for: they cannot round, given a factor that is a power of two."""


def scale_columns(x: WeightExpr, factors: WeightExpr) -> WeightExpr:
    """[o, i] times [i], each factor a power of two -> f32 [o, i]."""
    expect(len(x.shape) == 2 and factors.shape == x.shape[1:], "scale_columns takes a matrix and its row", x)
    return WeightExpr("scale_columns", (x, factors), (), DType.F32, x.shape)


def evaluated(
    x: WeightExpr, of: str, factor: float = 1.0, low: float = -inf, high: float = inf
) -> WeightExpr:
    """The op `of`, one of `FOLDABLE`, on a weight -> f32 of the same shape."""
    expect(of in FOLDABLE, f"evaluated stands for {' or '.join(FOLDABLE)}, not {of}", x)
    expect(x.dtype.is_float, "evaluated takes numbers", x)
    attrs = (("of", of), ("factor", float(factor)), ("low", float(low)), ("high", float(high)))
    return WeightExpr("evaluated", (x,), attrs, DType.F32, x.shape)


def powers_of_two(values: Array) -> bool:
    """Whether every number is a positive power of two."""
    mantissa, _ = np.frexp(values)
    return bool(np.all(mantissa == 0.5))


def _times(x: WeightExpr, values: Array, factors: Any) -> Array:
    """The product in float32, which must be the product."""
    with np.errstate(over="ignore"):  # infinity is refused below
        found: Array = np.multiply(values, factors, dtype=np.float32)
    if not powers_of_two(np.asarray(factors)) or not np.array_equal(
        np.divide(found, factors), values, equal_nan=True
    ):
        raise CompileError(
            "a factor is no power of two, or the product leaves the range of float32",
            where=describe(x),
            hint="compile without the pass that folds it",
        )
    return found


def _scale_columns(x: WeightExpr, args: list[Array]) -> Array:
    return _times(x, decode(args[0], x.args[0].dtype), decode(args[1], x.args[1].dtype))


def _evaluated(x: WeightExpr, args: list[Array]) -> Array:
    values = np.asarray(decode(args[0], x.args[0].dtype), np.float32)
    if x.attr("of") == "scale":
        return _times(x, values, np.float32(_number(x, "factor")))
    return np.clip(values, np.float32(_number(x, "low")), np.float32(_number(x, "high")))


def _number(x: WeightExpr, name: str) -> float:
    value = x.attr(name)
    assert isinstance(value, float)
    return value


MAP_OPS: dict[str, Callable[[WeightExpr, list[Array]], Array]] = {
    "scale_columns": _scale_columns,
    "evaluated": _evaluated,
}
"""How each is evaluated on raw storage arrays."""
