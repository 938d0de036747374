"""Meanings of the hyper-connection ops (section 4)."""

from __future__ import annotations

import numpy as np

from dsv4c.ir.graph import Op

from .core import Arr, integer, number, sigmoid


def _project(op: Op, streams: Arr, fn: Arr) -> Arr:
    flat = streams.reshape(*streams.shape[:2], -1)
    norm = 1 / np.sqrt(np.mean(flat * flat, axis=-1, keepdims=True) + flat.dtype.type(number(op, "norm_eps")))
    out: Arr = (flat @ fn.T) * norm
    return out


def hc_mix(op: Op, streams: Arr, fn: Arr, base: Arr, scale: Arr) -> tuple[Arr, Arr, Arr]:
    n, eps = streams.shape[2], streams.dtype.type(number(op, "eps"))
    m = _project(op, streams, fn)
    pre = sigmoid(m[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    a = (m[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*m.shape[:2], n, n)
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    comb = e / e.sum(axis=-1, keepdims=True) + eps
    comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    for _ in range(integer(op, "iters") - 1):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    return pre, post, comb


def hc_collapse(op: Op, streams: Arr, pre: Arr) -> Arr:
    out: Arr = (pre[..., None] * streams).sum(axis=2)
    return out


def hc_expand(op: Op, streams: Arr, y: Arr, post: Arr, comb: Arr) -> Arr:
    out: Arr = post[..., None] * y[:, :, None] + np.swapaxes(comb, -1, -2) @ streams
    return out


def hc_head_mix(op: Op, streams: Arr, fn: Arr, base: Arr, scale: Arr) -> Arr:
    out: Arr = sigmoid(_project(op, streams, fn) * scale[0] + base) + streams.dtype.type(number(op, "eps"))
    return out
