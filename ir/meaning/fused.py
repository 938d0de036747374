"""Meanings of the fused ops: the chains they stand for, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4c.ir.graph import Op

from . import attention, hyper, state
from .core import Arr, integer, number


def split_columns(op: Op, x: Arr) -> tuple[Arr, ...]:
    widths: Any = op.attrs["widths"]
    return tuple(np.split(x, np.cumsum(widths)[:-1], axis=-1))


def norm_rotary(op: Op, x: Arr, cos: Arr, sin: Arr, w: Arr | None = None) -> Arr:
    y = _norm(x, number(op, "eps"))
    return _rotate(y if w is None else y * w, cos, sin)


def entries_close(
    op: Op, entries: Arr, kv: Arr, gate: Arr, kv_ring: Arr, gate_ring: Arr, w: Arr, cos: Arr, sin: Arr,
    pos: Arr, n_valid: Arr,
) -> Arr:  # fmt: skip
    new = attention.compress(op, kv, gate, kv_ring, gate_ring, pos, n_valid)
    rows = _rotate(_norm(new, number(op, "eps")) * w, cos, sin)
    return state.entries_append(op, entries, rows, pos, n_valid)


def index_candidates(op: Op, q: Arr, weights: Arr, keys: Arr, pos: Arr, n_valid: Arr) -> tuple[Arr, Arr]:
    scores = attention.visible_scores(op, q, weights, keys, pos, n_valid)
    return attention.index_topk(op, scores), attention.candidate_blocks(op, scores, pos, n_valid)


def hc_pre(
    op: Op, streams: Arr, fn: Arr, base: Arr, scale: Arr, w: Arr, pre: Arr | None = None
) -> tuple[Arr, ...]:
    own, post, comb = hyper.hc_mix(op, streams, fn, base, scale)
    y = _norm(hyper.hc_collapse(op, streams, own if pre is None else pre), number(op, "out_eps")) * w
    return (y, post, comb) if pre is None else (y, post, comb, own)


def hc_post_pre(op: Op, streams: Arr, y: Arr, post: Arr, comb: Arr, *rest: Arr) -> tuple[Arr, ...]:
    x = hyper.hc_expand(op, streams, y, post, comb)
    return x, *hc_pre(op, x, *rest)


def add_route(op: Op, ids: Arr, weights: Arr) -> tuple[Arr, Arr]:
    more = (*ids.shape[:2], 1)
    expert = np.full(more, integer(op, "expert"), ids.dtype)
    return np.concatenate([ids, expert], 2), np.concatenate([weights, np.ones(more, weights.dtype)], 2)


def _norm(x: Arr, eps: float) -> Arr:
    out: Arr = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
    return out


def _rotate(x: Arr, cos: Arr, sin: Arr) -> Arr:
    """Adjacent pairs of the last channels turned by their angle."""
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    start = x.shape[-1] - 2 * cos.shape[-1]
    pairs = x[..., start:].reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return np.concatenate([x[..., :start], turned.reshape(*x.shape[:-1], -1)], axis=-1)
