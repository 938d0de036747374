"""Meanings of the `attention` family (sections 3.6 and 4.1 to 4.3 of the specification)."""

from __future__ import annotations

import numpy as np

from dsv4c.ir.graph import Op

from .core import Arr, integer, number
from .quantise import bf16

BLOCK = 64
"""Slots of one step of the reference's online softmax."""


def rope_angles(op: Op, positions: Arr, frequencies: Arr) -> tuple[Arr, Arr]:
    angle = positions[:, :, None].astype(np.float32) * frequencies.astype(np.float32)
    angle = angle.astype(frequencies.dtype)
    return np.cos(angle), np.sin(angle)


def rotary(op: Op, x: Arr, cos: Arr, sin: Arr) -> Arr:
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    sin = -sin if op.attrs["inverse"] else sin
    out, half = x.copy(), cos.shape[-1]
    first = x.shape[-1] - 2 * half
    if op.attrs["halves"]:
        a, b = slice(first, first + half), slice(first + half, None)
    else:
        a, b = slice(first, None, 2), slice(first + 1, None, 2)
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


def position_bias(op: Op, x: Arr, bias: Arr, pos: Arr) -> Arr:
    index = (pos[:, None] + np.arange(x.shape[1])) % bias.shape[0]
    out: Arr = x + bias[index]
    return out


