"""Meanings of the `rounding` family (sections 3.2, 3.3, 3.7 and 6).

Every rule rounds the float32 cast of its input, whatever the precision of the evaluation, so a float64
evaluation goes through float32 first: its result differs from a direct rounding only where the float32
cast lands on a tie. Results are numbers of the input's type.
"""

from __future__ import annotations

import numpy as np

from dsv4c.ir.graph import Op

from .core import Arr, integer
from .quantise import bf16, blocks, e2m1, e2m1_e4m3, e4m3, fp16, int8

_PLAIN = {"bf16": bf16, "fp16": fp16}
_SCALED = {"e4m3": e4m3, "e2m1": e2m1, "e2m1_e4m3": e2m1_e4m3, "int8": int8}


def round_values(op: Op, x: Arr) -> Arr:
    rule, out = str(op.attrs["rule"]), x.copy()
    width = integer(op, "channels") or x.shape[-1]
    block, part = integer(op, "block") or width, x[..., :width]
    out[..., :width] = _PLAIN[rule](part) if rule in _PLAIN else blocks(_SCALED[rule], part, block)
    return out


def hadamard(op: Op, x: Arr) -> Arr:
    return rotate(x)


def rotate(x: Arr) -> Arr:
    """The last axis by Sylvester's matrix, times width^-1/2."""
    width, out, half = x.shape[-1], x, 1
    while half < width:
        pair = out.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        out = np.stack([pair[..., 0, :] + pair[..., 1, :], pair[..., 0, :] - pair[..., 1, :]], axis=-2)
        out, half = out.reshape(x.shape), 2 * half
    scaled: Arr = out * x.dtype.type(width**-0.5)
    return scaled
