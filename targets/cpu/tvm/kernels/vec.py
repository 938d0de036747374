"""Vector expressions shared by the kernels: 16 float32 lanes, loads of F32 and BF16, exp and sigmoid.

LLVM splits 16 lanes for machines with narrower vectors, so every kernel is correct everywhere.
"""

# TIR expressions have no static types; these helpers are the one place that builds them by hand.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from tvm.script import tirx as T

LANES = 16


def ramp(start):
    """LANES consecutive indices."""
    return T.ramp(start, 1, LANES)


def splat(x):
    """One scalar in every lane."""
    return T.broadcast(x, LANES)


def zeros():
    return T.broadcast(T.float32(0), LANES)


def load_weight(buffer, index, bf16: bool):
    """16 weights as float32 from a flat buffer of float32 or of BF16 bits."""
    if not bf16:
        return buffer[ramp(index)]
    bits = T.shift_left(T.cast(buffer[ramp(index)], "uint32x16"), T.broadcast(T.uint32(16), LANES))
    return T.reinterpret("float32x16", bits)


def load_scalar(buffer, index, bf16: bool):
    """One weight as float32."""
    if not bf16:
        return buffer[index]
    return T.reinterpret("float32", T.shift_left(T.cast(buffer[index], "uint32"), T.uint32(16)))


def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to inf where the result is 0, as it should."""
    return T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - x))


def weight_dtype(bf16: bool) -> str:
    """How TIR sees the storage of a weight."""
    return "uint16" if bf16 else "float32"


def shape(*dims):
    """A buffer shape; None leaves an axis out, for kernels that serve rank 3 and rank 4."""
    return tuple(d for d in dims if d is not None)
