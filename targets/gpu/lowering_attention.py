"""How attention, the selection of entries and the compressors become launches."""

from __future__ import annotations

from collections.abc import Callable

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Op

from .context import Context, blocks, ints, power


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
    q, weights, keys, pos, n_valid, *blocks_of = op.operands
    if blocks_of or op.attrs["rounding"] != "none":
        raise TargetError("selects in blocks, or rounds", where=c.where, allowed="plain index_select")
    (heads, d), t, ratio, k = ints(q), c.tiles("index_scores"), op.attrs["ratio"], op.attrs["k"]
    assert isinstance(ratio, int) and isinstance(k, int)
    b, tokens = (c.dim(s) for s in q.type.shape[:2])
    capacity, rows = c.dim(keys.type.shape[1]), c.rows(q)
    scores = c.temporary("f32", b, tokens, capacity)
    constants = {
        "H": heads, "D": d, "RATIO": ratio, "PRECISION": c.precision, "BH": power(heads, 16), "BC": t.bn,
        "BD": power(d, 16), "BK": min(power(d, 16), t.bk),
    }  # fmt: skip
    c.launch(
        "index_scores", (rows, blocks(capacity, t.bn)), constants, warps=t.warps, stages=t.stages,
        q=c.values[q],
        weights=c.values[weights], keys=c.values[keys], pos=c.values[pos], n_valid=c.values[n_valid],
        scores=scores, B=b, T=tokens, QS=c.values[q].stride, WS=c.values[weights].stride, C=capacity,
    )  # fmt: skip
    t = c.tiles("index_topk")
    c.launch(
        "index_topk", (rows,), {"RATIO": ratio, "TOPK": k, "BC": t.bn, "BT": power(k, 32)}, warps=t.warps,
        stages=t.stages, scores=scores, pos=c.values[pos], n_valid=c.values[n_valid], out=c.result(op.result),
        B=b, T=tokens, C=capacity,
    )  # fmt: skip


def entries_close(c: Context, op: Op) -> None:
    entries, kv, gate, kv_ring, gate_ring, weight, cos, sin, pos, n_valid = op.operands
    wide, ratio, eps = ints(entries)[-1], op.attrs["ratio"], op.attrs["eps"]
    assert isinstance(ratio, int) and isinstance(eps, int | float)
    b, t = (c.dim(s) for s in kv.type.shape[:2])
    groups, overlap = c.dim(cos.type.shape[1]), int(bool(op.attrs["overlap"]))
    constants = {
        "RATIO": ratio, "WIDTH": wide, "OVERLAP": overlap, "HALF": ints(cos)[-1],
        "BR": min(8, power((1 + overlap) * ratio)), "BC": power(wide, 32),
    }  # fmt: skip
    c.launch(
        "entries_close", (b, groups), constants, warps=4, entries=c.values[entries], kv=c.values[kv],
        gate=c.values[gate], kv_ring=c.values[kv_ring], gate_ring=c.values[gate_ring],
        weight=c.weight(weight),
        cos=c.values[cos], sin=c.values[sin], pos=c.values[pos], n_valid=c.values[n_valid], B=b, T=t,
        G=groups,
        C=c.dim(entries.type.shape[1]), KS=c.values[kv].stride, GS=c.values[gate].stride, eps=float(eps),
    )  # fmt: skip
    c.values[op.result] = c.values[entries]


ATTENTION_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "attention": attention, "index_select": index_select, "entries_close": entries_close,
}  # fmt: skip
"""What this file adds to the emitter."""
