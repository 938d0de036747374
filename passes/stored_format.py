"""In which number format a weight lies in the checkpoint, as one comparable value; knows no pass."""

from __future__ import annotations

from dsv4c.ir.attrs import print_attrs
from dsv4c.ir.dtypes import DType
from dsv4c.ir.weights import WeightExpr

_MOVES = frozenset({"cast", "take", "rows", "concat", "stack", "transpose", "reshape", "panel", "pair_rows"})
"""Operations that move numbers and leave their format alone."""


def stored_format(x: WeightExpr) -> str:
    """The dtype the expression has, and the formats of what is below; equal for weights that may be joined.

    Two weights of one format need no wider storage together than each alone. What is BF16 already (by the
    checkpoint, or because `narrow_weights` made it so) is just that.
    """
    if x.dtype is DType.BF16:
        return "bf16"
    return " ".join((x.dtype.value, "of", *sorted(_formats(x))))


def _formats(x: WeightExpr) -> set[str]:
    if x.op == "source":
        return {x.dtype.value}
    below = {f for a in x.args for f in _formats(a)}
    if x.op in _MOVES:
        return below
    return {f"{x.op}({', '.join(a.dtype.value for a in x.args)}){print_attrs(x.attrs)}"}
