"""What a host program does around the kernels: sort routes, allocate, launch. Runs them in the emulation.

The order of launches, the buffers and their types are the contract; with the vendor's runtime only `launch`
differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import TargetError

from .build import emulate

Arr = npt.NDArray[Any]


@dataclass(frozen=True)
class Routes:
    """All (token, expert) pairs of a call, sorted by expert, then by token.

    Attributes:
        first: i32 [E + 1], where the routes of each expert begin.
        tokens: i32 [P], the token of each route.
        weights: f32 [P], its routing weight.
        slots: i32 [N, k], the routes of a token by ascending expert, -1 for none.
    """

    first: Arr
    tokens: Arr
    weights: Arr
    slots: Arr


def routes(ids: Arr, weights: Arr, experts: int) -> Routes:
    """The routes of ids [N, k] and weights [N, k]; a negative id is no route.

    Raises:
        TargetError: an id is not below `experts`.
    """
    if ids.size and int(ids.max()) >= experts:
        allowed = f"ids below {experts}, -1 for none"
        raise TargetError(f"expert {int(ids.max())}", where="routes", allowed=allowed)
    token, slot = np.nonzero(ids >= 0)
    order = np.argsort(ids[token, slot], kind="stable")
    token, slot = token[order], slot[order]
    first = np.searchsorted(ids[token, slot], np.arange(experts + 1)).astype(np.int32)
    slots = np.full(ids.shape, -1, np.int32)
    used = np.zeros(len(ids), np.intp)
    for route, t in enumerate(token):
        slots[t, used[t]] = route
        used[t] += 1
    return Routes(first, token.astype(np.int32), _f32(weights[token, slot]), slots)


@dataclass(frozen=True)
class Machine:
    """One emulated card.

    Attributes:
        arch: a name in `build.ARCHS`.
        folder: keeps compiled kernels.
        tasks: how many tasks a launch has.
    """

    arch: str
    folder: Path
    tasks: int = 4

    def grouped_experts(
        self, x: Arr, ids: Arr, weights: Arr, w13: Arr, w2: Arr, limit: float,
        scales: tuple[Arr, Arr] | None = None,
    ) -> Arr:  # fmt: skip
        """y [N, d] of x [N, d], ids and weights [N, k], w13 [E, 2 I, d], w2 [E, d, I].

        Weights are float32, or int8 with `scales` ([E, 2 I], [E, d]), one for every row.
        """
        (n, d), (experts, _, inner) = x.shape, w2.shape
        found = routes(ids, weights, experts)
        size = {"tokens": max(1, n), "d": d, "inner": inner}
        kernel = emulate("grouped_experts", self.arch, size, self.folder)
        p, kind = len(found.tokens), "f32" if scales is None else "i8"
        hidden, rows, y = _nans(p, inner), _nans(p, d), _nans(n, d)
        s13, s2 = ((_f32(scales[0]),), (_f32(scales[1]),)) if scales else ((), ())
        w13, w2 = (_f32(w13), _f32(w2)) if scales is None else (_i8(w13), _i8(w2))
        x = _f32(x)
        kernel.launch(
            f"experts_hidden_{kind}", x, found.first, found.tokens, found.weights, w13, *s13, hidden,
            d, inner, experts, float(limit), tasks=self.tasks,
        )  # fmt: skip
        kernel.launch(
            f"experts_output_{kind}", hidden, found.first, w2, *s2, rows, d, inner, experts, tasks=self.tasks
        )
        kernel.launch("experts_combine", rows, found.slots, y, n, ids.shape[1], d, tasks=self.tasks)
        return y

    def sparse_attention(self, q: Arr, rows: Arr, lists: Arr, sinks: Arr, scale: float) -> Arr:
        """out [N, H, D] of q [N, H, D] over the rows [R, D] that lists [N, M] name, -1 for none."""
        n, heads, d = q.shape
        kernel = emulate("sparse_attention", self.arch, {"d": d}, self.folder)
        out = _nans(n, heads, d)
        held = _f32(q), _f32(rows), np.ascontiguousarray(lists, np.int32), _f32(sinks)
        kernel.launch(
            "sparse_attention", *held, out, n, heads, lists.shape[1], d, float(scale), tasks=self.tasks
        )
        return out

    def engram_gather(self, ids: Arr, codes: Arr, scales: Arr) -> Arr:
        """f32 [N, C width] of ids [N, C] and codes u8 [entries, width].

        The scales [entries, groups] are u8 (E8M0) or f32.
        """
        width, groups = codes.shape[1], scales.shape[1]
        kernel = emulate("engram_gather", self.arch, {"width": width, "groups": groups}, self.folder)
        out = _nans(ids.size, width)
        kind = "e8m0" if scales.dtype == np.uint8 else "f32"
        scales = scales if kind == "e8m0" else _f32(scales)
        flat = np.ascontiguousarray(ids, np.int32)
        codes, scales = np.ascontiguousarray(codes, np.uint8), np.ascontiguousarray(scales)
        kernel.launch(f"engram_gather_{kind}", flat, codes, scales, out, ids.size, tasks=self.tasks)
        return out.reshape(len(ids), -1)


def _f32(array: Arr) -> Arr:
    return np.ascontiguousarray(array, np.float32)


def _i8(array: Arr) -> Arr:
    return np.ascontiguousarray(array, np.int8)


def _nans(*shape: int) -> Arr:
    """What fresh device memory may hold: a number that is not written shows."""
    return np.full(shape, np.nan, np.float32)
