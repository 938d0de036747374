"""Meanings of the `engram` family, written from the Engram specification, one token at a time."""

from __future__ import annotations

import numpy as np

from dsv4c.ir.graph import Op

from .core import Arr, integer, number, sigmoid, silu

DEAD = -1


def compress_tokens(op: Op, tokens: Arr, map: Arr) -> Arr:
    known = (tokens >= 0) & (tokens < len(map)) & (tokens != integer(op, "dead_token"))
    found = np.where(known, map[np.where(known, tokens, 0)], DEAD)
    passes = (tokens < 0) & (not op.attrs["dead"])
    return np.where(passes, tokens, found).astype(np.int32)


def _numbers(op: Op, name: str) -> tuple[int, ...]:
    value = op.attrs[name]
    assert isinstance(value, tuple)
    return value


def ngram_rows(op: Op, ids: Arr, history: Arr, pos: Arr, n_valid: Arr) -> Arr:
    multipliers, primes, offsets = (_numbers(op, n) for n in ("multipliers", "primes", "offsets"))
    heads = integer(op, "heads")
    out = np.full((*ids.shape, len(primes)), -1, np.int32)
    for b, (start, count) in enumerate(zip(pos, n_valid, strict=True)):
        for t in range(count):
            u = _look_back(op, ids[b], history[b], int(start), t, len(multipliers))
            mixed = u[0] * multipliers[0]
            for n in range(1, len(multipliers)):
                mixed ^= u[n] * multipliers[n]
                for k in range((n - 1) * heads, n * heads):
                    out[b, t, k] = mixed % primes[k] + offsets[k]
    return out


def _look_back(op: Op, ids: Arr, history: Arr, start: int, t: int, count: int) -> list[int]:
    """u_0..u_{count-1} of token t; Python integers, so nothing can overflow."""
    pad, blocked, out = integer(op, "pad"), False, []
    for age in range(count):
        at = start + t - age
        inside = t - age >= 0
        value = pad if at < 0 else int(ids[t - age]) if inside else int(history[at % len(history)])
        blocked |= bool(op.attrs["dead"]) and value < 0
        out.append(pad if blocked else value)
    return out


def ngram_history(op: Op, history: Arr, ids: Arr, pos: Arr, n_valid: Arr) -> Arr:
    out = history.copy()
    for b, (start, count) in enumerate(zip(pos, n_valid, strict=True)):
        for t in range(count):
            out[b, (start + t) % history.shape[1]] = ids[b, t]
    return out


def engram_rows(op: Op, rows: Arr, codes: Arr, scales: Arr | None = None) -> Arr:
    found = codes[np.maximum(rows, 0)]
    if scales is not None:
        found = found * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)[np.maximum(rows, 0)]
    found = np.where(rows[..., None] < 0, found.dtype.type(0), found)
    return found.reshape(*rows.shape[:2], -1)


def engram_gate(op: Op, x: Arr, kv: Arr, q_weight: Arr, k_weight: Arr, ids: Arr | None = None) -> Arr:
    n, d = x.shape[2:]
    key, value = kv[..., : n * d].reshape(x.shape), kv[..., None, n * d :]
    eps = x.dtype.type(number(op, "eps"))
    dot = (x * (q_weight * k_weight) * key).sum(axis=-1) + x.dtype.type(0)  # no negative zero
    spread = np.sqrt((x * x).mean(axis=-1) + eps) * np.sqrt((key * key).mean(axis=-1) + eps)
    delta = dot / np.sqrt(x.dtype.type(d)) / spread
    root = np.sqrt(np.maximum(np.abs(delta), x.dtype.type(number(op, "floor"))))
    gate = sigmoid(np.copysign(root, delta) if op.attrs["copysign"] else np.sign(delta) * root)
    out = gate[..., None] * value
    if ids is not None:
        out = np.where(ids[..., None, None] < 0, x.dtype.type(0), out)
    return x + out if op.attrs["residual"] else out


def stream_norm(op: Op, x: Arr, w: Arr) -> Arr:
    normal = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(number(op, "eps")))
    out: Arr = (normal * w).reshape(*x.shape[:2], -1)
    return out


def short_conv(op: Op, rows: Arr, ring: Arr, w: Arr, pos: Arr, n_valid: Arr) -> Arr:
    taps, out = w.shape[1], np.zeros_like(rows)
    for b, (start, count) in enumerate(zip(pos, n_valid, strict=True)):
        for t in range(count):
            for i in range(taps):
                ago = integer(op, "dilation") * (taps - 1 - i)
                if start + t >= ago:
                    earlier = rows[b, t - ago] if t >= ago else ring[b, (start + t - ago) % ring.shape[1]]
                    out[b, t] += w[:, i] * earlier
    return silu(out)