def compress(op: Op, kv: Arr, gate: Arr, kv_ring: Arr, gate_ring: Arr, pos: Arr, n_valid: Arr) -> Arr:
    ratio, overlap = integer(op, "ratio"), bool(op.attrs["overlap"])
    width = kv.shape[2] // (2 if overlap else 1)
    out = np.zeros((kv.shape[0], -(-kv.shape[1] // ratio), width), kv.dtype)

    def row(new: Arr, ring: Arr, b: int, p: int) -> Arr:
        found: Arr = new[b, p - pos[b]] if p >= pos[b] else ring[b, p % ring.shape[1]]
        return found

    for b, (start, count) in enumerate(zip(pos, n_valid, strict=True)):
        for i, j in enumerate(range(start // ratio, (start + count) // ratio)):
            current = range(j * ratio, (j + 1) * ratio)
            half = slice(width, None) if overlap else slice(None)
            rows = [(row(gate, gate_ring, b, p)[half], row(kv, kv_ring, b, p)[half]) for p in current]
            if overlap and j > 0:
                before = range((j - 1) * ratio, j * ratio)
                rows += [(row(gate, gate_ring, b, p)[:width], row(kv, kv_ring, b, p)[:width]) for p in before]
            gates, values = np.stack([g for g, _ in rows]), np.stack([v for _, v in rows])
            weight = np.exp(gates - gates.max(axis=0))
            out[b, i] = (weight * values).sum(axis=0) / weight.sum(axis=0)
    return out


def _visible(pos: Arr, b: int, t: int, ratio: int) -> int:
    """How many entries token t of row b may see."""
    return int((pos[b] + t + 1) // ratio)


def index_scores(op: Op, q: Arr, weights: Arr, keys: Arr, pos: Arr, n_valid: Arr) -> Arr:
    return visible_scores(op, q, weights, keys, pos, n_valid, str(op.attrs["rounding"]))


def visible_scores(
    op: Op, q: Arr, weights: Arr, keys: Arr, pos: Arr, n_valid: Arr, rounding: str = "none"
) -> Arr:
    """[B,T,capacity]; -inf for what the token does not see."""
    ratio, (b_, t_) = integer(op, "ratio"), q.shape[:2]
    out = np.full((b_, t_, keys.shape[1]), -np.inf, q.dtype)
    for b in range(b_):
        for t in range(n_valid[b]):
            n = _visible(pos, b, t, ratio)
            dots = keys[b, :n] @ q[b, t].T
            if rounding == "none":
                out[b, t, :n] = np.maximum(dots, 0) @ weights[b, t]
            else:
                out[b, t, :n] = bf16(bf16(np.maximum(bf16(dots), 0) * weights[b, t]).sum(axis=1))
    return out


def index_topk(op: Op, scores: Arr) -> Arr:
    k = integer(op, "k")
    out = np.full((*scores.shape[:2], k), -1, np.int32)
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k].astype(np.int32)
    keep = np.isfinite(np.take_along_axis(scores, order.astype(np.int64), axis=-1))
    found = np.where(keep, order, np.int32(scores.shape[-1]))
    found = np.sort(found, axis=-1) if op.attrs.get("ascending") else found
    out[..., : order.shape[-1]] = np.where(found < scores.shape[-1], found, -1)
    return out


def candidate_blocks(op: Op, scores: Arr, pos: Arr, n_valid: Arr) -> Arr:
    ratio, size, count = (integer(op, n) for n in ("ratio", "size", "count"))
    out = np.full((*scores.shape[:2], count), -1, np.int32)
    for b in range(scores.shape[0]):
        for t in range(n_valid[b]):
            n = _visible(pos, b, t, ratio)
            if not n:
                continue
            padded = np.full(-(-n // size) * size, -np.inf, scores.dtype)
            padded[:n] = scores[b, t, :n]
            best = padded.reshape(-1, size).max(axis=1)
            best[(n - 1) // size] = np.inf
            order = np.argsort(-best, kind="stable")[:count]
            found = np.sort(order[best[order] > -np.inf])
            out[b, t, : len(found)] = found
    return out


def index_restrict(op: Op, scores: Arr, blocks: Arr) -> Arr:
    size, out = integer(op, "size"), np.full_like(scores, -np.inf)
    for b, t in np.ndindex(scores.shape[:2]):
        for block in blocks[b, t][blocks[b, t] >= 0]:
            here = slice(block * size, (block + 1) * size)
            out[b, t, here] = scores[b, t, here]
    return out


def index_select(
    op: Op, q: Arr, weights: Arr, keys: Arr, pos: Arr, n_valid: Arr, blocks: Arr | None = None
) -> Arr:
    scores = index_scores(op, q, weights, keys, pos, n_valid)
    return index_topk(op, scores if blocks is None else index_restrict(op, scores, blocks))


def attention(
    op: Op, q: Arr, kv: Arr, ring: Arr, sinks: Arr, pos: Arr, n_valid: Arr,
    entries: Arr | None = None, selected: Arr | None = None, start: Arr | None = None,
) -> Arr:  # fmt: skip
    window, ratio = integer(op, "window"), integer(op, "ratio")
    factor, out = q.dtype.type(number(op, "scale")), np.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(n_valid[b]):
            here = int(pos[b]) + t
            spots = range(max(0 if start is None else start[b], here - window + 1), here + 1)
            rows = [kv[b, p - pos[b]] if p >= pos[b] else ring[b, p % ring.shape[1]] for p in spots]
            keys = np.stack(rows)
            if entries is not None:
                seen = np.arange(_visible(pos, b, t, ratio))
                if selected is not None:
                    seen = selected[b, t][selected[b, t] >= 0]
                keys = np.concatenate([keys, entries[b, seen]])
            logits = (q[b, t] @ keys.T) * factor
            if op.attrs["rounding"] == "reference":
                out[b, t] = _online(logits, keys, sinks, range(len(spots), window))
                continue
            top = np.maximum(logits.max(axis=1), sinks)[:, None]
            p_ = np.exp(logits - top)
            out[b, t] = (p_ @ keys) / (p_.sum(axis=1, keepdims=True) + np.exp(sinks[:, None] - top))
    return out


def _online(logits: Arr, keys: Arr, sinks: Arr, unused: range) -> Arr:
    """[H,D] of logits [H,N] and keys [N,D] in blocks of 64 slots, probabilities in BF16 (section 4.1 step 4).

    `unused` are the slots of a window that is not full yet; they stand between its keys and the entries.
    """
    slots = np.delete(np.arange(keys.shape[0] + len(unused)), unused)
    out, total = np.zeros((len(logits), keys.shape[1]), keys.dtype), np.zeros((len(logits), 1), keys.dtype)
    top = np.full((len(logits), 1), -np.inf, keys.dtype)
    for block in np.unique(slots // BLOCK):
        here = slots // BLOCK == block
        new_top = np.maximum(top, logits[:, here].max(axis=1, keepdims=True))
        p, shrink = np.exp(logits[:, here] - new_top), np.exp(top - new_top)
        out, total = out * shrink + bf16(p) @ keys[here], total * shrink + p.sum(axis=1, keepdims=True)
        top = new_top
    result: Arr = out / (total + np.exp(sinks[:, None] - top))
    return result
