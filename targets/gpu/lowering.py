"""How each TARGET op becomes launches: one small function per op, one literal table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Op, Value

from .context import Context, Given, Ref, blocks, ints, power, width
from .lowering_attention import ATTENTION_LOWERINGS
from .lowering_codes import round_scaled
from .lowering_engram import ENGRAM_LOWERINGS
from .lowering_images import IMAGE_LOWERINGS
from .lowering_products import PRODUCT_LOWERINGS

Lowering = Callable[[Context, Op], None]

_COLUMNS = 1024
"""Columns of a row that one block of a light kernel works on."""


def _columns(n: int) -> tuple[int, str]:
    """(tile, blocks) of the columns of a light kernel."""
    tile = min(power(n, 32), _COLUMNS)
    return tile, blocks(n, tile)


def _warps(tile: int) -> int:
    return max(1, min(8, tile // 256))


def weight(c: Context, op: Op) -> None:
    """Nothing: a weight becomes a buffer when a kernel asks for it."""


def view(c: Context, op: Op) -> None:
    """The same rows under another shape."""
    c.values[op.result] = c.values[op.operands[0]]


def split_columns(c: Context, op: Op) -> None:
    """Parts of rows, where they lie."""
    rows, first = c.values[op.operands[0]], 0
    for part in op.results:
        c.values[part] = Ref(rows.buffer, rows.offset + first, rows.stride)
        first += width(part)


def _unary(c: Context, op: Op, kind: int, factor: float = 0.0, low: float = 0.0, high: float = 0.0) -> None:
    x = c.values[op.operands[0]]
    n = width(op.result)
    tile, count = _columns(n)
    rows = c.rows(op.result)
    c.launch(
        "unary", (rows, count), {"N": n, "KIND": kind, "BN": tile}, warps=_warps(tile), x=x,
        y=c.result(op.result), M=rows, XS=x.stride, factor=factor, low=low, high=high,
    )  # fmt: skip


def scale(c: Context, op: Op) -> None:
    _unary(c, op, 0, factor=_float(op, "factor"))


def sqrt_softplus(c: Context, op: Op) -> None:
    _unary(c, op, 1)


def clamp(c: Context, op: Op) -> None:
    _unary(c, op, 2, low=_float(op, "low"), high=_float(op, "high"))


def gelu(c: Context, op: Op) -> None:
    _unary(c, op, 4)


def round_values(c: Context, op: Op) -> None:
    """To BF16 nothing where every reader rounds its factors the same way itself; else codes or numbers."""
    if op.attrs["rule"] in ("e4m3", "int8"):
        return round_scaled(c, op)
    if op.attrs["rule"] != "bf16":
        raise TargetError(f"rounds by {op.attrs['rule']!r}", where=c.where, allowed="bf16, e4m3, int8")
    n, channels = ints(op.result)[-1], op.attrs["channels"]
    if channels not in (0, n):
        raise TargetError(f"rounds {channels} of {n} channels", where=c.where, allowed="all channels")
    if op.result.uses and all(_rounds(user, index) for user, index in op.result.uses):
        return view(c, op)
    _unary(c, op, 3)


def _rounds(user: Op, index: int) -> bool:
    """Whether an op rounds this operand to BF16 itself."""
    return index == 0 and (user.attrs.get("inputs") == "bf16" or user.attrs.get("rounding") == "bf16_rows")


def _binary(c: Context, op: Op, kind: int, limit: float = 0.0, z: Ref | None = None) -> None:
    x, z = c.values[op.operands[0]], z or c.values[op.operands[1]]
    n = width(op.result)
    tile, count = _columns(n)
    rows = c.rows(op.result)
    c.launch(
        "binary", (rows, count), {"N": n, "KIND": kind, "BN": tile}, warps=_warps(tile), x=x, z=z,
        y=c.result(op.result), M=rows, XS=x.stride, ZS=z.stride, limit=limit,
    )  # fmt: skip


def add(c: Context, op: Op) -> None:
    _binary(c, op, 0)


def add_bias(c: Context, op: Op) -> None:
    """The same row is added to every one."""
    _binary(c, op, 0, z=replace(c.weight(op.operands[1]), stride=0))


def swiglu(c: Context, op: Op) -> None:
    _binary(c, op, 1)


def clamped_swiglu(c: Context, op: Op) -> None:
    _binary(c, op, 2, _float(op, "limit"))


def repeat_streams(c: Context, op: Op) -> None:
    x, n = c.values[op.operands[0]], width(op.operands[0])
    tile, count = _columns(n)
    rows = c.rows(op.result)
    c.launch(
        "copy_rows", (rows, count), {"N": n, "TIMES": _int(op, "n"), "BN": tile}, warps=_warps(tile), x=x,
        y=c.result(op.result), M=rows, XS=x.stride,
    )  # fmt: skip


def gather_rows(c: Context, op: Op) -> None:
    x, rows = op.operands
    n = width(x)
    tile, count = _columns(n)
    b, t = (c.dim(d) for d in x.type.shape[:2])
    c.launch(
        "gather_rows", (c.rows(op.result), count), {"N": n, "BN": tile}, warps=_warps(tile), x=c.values[x],
        rows=c.values[rows], y=c.result(op.result), B=b, T=t, L=c.dim(rows.type.shape[1]),
        XS=c.values[x].stride,
    )  # fmt: skip


def rms_norm(c: Context, op: Op) -> None:
    _norm(c, op, c.weight(op.operands[1]))


def unit_norm(c: Context, op: Op) -> None:
    if op.attrs["rounding"] != "none":
        raise TargetError(f"rounds by {op.attrs['rounding']!r}", where=c.where, allowed="none")
    _norm(c, op, None)


def heads_of(value: Value) -> tuple[int, int]:
    """(heads, channels) of [B,T,heads,channels] or [B,T,channels]."""
    sizes = ints(value)
    return (sizes[0], sizes[1]) if value.type.rank == 4 else (1, sizes[-1])


def _norm(c: Context, op: Op, weight_: Ref | None) -> None:
    x, (heads, d) = c.values[op.operands[0]], heads_of(op.result)
    rows = c.rows(op.result)
    constants = {"HEADS": heads, "D": d, "WEIGHTS": int(weight_ is not None), "BD": power(d, 32)}
    c.launch(
        "norm", (rows, heads), constants, warps=_warps(power(d)), x=x, weight=weight_ or c.unused,
        y=c.result(op.result), M=rows, XS=x.stride, eps=_float(op, "eps"),
    )  # fmt: skip


def _turn(c: Context, op: Op, norm: int, weight_: Ref | None, eps: float, inverse: int, halves: int) -> None:
    x, cos, sin = (c.values[v] for v in op.operands[:3])
    (heads, d), half = heads_of(op.result), ints(op.operands[1])[-1]
    rows = c.rows(op.result)
    constants = {
        "HEADS": heads, "D": d, "HALF": half, "NORM": norm, "WEIGHTED": int(weight_ is not None),
        "INVERSE": inverse, "HALVES": halves, "BD": power(d, 32),
    }  # fmt: skip
    c.launch(
        "norm_rotary", (rows, heads), constants, warps=_warps(power(d)), x=x, weight=weight_ or c.unused,
        cos=cos, sin=sin, y=c.result(op.result), M=rows, XS=x.stride, eps=eps,
    )  # fmt: skip


def norm_rotary(c: Context, op: Op) -> None:
    weight_ = c.weight(op.operands[3]) if len(op.operands) > 3 else None
    _turn(c, op, 1, weight_, _float(op, "eps"), 0, 0)


def rotary(c: Context, op: Op) -> None:
    _turn(c, op, 0, None, 0.0, int(bool(op.attrs["inverse"])), int(bool(op.attrs["halves"])))


def rope_angles(c: Context, op: Op) -> None:
    positions_, frequencies = op.operands
    half, rows = ints(frequencies)[0], c.rows(op.results[0])
    cos, sin = (c.result(v) for v in op.results)
    c.launch(
        "rope_angles", (rows,), {"HALF": half, "BD": power(half, 32)}, warps=1,
        positions=c.values[positions_],
        frequencies=c.weight(frequencies), cos=cos, sin=sin, M=rows,
    )  # fmt: skip


def positions(c: Context, op: Op) -> None:
    tokens, pos = op.operands
    b, t = (c.dim(d) for d in tokens.type.shape)
    c.launch(
        "positions",
        (b, blocks(t, 128)),
        {"BT": 128},
        warps=1,
        pos=c.values[pos],
        out=c.result(op.result),
        B=b,
        T=t,
    )


def entry_positions(c: Context, op: Op) -> None:
    b, g = (c.dim(d) for d in op.result.type.shape)
    c.launch(
        "entry_positions", (b, blocks(g, 128)), {"RATIO": _int(op, "ratio"), "BT": 128}, warps=1,
        pos=c.values[op.operands[1]], out=c.result(op.result), B=b, G=g,
    )  # fmt: skip


def advance(c: Context, op: Op) -> None:
    pos, n_valid = (c.values[v] for v in op.operands)
    b = c.dim(op.result.type.shape[0])
    c.launch("advance", (b,), {}, warps=1, pos=pos, n_valid=n_valid, B=b)
    c.values[op.result] = pos


def ring_write(c: Context, op: Op) -> None:
    ring, rows, pos, n_valid = op.operands
    (slots, d), x = ints(ring), c.values[rows]
    tile, count = _columns(d)
    b, t = (c.dim(s) for s in rows.type.shape[:2])
    c.launch(
        "ring_write", (f"({b})*({t})", count), {"RING": slots, "D": d, "BD": tile}, warps=_warps(tile),
        ring=c.values[ring], rows=x, pos=c.values[pos], n_valid=c.values[n_valid], B=b, T=t, XS=x.stride,
    )  # fmt: skip
    c.values[op.result] = c.values[ring]


def position_bias(c: Context, op: Op) -> None:
    x, bias, pos = op.operands
    period, n = ints(bias)
    tile, count = _columns(n)
    b, t = (c.dim(d) for d in x.type.shape[:2])
    c.launch(
        "position_bias", (f"({b})*({t})", count), {"PERIOD": period, "N": n, "BN": tile}, warps=_warps(tile),
        x=c.values[x], bias=c.weight(bias), pos=c.values[pos], y=c.result(op.result), B=b, T=t,
        XS=c.values[x].stride,
    )  # fmt: skip


def route_topk(c: Context, op: Op) -> None:
    scores, bias, *images = op.operands
    experts, rows = ints(scores)[0], c.rows(scores)
    constants = {
        "E": experts, "TOPK": _int(op, "k"), "IMAGES": int(bool(images)), "BE": power(experts, 32),
    }  # fmt: skip
    tokens, of_images = images or (None, None)
    c.launch(
        "route_topk", (rows,), constants, warps=_warps(power(experts)), scores=c.values[scores],
        bias=c.weight(bias), tokens=c.values[tokens] if tokens is not None else c.unused_ids,
        image_bias=c.weight(of_images) if of_images is not None else c.unused, ids=c.result(op.result),
        M=rows, XS=c.values[scores].stride, image_token=_int(op, "image_token") if images else 0,
    )  # fmt: skip


def route_hash(c: Context, op: Op) -> None:
    tokens, table = op.operands
    (vocabulary, k), rows = ints(table), c.rows(tokens)
    c.launch(
        "route_hash", (rows,), {"TOPK": k, "BE": power(k)}, warps=1, tokens=c.values[tokens],
        table=c.weight(table), ids=c.result(op.result), M=rows, V=vocabulary,
    )  # fmt: skip


def route_weights(c: Context, op: Op) -> None:
    scores, ids = op.operands
    k, rows = ints(ids)[0], c.rows(ids)
    c.launch(
        "route_weights", (rows,), {"E": ints(scores)[0], "TOPK": k, "BE": power(k)}, warps=1,
        scores=c.values[scores], ids=c.values[ids], weights=c.result(op.result), M=rows,
        XS=c.values[scores].stride, factor=_float(op, "factor"), eps=_float(op, "eps"),
    )  # fmt: skip


def add_route(c: Context, op: Op) -> None:
    ids, weights = op.operands
    k, rows = ints(ids)[0], c.rows(ids)
    more_ids, more_weights = (c.result(v) for v in op.results)
    given: dict[str, Given] = {"more_ids": more_ids, "more_weights": more_weights}
    c.launch(
        "add_route", (rows,), {"TOPK": k, "EXPERT": _int(op, "expert"), "BE": power(k + 1)}, warps=1,
        ids=c.values[ids], weights=c.values[weights], M=rows, **given,
    )  # fmt: skip


def _int(op: Op, name: str) -> int:
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


def _float(op: Op, name: str) -> float:
    value = op.attrs[name]
    assert isinstance(value, int | float)
    return float(value)


LOWERINGS: dict[str, Lowering] = {
    "weight": weight, "split_heads": view, "merge_heads": view, "split_columns": split_columns,
    "scale": scale, "sqrt_softplus": sqrt_softplus, "clamp": clamp, "round_values": round_values, "add": add,
    "add_bias": add_bias, "gelu": gelu, "swiglu": swiglu, "clamped_swiglu": clamped_swiglu,
    "repeat_streams": repeat_streams,
    "gather_rows": gather_rows, "rms_norm": rms_norm, "unit_norm": unit_norm, "norm_rotary": norm_rotary,
    "rotary": rotary, "rope_angles": rope_angles, "positions": positions, "entry_positions": entry_positions,
    "advance": advance, "ring_write": ring_write, "position_bias": position_bias, "route_topk": route_topk,
    "route_hash": route_hash, "route_weights": route_weights, "add_route": add_route,
    **PRODUCT_LOWERINGS, **ATTENTION_LOWERINGS, **ENGRAM_LOWERINGS, **IMAGE_LOWERINGS,
}  # fmt: skip
"""Every op this emitter takes."""
