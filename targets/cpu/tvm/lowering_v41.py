"""How the ops that only V4.1 has become kernel calls: index candidates and images; part of `LOWERINGS`."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from dsv4c.ir.graph import Op

from .context import Context, ints
from .kernels import route, select, unfused, vision


def index_select_in_blocks(c: Context, op: Op) -> None:
    heads, d = ints(op.operands[0])
    a, (count,) = op.attrs, ints(op.operands[5])
    c.lower(op, select.index_select_in_blocks, heads, d, a["ratio"], a["k"], a["size"], count)


def index_candidates(c: Context, op: Op) -> None:
    heads, d = ints(op.operands[0])
    a = op.attrs
    c.lower(op, select.index_candidates, heads, d, a["ratio"], a["k"], a["size"], a["count"])


def candidate_blocks(c: Context, op: Op) -> None:
    c.lower(op, unfused.candidate_blocks, op.attrs["ratio"], op.attrs["size"], op.attrs["count"])


def index_restrict(c: Context, op: Op) -> None:
    c.lower(op, unfused.index_restrict, op.attrs["size"], ints(op.operands[1])[0])


def route_topk_of_images(c: Context, op: Op) -> None:
    scores, bias, tokens, image_bias = op.operands
    args = [c.values[scores], c.weight(bias), c.values[tokens], c.weight(image_bias)]
    key = (ints(scores)[0], op.attrs["k"], op.attrs["image_token"])
    c.lower(op, route.route_topk_of_images, *key, args=args)


def merge_heads(c: Context, op: Op) -> None:
    shape = relax.ShapeExpr([c.dim(d) for d in op.result.type.shape])
    c.values[op.result] = c.builder.emit(relax.op.memory.view(c.values[op.operands[0]], shape))


def grid_angles(c: Context, op: Op) -> None:
    places, frequencies = op.operands
    args = [c.values[places], c.weight(frequencies)]
    c.lower(op, vision.grid_angles, ints(frequencies)[0], args=args)


def full_attention(c: Context, op: Op) -> None:
    c.lower(op, vision.full_attention, *op.operands[0].type.shape[2:], op.attrs["scale"])


def gelu(c: Context, op: Op) -> None:
    c.lower(op, vision.gelu, op.operands[0].type.shape[-1])


def gather_cells(c: Context, op: Op) -> None:
    x, cells = op.operands
    c.lower(op, vision.gather_cells, x.type.shape[-1], cells.type.shape[-1])


def image_span(c: Context, op: Op) -> None:
    rows, layout, *marks = op.operands
    args = [c.values[rows], c.values[layout], *(c.weight(v) for v in marks)]
    c.lower(op, vision.image_span, rows.type.shape[-1], args=args)


def merge_images(c: Context, op: Op) -> None:
    c.lower(op, vision.merge_images, op.operands[0].type.shape[-1], op.attrs["image_token"])


V41_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "index_candidates": index_candidates, "candidate_blocks": candidate_blocks,
    "index_restrict": index_restrict, "merge_heads": merge_heads, "grid_angles": grid_angles,
    "full_attention": full_attention, "gelu": gelu, "gather_cells": gather_cells, "image_span": image_span,
    "merge_images": merge_images,
}  # fmt: skip
"""What this file adds to the emitter; variants of V4's ops are called by their lowerings."""
