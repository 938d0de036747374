"""How image rows and the image encoder become launches; part of `lowering.LOWERINGS`."""

from __future__ import annotations

from collections.abc import Callable

from dsv4c.ir.graph import Op

from .context import Context, blocks, ints, power, width


def merge_images(c: Context, op: Op) -> None:
    x, tokens, images, n_images = op.operands
    b, t = (c.dim(s) for s in tokens.type.shape)
    d, image_token = width(x), op.attrs["image_token"]
    assert isinstance(image_token, int)
    tile = min(power(d, 32), 1024)
    c.launch(
        "merge_images", (c.rows(x), blocks(d, tile)), {"D": d, "BT": 128, "BD": tile}, x=c.values[x],
        tokens=c.values[tokens], images=c.values[images], n_images=c.values[n_images],
        y=c.result(op.result), B=b, T=t, R=c.dim(images.type.shape[1]), XS=c.values[x].stride,
        image_token=image_token,
    )  # fmt: skip


def grid_angles(c: Context, op: Op) -> None:
    """The kernel of `rope_angles`: row and column of a patch are two positions, side by side."""
    places, frequencies = op.operands
    half, rows = ints(frequencies)[0], f"{c.rows(places)}*2"
    cos, sin = (c.result(v) for v in op.results)
    c.launch(
        "rope_angles", (rows,), {"HALF": half, "BD": power(half, 32)}, warps=1, positions=c.values[places],
        frequencies=c.weight(frequencies), cos=cos, sin=sin, M=rows,
    )  # fmt: skip


def gather_cells(c: Context, op: Op) -> None:
    x, cells = op.operands
    b, n = (c.dim(s) for s in x.type.shape[:2])
    d, (cell,) = width(x), ints(cells)
    tile = min(power(d * cell, 32), 1024)
    c.launch(
        "gather_cells", (c.rows(cells), blocks(d * cell, tile)), {"D": d, "CELL": cell, "BN": tile},
        x=c.values[x], cells=c.values[cells], y=c.result(op.result), B=b, N=n, M=c.dim(cells.type.shape[1]),
        XS=c.values[x].stride,
    )  # fmt: skip


def image_span(c: Context, op: Op) -> None:
    rows, layout, start, newline, end = op.operands
    b, span = (c.dim(s) for s in layout.type.shape)
    d = width(rows)
    tile = min(power(d, 32), 1024)
    c.launch(
        "image_span", (f"({b})*({span})", blocks(d, tile)), {"D": d, "BD": tile}, rows=c.values[rows],
        layout=c.values[layout], start=c.weight(start), newline=c.weight(newline), end=c.weight(end),
        y=c.result(op.result), B=b, M=c.dim(rows.type.shape[1]), S=span, XS=c.values[rows].stride,
    )  # fmt: skip


def full_attention(c: Context, op: Op) -> None:
    q, k, v = (c.values[x] for x in op.operands)
    b, n = (c.dim(s) for s in op.result.type.shape[:2])
    (heads, d), t, scale = ints(op.result), c.tiles("full_attention"), op.attrs["scale"]
    assert isinstance(scale, int | float)
    constants = {
        "H": heads, "D": d, "PRECISION": c.precision, "BM": t.bm, "BN": t.bn, "BD": power(d, 16),
        "BK": min(power(d, 16), t.bk),
    }  # fmt: skip
    c.launch(
        "full_attention", (blocks(n, t.bm), f"({b})*{heads}"), constants, warps=t.warps, stages=t.stages,
        q=q, k=k, v=v, out=c.result(op.result), B=b, N=n, QS=q.stride, KS=k.stride, VS=v.stride,
        scale=float(scale),
    )  # fmt: skip


IMAGE_LOWERINGS: dict[str, Callable[[Context, Op], None]] = {
    "merge_images": merge_images, "grid_angles": grid_angles, "gather_cells": gather_cells,
    "image_span": image_span, "full_attention": full_attention,
}  # fmt: skip
"""What this file adds to the emitter."""
