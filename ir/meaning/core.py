"""Meanings of the `core` family. Every function takes the op and its operands, returns its results."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.ir.graph import Op

from .quantise import bf16

Arr = npt.NDArray[Any]


def number(op: Op, name: str) -> float:
    value = op.attrs[name]
    assert isinstance(value, int | float)
    return value


def integer(op: Op, name: str) -> int:
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


def embed(op: Op, tokens: Arr, table: Arr) -> Arr:
    return table[tokens]


def repeat_streams(op: Op, x: Arr) -> Arr:
    return np.repeat(x[:, :, None], integer(op, "n"), axis=2)


def linear(op: Op, x: Arr, w: Arr) -> Arr:
    return x @ w.T


def grouped_linear(op: Op, x: Arr, w: Arr) -> Arr:
    groups = integer(op, "groups")
    b, t = x.shape[:2]
    grouped = x.reshape(b, t, groups, -1)
    blocks = w.reshape(groups, w.shape[0] // groups, -1)
    out: Arr = np.einsum("btgc,grc->btgr", grouped, blocks)
    return out.reshape(b, t, -1)


def unit_norm(op: Op, x: Arr) -> Arr:
    eps = x.dtype.type(number(op, "eps"))
    if op.attrs["rounding"] == "none":
        return _unit(x, eps)
    mean = bf16(np.mean(bf16(x * x), axis=-1, keepdims=True))
    return bf16(x * bf16(1 / np.sqrt(bf16(mean + eps))))


def rms_norm(op: Op, x: Arr, w: Arr) -> Arr:
    return _unit(x, x.dtype.type(number(op, "eps"))) * w


def _unit(x: Arr, eps: np.generic) -> Arr:
    out: Arr = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return out


def split_heads(op: Op, x: Arr) -> Arr:
    return x.reshape(*x.shape[:2], integer(op, "heads"), -1)


def merge_heads(op: Op, x: Arr) -> Arr:
    return x.reshape(*x.shape[:2], -1)


def add(op: Op, a: Arr, b: Arr) -> Arr:
    return a + b


def add_bias(op: Op, x: Arr, bias: Arr) -> Arr:
    return x + bias


def scale(op: Op, x: Arr) -> Arr:
    out: Arr = x * x.dtype.type(number(op, "factor"))
    return out


def clamp(op: Op, x: Arr) -> Arr:
    return np.clip(x, number(op, "low"), number(op, "high"))


def silu(x: Arr) -> Arr:
    return x * sigmoid(x)


def sigmoid(x: Arr) -> Arr:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def swiglu(op: Op, gate: Arr, up: Arr) -> Arr:
    return silu(gate) * up


def clamped_swiglu(op: Op, gate: Arr, up: Arr) -> Arr:
    limit = number(op, "limit")
    out: Arr = silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit)
    return out


def gather_rows(op: Op, x: Arr, rows: Arr) -> Arr:
    return np.take_along_axis(x, rows[:, :, None].astype(np.int64), axis=1)
