"""Which products are those of 8-bit codes, and how they and the rounding in front of them become launches.

A product takes codes where the graph rounds its rows so (`round_values`), its weight is stored in codes of
that kind, and the matrix units multiply them. Elsewhere rows become the numbers that their codes stand for,
and the product is one of BF16 numbers: the same meaning on every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4c.errors import TargetError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Op, Value
from dsv4c.ir.packed import packed_form

from .arch import Gpu
from .context import Context, Ref, blocks, ints, power
from .matrix import FORMS, Matrix, matrix
from .near import Near

_E4M3_SCHEMES = ("fp8", "fp8_f32", "mxfp8", "mxfp4")
"""Schemes whose codes are E4M3 numbers, with a scale for 32 columns or more."""
_BLOCKS = (32, 64, 128)
"""Columns of rows that may share a scale: whole steps of the matrix units, no more than one sum may take."""
EXPERT_ROUNDINGS = {"e4m3_rows": "e4m3", "int8_token": "int8"}
"""`expert_mlp.rounding` -> the rule by which its rows and hidden values are rounded."""
_ELEMENTS = 1024
"""Columns that one block of threads rounds, where scales leave a choice."""


@dataclass(frozen=True)
class Rounding:
    """How rows are rounded: a rule of `round_values`, and the columns that share a scale (0: all)."""

    rule: str
    block: int

    def columns(self, width: int) -> int:
        """Columns that share a scale in rows of a width."""
        return self.block or width


@dataclass(frozen=True)
class Coded:
    """Rows as codes u8 [M,D] and factors f32 [M,count]."""

    codes: Ref
    factors: Ref
    count: int
    rounding: Rounding


def rounding_of(op: Op | None) -> Rounding | None:
    """How an op rounds whole rows to codes with scales; None for any other op."""
    if op is None or op.name != "round_values" or op.attrs["rule"] not in ("e4m3", "int8"):
        return None
    block, channels = op.attrs["block"], op.attrs["channels"]
    assert isinstance(block, int)
    return Rounding(str(op.attrs["rule"]), block) if channels in (0, ints(op.result)[-1]) else None


def multiplies(gpu: Gpu, rounding: Rounding | None, weight: Value) -> bool:
    """Whether a GPU multiplies rows that are rounded so with a weight, code by code."""
    op = weight.producer
    if rounding is None or op is None or op.weight is None or op.weight.dtype is not DType.F32:
        return False
    held = packed_form(op.weight)
    if held is None:
        return False
    if rounding.rule == "int8":
        return held.scheme.name == "int8" and not rounding.block
    own = (*_E4M3_SCHEMES, "fp8_fnuz") if gpu.fp8 == "fnuz" else _E4M3_SCHEMES
    return bool(gpu.fp8) and held.scheme.name in own and rounding.block in _BLOCKS


def takes_codes(c: Context, op: Op, index: int) -> bool:
    """Whether an op reads this operand as codes."""
    at = {"linear": 1, "expert_mlp": 4}.get(op.name)
    if index or at is None:
        return False
    return multiplies(c.gpu, rounding_of(op.operands[0].producer), op.operands[at])


def coded(c: Context, op: Op) -> Coded | None:
    """The codes of an op's rows; None where it is to read numbers."""
    return c.coded.get(op.operands[0]) if takes_codes(c, op, 0) else None


def round_scaled(c: Context, op: Op) -> None:
    """Codes for the readers that multiply them, numbers for all others."""
    rounding, x = rounding_of(op), c.values[op.operands[0]]
    if rounding is None:
        raise TargetError(
            f"rounds {op.attrs['channels']} channels by {op.attrs['rule']!r}", where=c.where,
            allowed="whole rows, by bf16, e4m3 or int8",
        )  # fmt: skip
    *heads, d = ints(op.result)
    reads = [takes_codes(c, user, index) for user, index in op.result.uses]
    if any(reads):
        c.coded[op.result] = row_codes(c, x, c.rows(op.result), d, rounding)
    if not reads or not all(reads):
        y = c.result(op.result)
        _round(c, x, y, c.rows(op.result), heads[0] if heads else 1, d, rounding)


