"""How matrix products become launches: linear maps, the embedding, experts, mixes of hyper-connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Op

from .context import Context, Ref, blocks, ints, power, width
from .lowering_codes import (
    EXPERT_ROUNDINGS,
    Routed,
    coded,
    expert_down_codes,
    expert_up_codes,
    hidden_rounding,
    linear_codes,
    multiplies,
    round_hidden,
    rounding_of,
    row_codes,
)
from .matrix import matrix

_ROUTES = 512
"""Routes that one step of the sort by expert looks at."""


def linear(c: Context, op: Op) -> None:
    x = coded(c, op)
    if x is not None:
        return linear_codes(c, op, x)
    _linear(c, op, 1)


def grouped_linear(c: Context, op: Op) -> None:
    groups = op.attrs["groups"]
    assert isinstance(groups, int)
    _linear(c, op, groups)


def _pieces(c: Context, op: Op) -> int:
    """BF16 numbers that a factor is cut into: one where it is a BF16 number already."""
    there = op.attrs.get("inputs") == "bf16" or op.attrs.get("rounding") in ("bf16_rows", "e4m3_rows")
    rounded = rounding_of(op.operands[0].producer)
    return 1 if there or (rounded is not None and rounded.rule == "e4m3") else c.pieces


def _linear(c: Context, op: Op, groups: int) -> None:
    x, m = c.values[op.operands[0]], matrix(c, op.operands[1])
    total, k = ints(op.operands[1])
    n, t = total // groups, c.tiles("linear")
    rows = c.rows(op.result)
    constants = m.constants | {
        "GROUPS": groups, "PIECES": _pieces(c, op), "PRECISION": c.precision, "BM": t.bm, "BN": t.bn,
        "BK": m.step(t.bk),
    }  # fmt: skip
    c.launch(
        "linear", (blocks(n, t.bn), blocks(rows, t.bm), groups), constants, warps=t.warps, stages=t.stages,
        types=m.types, pack=m.pack, x=x, y=c.result(op.result), M=rows, XS=x.stride, N=n, K=k, **m.given,
    )  # fmt: skip


def embed(c: Context, op: Op) -> None:
    tokens, table = op.operands
    m, (vocabulary, n), rows = matrix(c, table), ints(table), c.rows(tokens)
    tile = min(power(n, 32), 1024)
    c.launch(
        "embed", (rows, blocks(n, tile)), m.constants | {"BN": tile}, types=m.types, pack=m.pack,
        tokens=c.values[tokens], y=c.result(op.result), M=rows, V=vocabulary, N=n, **m.given,
    )  # fmt: skip


def expert_mlp(c: Context, op: Op) -> None:
    """Routes sorted by expert, both products, and the sum per token."""
    x, ids, *_, w2 = op.operands
    allowed = ("none", "bf16_rows", *EXPERT_ROUNDINGS)
    if op.attrs["rounding"] not in allowed:
        raise TargetError(
            f"rounds by {op.attrs['rounding']!r}", where=c.where, allowed=", ".join(allowed)
        )
    (experts, n, inner), topk, rows = ints(w2), ints(ids)[0], c.rows(x)
    routes, codes, rounding = f"{rows}*{topk}", coded(c, op), hidden_rounding(op)
    bm = c.tiles("expert_up" if codes is None else "expert_up_codes").bm
    groups = f"{routes}//{bm}+min({experts},{routes})"
    routed = Routed(*_sort(c, op, experts, topk, routes, groups, bm), routes, groups, bm)
    hidden, y = c.temporary("f32", routes, inner), c.temporary("f32", routes, n)
    if codes is None:
        _expert_up(c, op, routed, hidden)
    else:
        expert_up_codes(c, op, codes, routed, hidden)
    if rounding is not None and multiplies(c.gpu, rounding, w2):
        expert_down_codes(c, op, row_codes(c, hidden, routes, inner, rounding), routed, y)
    else:
        if rounding is not None:
            hidden = round_hidden(c, hidden, routes, inner, rounding)
        _expert_down(c, op, routed, hidden, y)
    tile = min(power(n, 32), 1024)
    c.launch(
        "expert_sum", (rows, blocks(n, tile)), {"N": n, "TOPK": topk, "BN": tile}, y=y, slots=routed.slots,
        out=c.result(op.result), M=rows, R=routes,
    )  # fmt: skip


def _expert_up(c: Context, op: Op, r: Routed, hidden: Ref) -> None:
    """The first products of rows of numbers, with SwiGLU."""
    x, ids, weights, _, w13, w2 = op.operands
    (experts, n, inner), m, t = ints(w2), matrix(c, w13), c.tiles("expert_up")
    limit = op.attrs["limit"]
    assert isinstance(limit, int | float)
    constants = m.constants | {
        "E": experts, "PIECES": _pieces(c, op), "PRECISION": c.precision, "BM": r.bm, "TOPK": ints(ids)[0],
        "INNER": inner, "K": n, "ROUND": int(op.attrs["rounding"] == "bf16_rows"), "BN": t.bn,
        "BK": m.step(t.bk),
    }  # fmt: skip
    c.launch(
        "expert_up", (r.groups, blocks(inner, t.bn)), constants, warps=t.warps, stages=t.stages,
        types=m.types, pack=m.pack, x=c.values[x], weights=c.values[weights], order=r.order,
        blocks=r.blocks, hidden=hidden, M=c.rows(x), XS=c.values[x].stride, R=r.routes, G=r.groups,
        limit=float(limit), **m.given,
    )  # fmt: skip


def _expert_down(c: Context, op: Op, r: Routed, hidden: Ref, y: Ref) -> None:
    """The second products of hidden values that are numbers."""
    (experts, n, inner), m, t = ints(op.operands[5]), matrix(c, op.operands[5]), c.tiles("expert_down")
    constants = m.constants | {
        "E": experts, "PIECES": _pieces(c, op), "PRECISION": c.precision, "BM": r.bm, "N": n,
        "INNER": inner, "BN": t.bn, "BK": m.step(t.bk),
    }  # fmt: skip
    c.launch(
        "expert_down", (r.groups, blocks(n, t.bn)), constants, warps=t.warps, stages=t.stages,
        types=m.types, pack=m.pack, hidden=hidden, blocks=r.blocks, y=y, R=r.routes, G=r.groups, **m.given,
    )  # fmt: skip


def _sort(
    c: Context, op: Op, experts: int, topk: int, routes: str, groups: str, bm: int
) -> tuple[Ref, Ref, Ref]:
    """(order, slots, blocks) of the routes of a call."""
    _, ids, _, n_valid, *_ = op.operands
    t = c.dim(ids.type.shape[1])
    counts, order, slots = (c.temporary("i32", size) for size in (experts, routes, routes))
    groups_of = c.temporary("i32", groups, 3)
    common = {"E": experts, "TOPK": topk, "BR": 64 if c.few else _ROUTES}
    c.launch(
        "expert_count", (experts,), common, warps=1 if c.few else 4, ids=c.values[ids],
        n_valid=c.values[n_valid], counts=counts, R=routes, T=t,
    )  # fmt: skip
    c.launch(
        "expert_place", (experts,), common | {"BM": bm, "BE": power(experts, 32)}, warps=1 if c.few else 4,
        ids=c.values[ids], n_valid=c.values[n_valid], counts=counts, order=order, slots=slots,
        blocks=groups_of, R=routes, T=t, G=groups,
    )  # fmt: skip
    return order, slots, groups_of


def hc_mix(c: Context, op: Op) -> None:
    parts, constants = _project(c, op)
    n, rows = ints(op.operands[0])[0], c.rows(op.operands[0])
    _, _, base, scale = op.operands
    iters, bm = op.attrs["iters"], 16
    assert isinstance(iters, int)
    pre, post, comb = (c.result(v) for v in op.results)
    c.launch(
        "hc_sinkhorn", (blocks(rows, bm),), constants | {"N": n, "ITERS": iters, "BM": bm}, warps=1,
        parts=parts,
        base=c.weight(base), scale=c.weight(scale), pre=pre, post=post, comb=comb, M=rows, **_epsilons(op),
    )  # fmt: skip


def hc_head_mix(c: Context, op: Op) -> None:
    parts, constants = _project(c, op)
    n, rows = ints(op.operands[0])[0], c.rows(op.operands[0])
    _, _, base, scale = op.operands
    c.launch(
        "hc_head", (blocks(rows, 16),), constants | {"N": n, "BM": 16}, warps=1, parts=parts,
        base=c.weight(base), scale=c.weight(scale), out=c.result(op.result), M=rows, **_epsilons(op),
    )  # fmt: skip


def _epsilons(op: Op) -> dict[str, Any]:
    eps, norm_eps = op.attrs["eps"], op.attrs["norm_eps"]
    assert isinstance(eps, int | float) and isinstance(norm_eps, int | float)
    return {"eps": float(eps), "norm_eps": float(norm_eps)}


def _project(c: Context, op: Op) -> tuple[Ref, dict[str, Any]]:
    """The projection in parts, and the constants by which others read them."""
    streams, fn = op.operands[:2]
    columns, wide = ints(fn)
    n = ints(streams)[0]
    if n & (n - 1):
        raise TargetError(f"{n} streams", where=c.where, allowed="a power of two")
    t, rows = c.tiles("hc_project"), c.rows(streams)
    splits = max(1, min(32 if c.few else 4, wide // (4 * t.bk)))
    part = -(-wide // (splits * t.bk)) * t.bk
    splits, bn = -(-wide // part), power(columns + 1, 16)
    parts = c.temporary("f32", splits, rows, bn)
    constants = {
        "WIDTH": wide, "COLUMNS": columns, "SPLITS": splits, "PART": part, "PRECISION": c.precision,
        "BM": t.bm, "BN": bn, "BK": t.bk,
    }  # fmt: skip
    c.launch(
        "hc_project", (blocks(rows, t.bm), splits), constants, warps=t.warps, stages=t.stages,
        streams=c.values[streams], fn=c.weight(fn), parts=parts, M=rows,
    )  # fmt: skip
    return parts, {"WIDTH": wide, "SPLITS": splits, "BN": bn}


def hc_collapse(c: Context, op: Op) -> None:
    streams, pre = op.operands
    (n, d), rows = ints(streams), c.rows(streams)
    tile = min(power(d, 32), 1024)
    c.launch(
        "hc_collapse", (rows, blocks(d, tile)), {"D": d, "N": n, "BN": tile}, streams=c.values[streams],
        pre=c.values[pre], out=c.result(op.result), M=rows,
    )  # fmt: skip


def hc_expand(c: Context, op: Op) -> None:
    streams, y, post, comb = op.operands
    (n, d), rows = ints(streams), c.rows(streams)
    if c.values[y].stride != width(y):
        raise TargetError("hc_expand reads rows that lie together", where=c.where)
    tile = min(power(d, 32), 512)
    c.launch(
        "hc_expand", (rows, blocks(d, tile)), {"D": d, "N": n, "BN": tile}, streams=c.values[streams],
        y=c.values[y], post=c.values[post], comb=c.values[comb], out=c.result(op.result), M=rows,
    )  # fmt: skip


PRODUCT_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "linear": linear, "grouped_linear": grouped_linear, "embed": embed, "expert_mlp": expert_mlp,
    "hc_mix": hc_mix, "hc_head_mix": hc_head_mix, "hc_collapse": hc_collapse, "hc_expand": hc_expand,
}  # fmt: skip
"""What this file adds to the emitter."""
