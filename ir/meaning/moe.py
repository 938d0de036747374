"""Meanings of the router and expert ops (section 4.4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4c.ir.graph import Op

from .core import Arr, clamped_swiglu, integer, number
from .quantise import bf16, blocks, e4m3, fp16, int8


def sqrt_softplus(op: Op, x: Arr) -> Arr:
    out: Arr = np.sqrt(np.logaddexp(x, 0).astype(x.dtype))
    return out


def route_topk(
    op: Op, scores: Arr, bias: Arr, tokens: Arr | None = None, image_bias: Arr | None = None
) -> Arr:
    if tokens is not None and image_bias is not None:
        bias = np.where((tokens == integer(op, "image_token"))[..., None], image_bias, bias)
    order = np.argsort(-(scores + bias), axis=-1, kind="stable")
    return order[..., : integer(op, "k")].astype(np.int32)


def route_hash(op: Op, tokens: Arr, table: Arr) -> Arr:
    return table[tokens].astype(np.int32)


def route_weights(op: Op, scores: Arr, ids: Arr) -> Arr:
    chosen = np.take_along_axis(scores, ids.astype(np.int64), axis=-1)
    total = chosen.sum(axis=-1, keepdims=True) + scores.dtype.type(number(op, "eps"))
    out: Arr = chosen / total * scores.dtype.type(number(op, "factor"))
    return out


def _routes(ids: Arr, n_valid: Arr, expert: int) -> tuple[Arr, Arr, Arr]:
    """Row, token and slot of everything routed to `expert`, in token order; padding left out."""
    real = np.arange(ids.shape[1])[None, :, None] < n_valid[:, None, None]
    found = np.nonzero((ids == expert) & real)
    return found[0], found[1], found[2]


def dispatch(op: Op, x: Arr, ids: Arr, weights: Arr, n_valid: Arr) -> tuple[Arr, ...]:
    out: list[Arr] = []
    for expert in range(integer(op, "experts")):
        b, t, slot = _routes(ids, n_valid, expert)
        out += [x[b, t], weights[b, t, slot]]
    return tuple(out)


def scale_rows(op: Op, x: Arr, weights: Arr) -> Arr:
    return x * weights[:, None]


def combine(op: Op, ids: Arr, n_valid: Arr, *ys: Arr) -> Arr:
    out = np.zeros((*ids.shape[:2], ys[0].shape[1]), ys[0].dtype)
    for expert, y in enumerate(ys):
        b, t, _ = _routes(ids, n_valid, expert)
        np.add.at(out, (b, t), y)
    return out


def expert_mlp(op: Op, x: Arr, ids: Arr, weights: Arr, n_valid: Arr, w13: Arr, w2: Arr) -> Arr:
    out, inner = np.zeros_like(x), w2.shape[2]
    narrow, quantise = _roundings(op, inner)
    for expert in range(w13.shape[0]):
        b, t, slot = _routes(ids, n_valid, expert)
        if len(b):
            both = narrow(x[b, t] @ w13[expert].T)
            hidden = clamped_swiglu(op, both[:, :inner], both[:, inner:]) * weights[b, t, slot][:, None]
            hidden = quantise(narrow(hidden))
            np.add.at(out, (b, t), narrow(hidden @ w2[expert].T))
    return out


def _exactly(x: Arr) -> Arr:
    return x


def _e4m3_in(block: int) -> Callable[[Arr], Arr]:
    return lambda x: blocks(e4m3, x, block)


def _roundings(op: Op, inner: int) -> tuple[Callable[[Arr], Arr], Callable[[Arr], Arr]]:
    """The rounding of products and hidden values, and one more of the latter."""
    known: dict[str, tuple[Callable[[Arr], Arr], Callable[[Arr], Arr]]] = {
        "none": (_exactly, _exactly),
        "bf16": (bf16, _exactly),
        "fp16": (fp16, _exactly),
        "e4m3": (bf16, _e4m3_in(integer(op, "block") or inner)),
        "mxfp8": (_exactly, _e4m3_in(32)),
        "bf16_rows": (_exactly, bf16),
        "int8_rows": (_exactly, lambda x: blocks(int8, x, 32)),
        "e4m3_rows": (_exactly, _e4m3_in(integer(op, "block") or inner)),
        "int8_token": (_exactly, lambda x: blocks(int8, x, inner)),
    }
    return known[str(op.attrs["rounding"])]


def expert_statistics(
    op: Op, counts: Arr, x: Arr, ids: Arr, weights: Arr, n_valid: Arr, w13: Arr, w2: Arr
) -> Arr:
    out, inner = counts.copy(), w2.shape[2]
    for expert in range(w13.shape[0]):
        b, t, slot = _routes(ids, n_valid, expert)
        both = x[b, t] @ w13[expert].T
        y = clamped_swiglu(op, both[:, :inner], both[:, inner:]) @ w2[expert].T
        gate = weights[b, t, slot]
        out[expert] += (len(b), gate.sum(), np.linalg.norm(gate[:, None] * y, axis=1).sum())
    return out


def input_statistics(op: Op, sums: Arr, x: Arr, n_valid: Arr) -> Arr:
    real = np.arange(x.shape[1])[None, :] < n_valid[:, None]
    return np.asarray(sums + np.square(x[real]).sum(axis=0))
