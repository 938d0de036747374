"""Single matrix products of the TVM emitter, with weights of any scheme, to be run and timed alone.

Weights rotate through more copies than the caches hold, as the layers of a model do.
"""

# TVM has no static types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from dsv4c.ir import layouts
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType
from dsv4c.ir.encode import encode
from dsv4c.ir.formats import SCHEMES
from dsv4c.targets.base import Arch
from dsv4c.targets.cpu.tuning import DEFAULT, Tuning

from .emit import cross_attributes, machine_code, simd_of
from .kernels import dense, dispatch
from .kernels.packing import Packing
from .kernels.product import panel_width
from .kernels.rows import Rows
from .kernels.tiles import by_tiles

BYTES = 1 << 29
"""Of all copies of one weight together, about: more than the last cache."""
TOPK = 6
ROWS = ("f32", "bf16", "split", "int8")
"""What inputs are; split: float32 as three BF16 numbers; int8: where codes are integers or FP4, else bf16."""

Arr = npt.NDArray[Any]


@dataclass(frozen=True)
class Product:
    """`call(copy)` runs it once.

    Attributes:
        copies: of the weights.
        read: bytes of weights that one call reads.
        products: multiplications of one call.
    """

    call: Callable[[int], object]
    copies: int
    read: int
    products: int


@dataclass(frozen=True)
class Maker:
    """Makes products for an arch that this machine runs."""

    arch: Arch
    tuning: Tuning = DEFAULT
    nbytes: int = BYTES

    def linear(self, scheme: str, rows: str, tokens: int, n: int, k: int) -> Product:
        """Rows [tokens, k] by a matrix [n, k]."""
        packing, arrays = self._stored(scheme, rows, 1, n, k, panel_width(n))
        kernel = self._compiled(dense.grouped_linear(None, 1, k, n, packing))
        x, y = _rows_in(packing, 1, tokens, k), _tensor(np.zeros((1, tokens, n), np.float32))
        weights = [_tensors(arrays) for _ in range(self._copies(arrays))]
        return Product(lambda i: kernel(x, *weights[i], y), len(weights), _size(arrays), tokens * n * k)

    def experts(self, scheme: str, rows: str, tokens: int, count: int, inner: int, k: int) -> Product:
        """Both halves; every token takes TOPK of the experts, so one token reads those panels alone."""
        packing, first = self._stored(scheme, rows, count, 2 * inner, k, 2 * dense.PAIR)
        _, second = self._stored(scheme, rows, count, k, inner, panel_width(k))
        hidden = self._compiled(dense.expert_hidden(count, k, inner, TOPK, 10.0, packing, packing))
        output = self._compiled(dense.expert_output(count, k, inner, TOPK, packing))
        sort = self._compiled(dispatch.expert_order(count, TOPK))
        rng = np.random.default_rng(1)
        ids = rng.permuted(np.tile(np.arange(count), (1, tokens, 1)), axis=-1)[..., :TOPK].astype(np.int32)
        routes, i32 = tokens * TOPK, np.int32
        order, starts = _tensor(np.zeros(routes, i32)), _tensor(np.zeros(count + 1, i32))
        sort(_tensor(ids), _tensor(np.array([tokens], i32)), order, starts)
        x = _rows_in(packing, *((routes,) if by_tiles(packing) else (1, tokens)), k)
        gates, mid = _tensor(_normal(1, tokens, TOPK)), _rows_in(packing, routes, inner)
        y = _tensor(np.zeros((1, tokens, k), np.float32))
        weights = [(_tensors(first), _tensors(second)) for _ in range(self._copies(first + second))]

        def call(i: int) -> None:
            hidden(x, gates, order, starts, *weights[i][0], mid)
            output(mid, order, starts, *weights[i][1], y)

        read = int(len(np.unique(ids)) / count * _size(first + second))
        return Product(call, len(weights), read, routes * 3 * inner * k)

    def _stored(
        self, scheme: str, rows: str, count: int, n: int, k: int, width: int
    ) -> tuple[Packing, list[Arr]]:
        """How kernels take `count` normal matrices [n, k]: packing; codes, block and row scales."""
        s, one = SCHEMES[scheme], np.ones(1, np.float32)
        found = encode(_normal(n, k) * np.float32(k**-0.5), s)
        plain = Packing(s.code, simd=simd_of(self.arch), tuning=self.tuning)
        if s.plain:
            layout = w.panel if s.code is DType.F32 else layouts.lane_words
            return _taking(plain, rows), [_made(layout, found.codes, s.code, width, count), one, one]
        assert s.scale is not None
        codes = _made(layouts.lane_words, found.codes, s.code, width, count)
        bands = np.repeat(found.scales, s.block[0] or n, axis=0)[:n]
        scales = _made(w.panel, bands, s.scale, width, count)
        if s.block[1] == 0:
            return _taking(replace(plain, rows=True), rows), [codes, one, scales]
        tensor_scale = one
        if found.tensor_scale is not None:
            wide = np.repeat(found.tensor_scale[None], n, axis=0)
            tensor_scale = _made(w.panel, wide, DType.F32, width, count)
        packing = replace(plain, scale=s.scale, block=s.block[1], rows=s.tensor_scale)
        return _taking(packing, rows), [codes, scales, tensor_scale]

    def _copies(self, arrays: list[Arr]) -> int:
        return max(1, round(self.nbytes / _size(arrays)))

    def _compiled(self, kernel: Any) -> Any:
        function = kernel.with_attr("global_symbol", "main")
        return machine_code(function, cross_attributes(self.arch))["main"]


def _taking(packing: Packing, rows: str) -> Packing:
    """The packing for inputs as `ROWS` says."""
    if rows == "int8" and packing.code in (DType.I8, DType.I4X2, DType.F4E2M1X2):
        return replace(packing, coded=True)
    pieces = {"f32": 0, "bf16": 1, "split": 3, "int8": 1}[rows]
    return replace(packing, pieces=0 if packing.code is DType.F32 else pieces)


def _rows_in(packing: Packing, *shape: int) -> Any:
    """Rows as kernels take them: float32, the bits of BF16 pieces, or codes with scales."""
    form = Rows(packing, shape[-1])
    shape = form.shape(*shape[:-1])
    if packing.coded:
        return _tensor(np.full(shape, 0x3F010203, np.uint32))  # codes 3, 2, 1, 63, and a scale of 0.504
    x = _normal(*shape)
    return _tensor((x.view(np.uint32) >> 16).astype(np.uint16) if packing.pieces else x)


def _made(layout: Callable[..., Any], array: Arr, dtype: DType, width: int, count: int) -> Arr:
    """`count` times an array in a layout of panels, one after the other."""

    class Store:
        def read(self, _: str) -> Arr:
            return array

    panels = w.materialise(layout(w.source("m", dtype, array.shape), width), Store())
    return np.concatenate([panels] * count)


def _size(arrays: list[Arr]) -> int:
    return sum(a.nbytes for a in arrays)


def _normal(*shape: int) -> Arr:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _tensors(arrays: list[Arr]) -> list[Any]:
    return [_tensor(a) for a in arrays]


def _tensor(array: Arr) -> Any:
    """An aligned copy."""
    return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cpu())
