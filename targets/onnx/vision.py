"""Lowerings of the `vision` family: how image rows enter the text, and the image encoder."""

from __future__ import annotations

from onnx import TensorProto

from dsv4c.ir.graph import Op

from .lowering import Context, V, integer, number, size
from .state import clip, column


def merge_images(g: Context, op: Op) -> V:
    """x [B,T,d], tokens [B,T], images [B,I,d], n_images [B] -> [B,T,d]."""
    x, tokens, images, n_images = g.tensors(op, 4)
    is_image = g.op("Equal", tokens, integer(op, "image_token"))
    nth = g.op("Sub", g.op("CumSum", g.cast_index(is_image), 1), 1)
    rows = g.gather_rows(images, clip(g, nth, g.dim(images, 1)))
    there = g.op("Min", column(g, n_images), g.dim(images, 1))
    given = g.op("And", is_image, g.op("Less", nth, there))
    return g.op("Where", g.op("Unsqueeze", given, [2]), rows, x)


def grid_angles(g: Context, op: Op) -> tuple[V, V]:
    """places [B,N,2], frequencies [R/4] -> cos, sin [B,N,R/2]: rows' angles, then columns'."""
    places, frequencies = g.tensors(op, 2)
    where = g.op("Unsqueeze", g.op("Cast", places, to=TensorProto.FLOAT), [3])
    angle = g.reshape(g.op("Mul", where, frequencies), 0, 0, 2 * size(op, 1, 0))
    return g.op("Cos", angle), g.op("Sin", angle)


def full_attention(g: Context, op: Op) -> V:
    """q, k, v [B,N,H,D] -> [B,N,H,D]; a block of queries at a time sees every key."""
    q, keys, values = (g.op("Transpose", g.tensor(op, i), perm=[0, 2, 1, 3]) for i in range(3))
    heads, width = size(op, 0, 2), size(op, 0, 3)
    count = g.dim(q, 2)
    held = g.op("Mul", g.op("Mul", count, 3 * heads), g.dim(q, 0))

    def block(start: V, length: V) -> V:
        here = g.op("Slice", q, start, g.op("Add", start, length), [2])
        p = g.op("Softmax", g.matmul_t(here, keys, number(op, "scale")), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", p, values), perm=[0, 2, 1, 3])
        return g.reshape(mixed, 0, 0, heads * width)

    return g.reshape(g.token_blocks(count, held, 1 << 30, block), 0, 0, heads, width)


def gelu(g: Context, op: Op) -> V:
    """Any shape; with the error function."""
    return g.op("Gelu", g.tensor(op, 0))


def gather_cells(g: Context, op: Op) -> V:
    """x [B,N,d], cells [B,M,k] -> [B,M,d*k], channel by channel."""
    x, cells = g.tensors(op, 2)
    found = g.gather_rows(x, g.op("Max", cells, 0))
    found = g.op("Where", g.op("Less", g.op("Unsqueeze", cells, [3]), 0), 0.0, found)
    turned = g.op("Transpose", found, perm=[0, 1, 3, 2])
    return g.reshape(turned, 0, 0, size(op, 0, 2) * size(op, 1, 2))


def image_span(g: Context, op: Op) -> V:
    """rows [B,M,d], layout [B,S], start, newline, end [d] -> [B,S,d]."""
    rows, layout, start, newline, end = g.tensors(op, 5)
    width = size(op, 0, 2)
    marks = g.op("Concat", *(g.reshape(m, 1, width) for m in (end, newline, start)), axis=0)
    marks = g.op("Expand", g.op("Unsqueeze", marks, [0]), g.shape(g.dim(rows, 0), 3, width))
    return g.gather_rows(g.op("Concat", marks, rows, axis=1), g.op("Add", layout, 3))