def row_codes(c: Context, x: Ref, rows: str, width: int, rounding: Rounding) -> Coded:
    """Launch what rounds rows f32 [rows,width] to codes."""
    count = -(-width // rounding.columns(width))
    codes, factors = c.temporary("u8", rows, width), c.temporary("f32", rows, count)
    sizes, group = _sizes(width, rounding)
    constants = {"D": width, "ROWS": rows_form(c.gpu, rounding), "COUNT": count} | sizes
    c.launch(
        "row_codes", (rows, 1, blocks(count, group)), constants, warps=_warps(sizes), x=x, codes=codes,
        factors=factors, M=rows, XS=x.stride,
    )  # fmt: skip
    return Coded(codes, factors, count, rounding)


def round_hidden(c: Context, hidden: Ref, rows: str, width: int, rounding: Rounding) -> Ref:
    """Rows f32 [rows,width] as numbers again, rounded."""
    y = c.temporary("f32", rows, width)
    _round(c, hidden, y, rows, 1, width, rounding)
    return y


def _round(c: Context, x: Ref, y: Ref, rows: str, heads: int, d: int, rounding: Rounding) -> None:
    sizes, group = _sizes(d, rounding)
    form = FORMS[DType.I8 if rounding.rule == "int8" else DType.F8E4M3]
    c.launch(
        "round_rows", (rows, heads, blocks(-(-d // rounding.columns(d)), group)),
        {"HEADS": heads, "D": d, "ROWS": form} | sizes, warps=_warps(sizes), x=x, y=y, M=rows, XS=x.stride,
    )  # fmt: skip


def _sizes(width: int, rounding: Rounding) -> tuple[dict[str, int], int]:
    """BLOCK, BD and GROUP of the kernels that round, and GROUP by itself."""
    block = rounding.columns(width)
    padded, count = power(block, 32), -(-width // block)
    group = max(1, min(power(count), _ELEMENTS // padded))
    return {"BLOCK": block, "BD": padded, "GROUP": group}, group


def _warps(sizes: dict[str, int]) -> int:
    return max(1, min(16, sizes["BD"] * sizes["GROUP"] // 256))


def rows_form(gpu: Gpu, rounding: Rounding) -> int:
    """ROWS of the kernels: the kind of code that both factors of a product are."""
    kinds = {"ocp": DType.F8E4M3, "fnuz": DType.F8E4M3FNUZ}
    return FORMS[DType.I8 if rounding.rule == "int8" else kinds[gpu.fp8]]


def code_constants(c: Context, weight: Value, m: Matrix, rounding: Rounding, bk: int) -> dict[str, Any]:
    """FORM, SCALE, HIGH, WIDE, ROWS, BLOCK and BK of a product; of INT8 a step may have any width. FP4 is
    noted for the look at its scales.
    """
    names = ("FORM", "SCALE", "HIGH", "WIDE")
    out = {name: m.constants[name] for name in names} | {"ROWS": rows_form(c.gpu, rounding)}
    if rounding.rule == "int8":
        return out | {"BLOCK": bk, "BK": bk}
    if out["FORM"] == FORMS[DType.F4E2M1X2]:
        op = weight.producer
        held = packed_form(op.weight) if op is not None and op.weight is not None else None
        assert op is not None and held is not None
        c.near[m.given["w"].buffer] = Near(held.codes, held.scales, rounding.block, op.loc)
        return out | {"BLOCK": rounding.block, "BK": rounding.block}
    return out | {"BLOCK": rounding.block, "BK": min(rounding.block, out["WIDE"])}


def _given(m: Matrix) -> dict[str, Any]:
    """The parameters of a weight; no scheme here has scales of whole tensors."""
    return {name: m.given[name] for name in ("w", "scale", "SROWS", "SCOLS")}


def linear_codes(c: Context, op: Op, x: Coded) -> None:
    """A linear map of rows in codes."""
    m, (n, k), rows = matrix(c, op.operands[1]), ints(op.operands[1]), c.rows(op.result)
    t = c.tiles("linear_codes")
    constants = code_constants(c, op.operands[1], m, x.rounding, t.bk) | {"BM": t.bm, "BN": t.bn}
    c.launch(
        "linear_codes", (blocks(n, t.bn), blocks(rows, t.bm)), constants, warps=t.warps, stages=t.stages,
        types=m.types, pack=m.pack, x=x.codes, factors=x.factors, y=c.result(op.result), M=rows, N=n, K=k,
        COUNT=x.count, **_given(m),
    )  # fmt: skip


@dataclass(frozen=True)
class Routed:
    """Rows of experts in order: `groups` blocks of `bm` rows, listed in `blocks`."""

    order: Ref
    slots: Ref
    blocks: Ref
    routes: str
    groups: str
    bm: int


def expert_up_codes(c: Context, op: Op, x: Coded, r: Routed, hidden: Ref) -> None:
    """The first products of experts, of rows in codes."""
    rows_, ids, weights, _, w13, w2 = op.operands
    (experts, n, inner), m, t = ints(w2), matrix(c, w13), c.tiles("expert_up_codes")
    limit = op.attrs["limit"]
    assert isinstance(limit, int | float)
    constants = code_constants(c, w13, m, x.rounding, t.bk) | {
        "E": experts, "TOPK": ints(ids)[0], "INNER": inner, "K": n, "BM": r.bm, "BN": t.bn,
    }  # fmt: skip
    c.launch(
        "expert_up_codes", (r.groups, blocks(inner, t.bn)), constants, warps=t.warps, stages=t.stages,
        types=m.types, pack=m.pack, x=x.codes, factors=x.factors, weights=c.values[weights], order=r.order,
        blocks=r.blocks, hidden=hidden, M=c.rows(rows_), R=r.routes, G=r.groups, COUNT=x.count,
        limit=float(limit), **_given(m),
    )  # fmt: skip


def expert_down_codes(c: Context, op: Op, hidden: Coded, r: Routed, y: Ref) -> None:
    """The second products of experts, of hidden values in codes."""
    w2 = op.operands[5]
    (experts, n, inner), m, t = ints(w2), matrix(c, w2), c.tiles("expert_down_codes")
    constants = code_constants(c, w2, m, hidden.rounding, t.bk) | {
        "E": experts, "N": n, "INNER": inner, "BM": r.bm, "BN": t.bn,
    }  # fmt: skip
    c.launch(
        "expert_down_codes", (r.groups, blocks(n, t.bn)), constants, warps=t.warps, stages=t.stages,
        types=m.types, pack=m.pack, hidden=hidden.codes, factors=hidden.factors, blocks=r.blocks, y=y,
        R=r.routes, G=r.groups, COUNT=hidden.count, **_given(m),
    )  # fmt: skip


def hidden_rounding(op: Op) -> Rounding | None:
    """How an expert's hidden values are rounded to codes; None where they are not."""
    rule, block = EXPERT_ROUNDINGS.get(str(op.attrs["rounding"])), op.attrs["block"]
    if rule is None:
        return None
    assert isinstance(block, int)
    return Rounding(rule, block if rule == "e4m3" else 0)
