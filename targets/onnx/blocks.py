"""Walks the tokens of a call in blocks, so that what attention holds at once does not grow with the call."""

from __future__ import annotations

from collections.abc import Callable

from onnx import TensorProto

from .graph import Graph, V

BUDGET = 1 << 24
"""Floats a block may hold in intermediate tensors: 64 MiB."""

Body = Callable[[V, V], V]
"""(first token, token count), both INT64 [1] -> [B,n,C]."""


def over_token_blocks(
    g: Graph, tokens: V, per_token: V, cap: int, body: Body, dtype: int = TensorProto.FLOAT
) -> V:
    """[B,T,C]: `body` over blocks of equal size; the last one starts earlier, so that it is full too.

    Args:
        tokens: INT64 [1], the number of tokens T.
        per_token: INT64 [1], floats that the body holds per token and that count against `BUDGET`.
        cap: most tokens of a block.
    """
    fit = g.op("Div", BUDGET, per_token)
    size = g.op("Min", g.op("Min", g.op("Max", fit, 1), cap), tokens)
    count = g.op("Div", g.op("Sub", g.op("Add", tokens, size), 1), size)
    last = g.op("Sub", tokens, size)

    def one(i: V, _: V | None) -> tuple[None, V]:
        start = g.op("Min", g.op("Mul", g.op("Unsqueeze", i, [0]), size), last)
        return None, body(start, size)

    blocks = g.loop(count, None, one, scan=dtype)  # [count,B,size,C]
    return _join(g, blocks, tokens, size, count, last)


def _join(g: Graph, blocks: V, tokens: V, size: V, count: V, last: V) -> V:
    """[count,B,size,C] -> [B,T,C]: token t is row t - start of block min(t // size, count - 1)."""
    token = g.iota(tokens)
    block = g.op("Min", g.op("Div", token, size), g.op("Sub", count, 1))
    row = g.op("Sub", token, g.op("Min", g.op("Mul", block, size), last))
    rows = g.reshape(g.op("Transpose", blocks, perm=[1, 0, 2, 3]), 0, -1, g.dim(blocks, 3))
    return g.op("Gather", rows, g.op("Add", g.op("Mul", block, size), row), axis=1)
