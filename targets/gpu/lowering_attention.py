"""How attention, the selection of entries and the compressors become launches."""

from __future__ import annotations

from collections.abc import Callable

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Op, Value

from .context import Context, Ref, blocks, ints, power


def attention(c: Context, op: Op) -> None:
    q, kv, ring, sinks, pos, n_valid, *more = op.operands
    if op.attrs["rounding"] != "none":
        raise TargetError(f"rounds by {op.attrs['rounding']!r}", where=c.where, allowed="none")
    heads, d = ints(q)
    t, (slots, _) = c.tiles("attention"), ints(ring)
    b, tokens = (c.dim(s) for s in q.type.shape[:2])
    window, ratio, scale = (op.attrs[n] for n in ("window", "ratio", "scale"))
    assert isinstance(window, int) and isinstance(ratio, int) and isinstance(scale, float)
    entries, selected, start = (*more, None, None, None)[:3]
    constants = {
        "H": heads, "D": d, "WINDOW": window, "RING": slots, "RATIO": ratio if entries is not None else 0,
        "TOPK": ints(selected)[0] if selected is not None else 0, "START": int(start is not None),
        "PRECISION": c.precision, "BH": t.bm, "BK": t.bk, "BD": power(d, 32),
        "BC": min(power(d, 32), t.bn),
    }  # fmt: skip
    capacity = c.dim(entries.type.shape[1]) if entries is not None else 0
    c.launch(
        "attention", (f"({b})*({tokens})", blocks(heads, t.bm)), constants, warps=t.warps, stages=t.stages,
        q=c.values[q], kv=c.values[kv], ring=c.values[ring], sinks=c.weight(sinks), pos=c.values[pos],
        n_valid=c.values[n_valid], entries=c.values[entries] if entries is not None else c.values[ring],
        selected=c.values[selected] if selected is not None else c.values[pos],
        start=c.values[start] if start is not None else c.values[pos], out=c.result(op.result), B=b, T=tokens,
        QS=c.values[q].stride, KS=c.values[kv].stride, C=capacity, scale=scale,
    )  # fmt: skip


def index_select(c: Context, op: Op) -> None:
    given = op.operands[5:]
    if op.attrs["rounding"] != "none":
        raise TargetError(f"rounds by {op.attrs['rounding']!r}", where=c.where, allowed="none")
    chosen = given[0] if given else None
    scores, many = _scores(c, op, chosen)
    _topk(c, op, scores, many, op.result, chosen=chosen)


