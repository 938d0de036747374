"""Rounding points in fixed shapes: BF16, FP16, E4M3 with a power of two per block, INT8 per token.

Where a value was rounded to a narrow type the narrow tensor is kept beside the FLOAT one, for products that
read it.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

from onnx import TensorProto

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op

from .lowering import Context, V, integer
from .static import StaticContext
from .static_codes import table
from .static_int8 import quantised

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST, FLOOR = 448.0, 1e-4
"""The largest E4M3 number, and the least largest magnitude of a block (specification, section 7)."""
ONE_448TH = float.fromhex("0x1.24924ap-9")
"""1/448 rounded to FP32 (specification, section 3.1)."""

NARROW = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}


def round_values(g: Context, op: Op) -> V:
    """x [...,K] -> x rounded: to BF16 or FP16; to E4M3 times a power of two per block; or to 127 steps of the
    largest magnitude of each token. All ties to even.

    Raises:
        TargetError: another rounding, or one whose type the dialect lacks.
    """
    assert isinstance(g, StaticContext)
    rule, block = str(op.attrs["rule"]), integer(op, "block")
    lower = _RULES.get(rule)
    if lower is None or integer(op, "channels") or (block and rule != "e4m3"):
        what = f"round_values by {rule}, block {block}, {op.attrs['channels']} channels"
        allowed = "bf16, fp16, int8 over rows, e4m3 in blocks of rows"
        raise TargetError(f"{g.dialect.name} has no {what}", where=op.loc, allowed=allowed)
    return lower(g, g.tensor(op, 0), block)


def narrowed(g: StaticContext, x: V, element: int) -> V:
    """x as FLOAT after a stay in a narrow type; one that has just come from there is left alone."""
    if x in g.halves and g.element_of(g.halves[x]) == element:
        return x
    half = g.op("Cast", x, to=element)
    result = g.op("Cast", half, to=TensorProto.FLOAT)
    g.halves[result] = half
    return result


def e4m3(g: StaticContext, x: V, block: int) -> V:
    """x [...,K] in blocks of `block` values (0: of all), a last shorter one by itself; rule 3.2."""
    g.dialect.check_type(TensorProto.FLOAT8E4M3FN, len(g.shape_of(x)), "rounding to E4M3", g.where)
    width = g.shape_of(x)[-1]
    block = min(block or width, width)
    whole = width - width % block
    if whole == width:
        return _e4m3_blocks(g, x, block)
    parts = g.multi("Split", 2, x, [whole, width - whole], axis=-1)
    done = (_e4m3_blocks(g, part, min(block, g.shape_of(part)[-1])) for part in parts)
    return g.op("Concat", *done, axis=-1)


def _e4m3_blocks(g: StaticContext, x: V, block: int) -> V:
    *lead, width = g.shape_of(x)
    parts = g.op("Reshape", x, [*lead, width // block, block])
    top = g.op("ReduceMax", g.op("Abs", parts), [-1], keepdims=1)
    top = g.op("Where", g.op("Greater", top, FLOOR), top, FLOOR)  # a NaN of padding ends here
    scale = power_of_two(g, g.op("Mul", top, ONE_448TH))
    ratio = g.op("Clip", g.op("Div", parts, scale), -LARGEST, LARGEST)
    codes = g.op("Cast", ratio, to=TensorProto.FLOAT8E4M3FN)
    numbers = g.op("Mul", g.op("Cast", codes, to=TensorProto.FLOAT), scale)
    return g.op("Reshape", numbers, [*lead, width])


def power_of_two(g: StaticContext, y: V) -> V:
    """2^ceil(log2 y) of positive numbers, exact: a logarithm that is off by less than one is put right."""
    guess = g.op("Clip", g.op("Ceil", g.op("Mul", g.op("Log", y), 1 / log(2))), -126.0, 127.0)
    power = g.op("Gather", table(g, DType.F8E8M0), g.cast_index(g.op("Add", guess, 127.0)), axis=0)
    power = g.op("Where", g.op("Less", power, y), g.op("Mul", power, 2.0), power)
    half = g.op("Mul", power, 0.5)
    return g.op("Where", g.op("Less", half, y), power, half)


def _int8(g: StaticContext, x: V, _: int) -> V:
    held = quantised(g, x)
    whole = g.op("Reshape", held.codes, list(held.shape))
    numbers = g.op("Cast", whole, to=TensorProto.FLOAT)
    result = g.op("Mul", numbers, g.op("Reshape", held.scales, [*held.shape[:-1], 1]))
    g.quantised[result] = held
    return result


_RULES: dict[str, Callable[[StaticContext, V, int], V]] = {
    "bf16": lambda g, x, _: narrowed(g, x, TensorProto.BFLOAT16),
    "fp16": lambda g, x, _: narrowed(g, x, TensorProto.FLOAT16),
    "e4m3": e4m3,
    "int8": _int8,
}
"""`round_values.rule` -> its nodes, from x and `block`."""
