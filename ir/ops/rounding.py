"""Rounding points as ops, and the Hadamard rotation of index vectors (sections 3.2, 3.3, 3.7 and 6)."""

from __future__ import annotations

from dsv4c.ir.attrs import AttrKind
from dsv4c.ir.opdef import AttrDef, OpDef, Signature, static
from dsv4c.ir.types import TensorType, f32

Types = tuple[TensorType, ...]

RULES = ("bf16", "fp16", "e4m3", "e2m1", "e2m1_e4m3", "int8")
"""The values of `round_values.rule`."""


def _round_values(sig: Signature) -> Types:
    x = sig.shape(0)
    sig.choice("rule", *RULES)
    width, block, channels = static(sig, x[-1], "width"), sig.int("block"), sig.int("channels")
    if not 0 <= channels <= width or block < 0:
        sig.fail(f"cannot round {channels} channels in blocks of {block} of {width}")
    return (f32(*x),)


def _hadamard(sig: Signature) -> Types:
    x = sig.shape(0)
    width = static(sig, x[-1], "width")
    if width & (width - 1):
        sig.fail(f"needs a power of two as width, got {width}")
    return (f32(*x),)


ROUNDING: tuple[OpDef, ...] = (
    OpDef("round_values", ("x",), _round_values,
          (AttrDef("rule", AttrKind.STR), AttrDef("block", AttrKind.INT, 0),
           AttrDef("channels", AttrKind.INT, 0)),
          source="3.2, 3.3, 6; V4.1 3",
          doc="x after quantisation by `rule` and back; `block` values of the last axis share a scale (0: all"
              " of them, a last shorter block is one of its own), only the first `channels` are rounded (0:"
              " all of them). Scales of e4m3 and e2m1 are powers of two, those of e2m1_e4m3 E4M3 numbers."),
    OpDef("hadamard", ("x",), _hadamard, source="3.7",
          doc="Sylvester's matrix of the last axis' width times x times width^-1/2."),
)  # fmt: skip
