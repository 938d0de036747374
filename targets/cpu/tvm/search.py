"""The search behind `dsv4c tune`: one number after the other, each by timing products that it changes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4c.targets.base import Arch
from dsv4c.targets.cpu.tuning import ALLOWED, Tuning, default_for

from .emit import simd_of
from .kernels.packing import Simd
from .products import Maker, Product

MARGIN = 0.02
"""By how much the best must beat what is there: below that rounds scatter."""
SIZE = (2048, 1024)
"""N and K of the products."""
SCHEMES = ("bf16", "fp8", "mxfp4", "int8")
TOKENS: dict[str, tuple[int, ...]] = {"ahead": (1,), "few": (2, 4, 6), "strip": (64,)}
"""Number -> tokens of the products that it matters for, in the order of the search."""

Case = tuple[str, str, int]
"""Scheme, rows as `products.ROWS` says, tokens."""


@dataclass(frozen=True)
class Trial:
    """One value of one number: `ratio` is the geometric mean of its times over those of the value before."""

    name: str
    value: int
    ratio: float


def search(
    arch: Arch, rounds: int, progress: Callable[[str, int, int], None], nbytes: int = 1 << 28
) -> tuple[Tuning, list[Trial]]:
    """The best tuning for an arch on this machine, and all trials.

    Args:
        rounds: times that every candidate is timed, all in turn.
        progress: is called with a name, steps done and steps in all.
        nbytes: of the weights of each product, more than the last cache.
    """
    tuning, trials = default_for(arch.name), list[Trial]()
    for step, name in enumerate(TOKENS):
        progress(name, step, len(TOKENS))
        candidates = {value: replace(tuning, **{name: value}) for value in ALLOWED[name]}
        times = {
            case: timed({v: made(arch, t, case, nbytes) for v, t in candidates.items()}, rounds)
            for case in cases(arch, TOKENS[name])
        }
        ratios = mean_ratios(times, getattr(tuning, name))
        trials += [Trial(name, value, ratio) for value, ratio in ratios.items()]
        tuning = candidates[chosen(ratios, getattr(tuning, name))]
    progress("done", len(TOKENS), len(TOKENS))
    return tuning, trials


def cases(arch: Arch, tokens: Sequence[int]) -> list[Case]:
    """The products that are timed: with narrow rows where the arch multiplies those."""
    narrow = simd_of(arch) in (Simd.AMX, Simd.AVX512_BF16)
    return [(scheme, "int8" if narrow else "f32", t) for scheme in SCHEMES for t in tokens]


def made(arch: Arch, tuning: Tuning, case: Case, nbytes: int) -> Product:
    scheme, rows, tokens = case
    return Maker(arch, tuning, nbytes).linear(scheme, rows, tokens, *SIZE)


def timed(products: Mapping[int, Product], rounds: int) -> dict[int, float]:
    """Median seconds of a call of each, one round of each in turn."""
    seconds: dict[int, list[float]] = {value: [] for value in products}
    for product in products.values():
        product.call(0)
    for _ in range(rounds):
        for value, product in products.items():
            start = time.perf_counter()
            for copy in range(product.copies):
                product.call(copy)
            seconds[value].append((time.perf_counter() - start) / product.copies)
    return {value: statistics.median(s) for value, s in seconds.items()}


def mean_ratios(times: Mapping[Any, Mapping[int, float]], base: int) -> dict[int, float]:
    """Value -> geometric mean over the products of its time over that of `base`."""
    values = next(iter(times.values())).keys()
    return {
        v: math.exp(statistics.fmean(math.log(of[v] / of[base]) for of in times.values())) for v in values
    }


def chosen(ratios: Mapping[int, float], base: int) -> int:
    """The fastest value, where it is faster than `base` by more than `MARGIN`."""
    best = min(ratios, key=lambda v: ratios[v])
    return best if ratios[best] < 1 - MARGIN else base
