"""A weight as consecutive pieces of its bytes: made by a few threads some rows at a time, given in order.

Codes and scales of a matrix come from one reading of it. How many pieces are under way is bounded, and with
that the memory; which thread makes a piece changes no byte.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import prod
from typing import TypeVar

import numpy as np

from dsv4c.ir import quantised as q
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import Array, decode
from dsv4c.ir.packed import matrices
from dsv4c.ir.rows import by_rows
from dsv4c.ir.weights import TensorStore, WeightExpr

T = TypeVar("T")

PIECE = 1 << 23
"""Numbers of a piece, about."""

THREADS = min(4, os.cpu_count() or 1)
"""NumPy works without the interpreter's lock; the thread that takes the pieces has work of its own."""

_TILE = 64
"""Columns of a transposed matrix that are written at a time: a cache line in every row."""


def pieces(x: WeightExpr, store: TensorStore) -> Iterator[Array]:
    """The numbers of `x` in order, row-major: float32, or the integers they are."""
    yield from in_order(_number_jobs(x, store))


def code_pieces(
    codes: WeightExpr, scales: WeightExpr, store: TensorStore, made: list[Array]
) -> Iterator[Array]:
    """The codes in order, row-major; their scales are in `made`, in order, once the codes have been taken.

    Args:
        codes, scales: of the same matrices, matrix by matrix; codes may be transposed.
    """
    for code, scale in in_order(_code_jobs(codes, scales, store)):
        made.append(scale)
        yield code


def in_order(jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
    """The results of jobs, in their order; at most `THREADS` run and as many wait to be taken."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Future[T]] = deque(pool.submit(job) for job in islice(jobs, 2 * THREADS))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(job) for job in islice(jobs, 1))
                yield result
        finally:  # nobody wants the rest, or one has failed
            for future in pending:
                future.cancel()


def _number_jobs(x: WeightExpr, store: TensorStore) -> Iterator[Callable[[], Array]]:
    for matrix in matrices(x):
        parts = (w.rows(matrix, a, b) for a, b in _ranges(matrix)) if by_rows(matrix) else (matrix,)
        yield from (partial(_numbers, part, store) for part in parts)


def _numbers(x: WeightExpr, store: TensorStore) -> Array:
    values = decode(w.materialise(x, store), x.dtype)
    return np.ascontiguousarray(values, np.float32 if x.dtype.is_float else x.dtype.storage)


def _code_jobs(
    codes: WeightExpr, scales: WeightExpr, store: TensorStore
) -> Iterator[Callable[[], tuple[Array, Array]]]:
    for code, scale in zip(matrices(codes), matrices(scales), strict=True):
        plain = code.args[0] if code.op == "transpose" else code
        if not _made_together(plain, scale):
            yield partial(_apart, code, scale, store)
        elif plain is not code or not _rows_apart(plain):
            yield partial(_together, plain, store, plain is not code)
        else:
            x, *importance = plain.args
            search = plain.attr("search") is True
            for a, b in _ranges(x):
                part = q.encode_codes(w.rows(x, a, b), *importance, scheme=q.scheme_of(plain), search=search)
                yield partial(_together, part, store, False)


def _made_together(codes: WeightExpr, scales: WeightExpr) -> bool:
    """Whether both are made from the very same values."""
    if codes.op != "encode_codes" or scales.op != "encode_scales" or codes.attrs != scales.attrs:
        return False
    return len(codes.args) == len(scales.args) and all(map(_same, codes.args, scales.args))


def _same(a: object, b: object) -> bool:
    return a is b


def _rows_apart(codes: WeightExpr) -> bool:
    """Whether rows can be read, and are encoded, each without the others."""
    scheme = q.scheme_of(codes)
    return by_rows(codes.args[0]) and scheme.block[0] == 1 and not scheme.tensor_scale


def _apart(codes: WeightExpr, scales: WeightExpr, store: TensorStore) -> tuple[Array, Array]:
    found = (w.materialise(x, store) for x in (codes, scales))
    first, second = map(np.ascontiguousarray, found)
    return first, second


def _together(codes: WeightExpr, store: TensorStore, transpose: bool) -> tuple[Array, Array]:
    made = w.encoded(codes, store)
    return _transposed(made.codes) if transpose else made.codes, made.scales


def _transposed(x: Array) -> Array:
    """x.T, contiguous, of a matrix of bytes [rows, cols]; some rows at a time, which stay in the cache.

    Eight columns move together as one word, and then come apart in rows of `_TILE` bytes.
    """
    rows, cols = x.shape
    out = np.empty((cols, rows), x.dtype)
    apart = cols % 8 == 0
    words = x.view(np.uint64) if apart else x
    by_word = out.reshape(-1, 8, rows) if apart else out
    for start in range(0, rows, _TILE):
        band = slice(start, min(start + _TILE, rows))
        if not apart:
            out[:, band] = x[band].T
            continue
        moved = np.ascontiguousarray(words[band].T).view(x.dtype).reshape(cols // 8, -1, 8)
        for i in range(8):
            by_word[:, i, band] = moved[:, :, i]
    return out


def _ranges(x: WeightExpr) -> Iterator[tuple[int, int]]:
    """Row ranges of about `PIECE` numbers."""
    count, step = x.shape[0], max(1, PIECE // max(1, prod(x.shape[1:])))
    return ((start, min(start + step, count)) for start in range(0, count, step))
