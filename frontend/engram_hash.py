"""The constants of Engram's n-gram hash: multipliers, table sizes and offsets of every layer.

Pure integers, computed as section 3 of the Engram specification says. Knows no tensors and no graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from math import isqrt

import numpy as np

from dsv4c.errors import ConfigError

_LAYER_SEED = 10007  # times the layer, added to the seed of the model
_LARGEST = 2**63 - 1  # a product of id and multiplier must not pass it


@dataclass(frozen=True)
class LayerHash:
    """The hash of one layer.

    Attributes:
        multipliers: one per look-back distance 0..max_ngram-1, odd.
        primes: rows of each table; column (n-2) heads + a is head a of order n.
        offsets: first row of each table in the layer's one tensor.
    """

    multipliers: tuple[int, ...]
    primes: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(accumulate((0, *self.primes[:-1])))

    @property
    def rows(self) -> int:
        """Rows of all tables together."""
        return sum(self.primes)


def layer_multipliers(layer: int, compressed_vocab: int, max_ngram: int, seed: int = 0) -> tuple[int, ...]:
    """2r + 1 for r drawn uniformly below half of the largest factor that cannot overflow an id's product.

    Drawn with NumPy's PCG64, seeded with `seed` + 10007 `layer`; a shorter draw is a prefix of a longer one.
    """
    bound = max(1, _LARGEST // compressed_vocab // 2)
    draws = np.random.default_rng(seed + _LAYER_SEED * layer).integers(0, bound, max_ngram, np.int64)
    return tuple(2 * int(r) + 1 for r in draws)


def layer_primes(layers: Sequence[int], sizes: Sequence[int], heads: int) -> dict[int, tuple[int, ...]]:
    """Layer -> the table sizes of its columns, order by order.

    Args:
        layers: in the order of the model; no prime serves two tables of the model.
        sizes: where the search starts, one per order; the first prime is at least that.
    """
    used: set[int] = set()
    out = {}
    for layer in layers:
        columns: list[int] = []
        for size in sizes:
            found = _primes_from(size, used)
            columns += [next(found) for _ in range(heads)]
            used.update(columns)
        out[layer] = tuple(columns)
    return out


def _primes_from(start: int, used: set[int]) -> Iterator[int]:
    return (n for n in count(start) if n not in used and _is_prime(n))


def _is_prime(n: int) -> bool:
    if n < 4:
        return n > 1
    return n % 2 == 1 and all(n % k for k in range(3, isqrt(n) + 1, 2))


def layer_hashes(
    layers: Sequence[int], sizes: Sequence[int], heads: int, compressed_vocab: int, seed: int = 0
) -> dict[int, LayerHash]:
    """The hash of every layer with Engram.

    Raises:
        ConfigError: there is nothing to hash, or a layer's rows do not fit int32.
    """
    if min(heads, compressed_vocab, len(sizes), *sizes, *(1 + layer for layer in layers)) < 1:
        raise ConfigError(
            f"heads {heads}, compressed vocabulary {compressed_vocab}, table sizes {list(sizes)}",
            where="engram", allowed="positive numbers",
        )  # fmt: skip
    primes = layer_primes(layers, sizes, heads)
    out = {
        layer: LayerHash(layer_multipliers(layer, compressed_vocab, len(sizes) + 1, seed), primes[layer])
        for layer in layers
    }
    for layer, hash_ in out.items():
        if hash_.rows >= 2**31:
            raise ConfigError(f"layer {layer} has {hash_.rows} rows", where="engram", allowed=f"{2**31 - 1}")
    return out
