"""Meanings of the `vision` family (specification of V4.1, section 9)."""

from __future__ import annotations

import math

import numpy as np

from dsv4c.ir.graph import Op

from .core import Arr, integer, number

_erf = np.vectorize(math.erf, otypes=[np.float64])


def grid_angles(op: Op, places: Arr, frequencies: Arr) -> tuple[Arr, Arr]:
    angle = places[..., None].astype(np.float32) * frequencies.astype(np.float32)
    angle = angle.reshape(*places.shape[:2], -1).astype(frequencies.dtype)
    return np.cos(angle), np.sin(angle)


def full_attention(op: Op, q: Arr, k: Arr, v: Arr) -> Arr:
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) * q.dtype.type(number(op, "scale"))
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out: Arr = np.einsum("bhnm,bmhd->bnhd", p / p.sum(axis=-1, keepdims=True), v)
    return out


def gelu(op: Op, x: Arr) -> Arr:
    out: Arr = x * ((1 + _erf(x * x.dtype.type(0.5**0.5)).astype(x.dtype)) / 2)
    return out


def gather_cells(op: Op, x: Arr, cells: Arr) -> Arr:
    found = np.stack([image[np.maximum(at, 0)] for image, at in zip(x, cells, strict=True)])
    found = np.where(cells[..., None] >= 0, found, 0)  # [B,M,k,d]
    return np.swapaxes(found, 2, 3).reshape(*cells.shape[:2], -1).astype(x.dtype)


def image_span(op: Op, rows: Arr, layout: Arr, start: Arr, newline: Arr, end: Arr) -> Arr:
    marks = np.stack([end, newline, start])
    table = np.stack([np.concatenate([marks, image]) for image in rows])
    return np.stack([image[at + 3] for image, at in zip(table, layout, strict=True)])


def merge_images(op: Op, x: Arr, tokens: Arr, images: Arr, n_images: Arr) -> Arr:
    out = x.copy()
    for b, count in enumerate(n_images):
        places = np.flatnonzero(tokens[b] == integer(op, "image_token"))[: min(count, images.shape[1])]
        out[b, places] = images[b, : len(places)]
    return out