def index_candidates(c: Context, op: Op) -> None:
    """Scores once; the best entries by them, and of the best of every block the best blocks."""
    _, _, _, pos, n_valid = op.operands
    selected, candidates = op.results
    scores, capacity = _scores(c, op, None)
    _topk(c, op, scores, capacity, selected)
    ratio, size = _int(op, "ratio"), _int(op, "size")
    b, t = (c.dim(s) for s in selected.type.shape[:2])
    count = blocks(capacity, size)
    tops = c.temporary("f32", b, t, count)
    tile = max(16, 2048 // power(size))
    c.launch(
        "block_tops", (c.rows(selected), blocks(f"({count})", tile)),
        {"RATIO": ratio, "SIZE": size, "BN": tile, "BS": power(size)}, scores=scores, pos=c.values[pos],
        n_valid=c.values[n_valid], tops=tops, B=b, T=t, C=capacity, N=count,
    )  # fmt: skip
    _topk(c, op, tops, count, candidates, group=size)


def _scores(c: Context, op: Op, chosen: Value | None) -> tuple[Ref, str | int]:
    """Scores of all entries, or of those of the chosen blocks [B,T,blocks], and how many a token has."""
    q, weights, keys, pos, n_valid = op.operands[:5]
    (heads, d), t = ints(q), c.tiles("index_scores")
    b, tokens = (c.dim(s) for s in q.type.shape[:2])
    capacity = c.dim(keys.type.shape[1])
    constants = {
        "H": heads, "D": d, "RATIO": _int(op, "ratio"), **_of_blocks(op, chosen), "PRECISION": c.precision,
        "BH": power(heads, 16), "BC": t.bn, "BD": power(d, 16), "BK": min(power(d, 16), t.bk),
    }  # fmt: skip
    many = capacity if chosen is None else ints(chosen)[0] * _int(op, "size")
    scores = c.temporary("f32", b, tokens, many)
    c.launch(
        "index_scores", (c.rows(q), blocks(many, t.bn)), constants, warps=t.warps, stages=t.stages,
        q=c.values[q], weights=c.values[weights], keys=c.values[keys], pos=c.values[pos],
        n_valid=c.values[n_valid], blocks=c.values[pos if chosen is None else chosen], scores=scores, B=b,
        T=tokens, QS=c.values[q].stride, WS=c.values[weights].stride, C=capacity, W=many,
    )  # fmt: skip
    return scores, many


def _topk(
    c: Context, op: Op, scores: Ref, many: str | int, out: Value, group: int = 1, chosen: Value | None = None
) -> None:
    """The best of the scores of every token, one for `group` entries, as ids of `out` [B,T,k]."""
    pos, n_valid = op.operands[3:5]
    b, tokens = (c.dim(s) for s in out.type.shape[:2])
    t, (k,) = c.tiles("index_topk"), ints(out)
    constants = {
        "RATIO": _int(op, "ratio"), "GROUP": group, **_of_blocks(op, chosen), "TOPK": k, "BC": t.bn,
        "BT": power(k, 32),
    }  # fmt: skip
    c.launch(
        "index_topk", (c.rows(out),), constants, warps=t.warps, stages=t.stages, scores=scores,
        pos=c.values[pos], n_valid=c.values[n_valid], blocks=c.values[pos if chosen is None else chosen],
        out=c.result(out), B=b, T=tokens, W=many,
    )  # fmt: skip


def _of_blocks(op: Op, chosen: Value | None) -> dict[str, int]:
    """The constants of kernels over all entries, or over those of blocks."""
    if chosen is None:
        return {"COUNT": 0, "SIZE": 1}
    return {"COUNT": ints(chosen)[0], "SIZE": _int(op, "size")}


def compress(c: Context, op: Op) -> None:
    kv, gate, kv_ring, gate_ring, pos, n_valid = op.operands
    b, t = (c.dim(s) for s in kv.type.shape[:2])
    groups = c.dim(op.result.type.shape[1])
    c.launch(
        "compress", (b, groups), _pooling(op, ints(op.result)[-1]), warps=4, kv=c.values[kv],
        gate=c.values[gate], kv_ring=c.values[kv_ring], gate_ring=c.values[gate_ring], pos=c.values[pos],
        n_valid=c.values[n_valid], out=c.result(op.result), B=b, T=t, G=groups, KS=c.values[kv].stride,
        GS=c.values[gate].stride,
    )  # fmt: skip


def _pooling(op: Op, wide: int) -> dict[str, int]:
    ratio, overlap = _int(op, "ratio"), int(bool(op.attrs["overlap"]))
    rows = min(8, power((1 + overlap) * ratio))
    return {"RATIO": ratio, "WIDTH": wide, "OVERLAP": overlap, "BR": rows, "BC": power(wide, 32)}


def entries_close(c: Context, op: Op) -> None:
    entries, kv, gate, kv_ring, gate_ring, weight, cos, sin, pos, n_valid = op.operands
    eps = op.attrs["eps"]
    assert isinstance(eps, int | float)
    b, t = (c.dim(s) for s in kv.type.shape[:2])
    groups = c.dim(cos.type.shape[1])
    constants = _pooling(op, ints(entries)[-1]) | {"HALF": ints(cos)[-1]}
    c.launch(
        "entries_close", (b, groups), constants, warps=4, entries=c.values[entries], kv=c.values[kv],
        gate=c.values[gate], kv_ring=c.values[kv_ring], gate_ring=c.values[gate_ring],
        weight=c.weight(weight),
        cos=c.values[cos], sin=c.values[sin], pos=c.values[pos], n_valid=c.values[n_valid], B=b, T=t,
        G=groups,
        C=c.dim(entries.type.shape[1]), KS=c.values[kv].stride, GS=c.values[gate].stride, eps=float(eps),
    )  # fmt: skip
    c.values[op.result] = c.values[entries]


def entries_append(c: Context, op: Op) -> None:
    entries, rows, pos, n_valid = op.operands
    wide, x = ints(entries)[-1], c.values[rows]
    b, groups = (c.dim(s) for s in rows.type.shape[:2])
    tile = min(power(wide, 32), 1024)
    c.launch(
        "entries_append", (c.rows(rows), blocks(wide, tile)),
        {"RATIO": _int(op, "ratio"), "D": wide, "BD": tile}, entries=c.values[entries], rows=x,
        pos=c.values[pos], n_valid=c.values[n_valid], B=b, G=groups, C=c.dim(entries.type.shape[1]),
        XS=x.stride,
    )  # fmt: skip
    c.values[op.result] = c.values[entries]


def _int(op: Op, name: str) -> int:
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


ATTENTION_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "attention": attention, "index_select": index_select, "index_candidates": index_candidates,
    "compress": compress, "entries_close": entries_close, "entries_append": entries_append,
}  # fmt: skip
"""What this file adds to the emitter."""
