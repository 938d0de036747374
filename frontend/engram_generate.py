"""Writes random Engram layers of any size, in the number formats of each variant.

    python -m dsv4c.frontend.engram_generate OUT --preset prod

Knows no graph. Table rows are drawn as codes, so a table may be larger than memory.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4c.errors import Dsv4cError, UsageError
from dsv4c.ir.dtypes import Array, DType, F32Array, f32_to_bf16

from .encode import encode_fp8
from .engram import EngramConfig, Variant
from .engram_layer import TILE, config_json, mod_token_map
from .safetensors import SINGLE
from .stored import StoredTensor, write_safetensors
from .token_map import write_token_map

_PAD_TOKEN = 2
_BAND = 1 << 22  # numbers generated at a time

PRESETS: dict[str, tuple[EngramConfig, int]] = {
    "demo": (
        EngramConfig(Variant.DEMO, (1, 15), (1009, 1009), 4, 16, 48, 4, 100, _PAD_TOKEN, 128),
        15,
    ),
    "tk": (EngramConfig(Variant.TK, (2,), (1009, 1009), 4, 16, 48, 4, 100, _PAD_TOKEN), 2),
    "prod": (
        EngramConfig(Variant.PROD, (1, 3), (1009,) * 3, 2, 32, 64, 4, 400, _PAD_TOKEN, 512, dead_token=510),
        3,
    ),
}
"""Name -> configuration and layer; the hash of "prod" is that of the reduced DeepSeek-V4.1 model."""


def generate_engram_layer(
    directory: str | Path, config: EngramConfig, layer: int, *, seed: int = 0, table: str = "fp8"
) -> Path:
    """Write config.json, model.safetensors and, unless TK, a token map; returns the directory.

    Args:
        table: number format of the table and of PROD's projection: "fp8", "bf16" or "f32". DEMO is float32
            throughout and TK has no FP8.

    Raises:
        UsageError: the directory holds weights, or the variant has no such format.
    """
    root = Path(directory)
    if table not in _FORMATS[config.variant]:
        allowed = ", ".join(_FORMATS[config.variant])
        raise UsageError(f"table {table!r}", where=f"Engram {config.variant.value}", allowed=allowed)
    if root.is_dir() and any(root.glob("*.safetensors")):
        raise UsageError("the directory holds weights already", where=str(root), hint="name an empty one")
    root.mkdir(parents=True, exist_ok=True)
    plan = _Plan(config, layer, seed, table)
    write_safetensors(root / SINGLE, list(plan.tensors()))
    if config.variant is not Variant.TK:
        write_token_map(root, mod_token_map(config.vocab, config.compressed_vocab))
    temporary = root / "config.json.part"
    temporary.write_text(config_json(config, layer, _PAD_TOKEN), encoding="utf-8")
    temporary.replace(root / "config.json")
    return root


_FORMATS = {
    Variant.DEMO: ("f32",),
    Variant.TK: ("bf16", "f32"),
    Variant.PROD: ("fp8", "bf16", "f32"),
}


@dataclass(frozen=True)
class _Plan:
    """Which tensors a layer gets, and how their bytes are made."""

    config: EngramConfig
    layer: int
    seed: int
    table: str

    def tensors(self) -> Iterator[StoredTensor]:
        c = self.config
        d, inputs, channels = c.hidden, c.columns * c.width, c.streams * c.hidden
        rows = c.hashes[self.layer].rows
        if c.variant is Variant.DEMO:
            yield self._floats("multi_head_embedding.embedding.weight", (rows, c.width))
            for name in [*(f"key_projs.{j}" for j in range(c.streams)), "value_proj"]:
                yield self._floats(f"{name}.weight", (d, inputs), inputs**-0.5)
                yield self._floats(f"{name}.bias", (d,), 0.1)
            for j in range(c.streams):
                for name in (f"norm1.{j}", f"norm2.{j}", f"short_conv.norms.{j}"):
                    yield self._floats(f"{name}.weight", (d,), 0.1, 1.0)
            yield self._floats("short_conv.conv.weight", (channels, 1, c.conv_taps), 0.5)
            return
        if self.table == "fp8":
            yield from self._table(rows)
            yield from self._projection(((c.streams + 1) * d, inputs))
        else:
            yield self._floats("embed.weight", (rows, c.width))
            yield self._floats("wkv.weight", ((c.streams + 1) * d, inputs), inputs**-0.5)
        yield self._floats("q_weight", (c.streams, d), 0.1, 1.0)
        yield self._floats("k_weight", (c.streams, d), 0.1, 1.0)

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _floats(
        self, name: str, shape: tuple[int, ...], deviation: float = 1.0, mean: float = 0.0
    ) -> StoredTensor:
        dtype = DType.F32 if self.table == "f32" else DType.BF16

        def chunks() -> Iterator[Array]:
            for band in self._bands(name, shape):
                values = band * np.float32(deviation) + np.float32(mean)
                yield values if dtype is DType.F32 else f32_to_bf16(values)

        return StoredTensor(name, dtype, shape, chunks)

    def _bands(self, name: str, shape: tuple[int, ...]) -> Iterator[F32Array]:
        rng = self._rng(name)
        for count in _counts(shape):
            yield rng.standard_normal((count, *shape[1:]), np.float32)

    def _table(self, rows: int) -> Iterator[StoredTensor]:
        """Codes of moderate size, with scales that bring a row to about 1."""
        width, groups = self.config.width, self.config.width // 32
        yield self._bytes("embed.weight", DType.F8E4M3, (rows, width), lambda r: r % 0x60 | r & 0x80)
        yield self._bytes("embed.scale", DType.F8E8M0, (rows, groups), lambda r: 119 + r % 6)

    def _bytes(
        self, name: str, dtype: DType, shape: tuple[int, int], make: Callable[[Array], Array]
    ) -> StoredTensor:
        def chunks() -> Iterator[Array]:
            rng = self._rng(name)
            for count in _counts(shape):
                yield make(rng.integers(0, 256, (count, shape[1]), np.uint8)).astype(np.uint8)

        return StoredTensor(name, dtype, shape, chunks)

    def _projection(self, shape: tuple[int, int]) -> Iterator[StoredTensor]:
        values = self._rng("wkv.weight").standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
        codes, scales = encode_fp8(values, TILE)
        yield StoredTensor("wkv.weight", DType.F8E4M3, codes.shape, lambda: iter([codes]))
        yield StoredTensor("wkv.scale", DType.F8E8M0, scales.shape, lambda: iter([scales]))


def _counts(shape: tuple[int, ...]) -> Iterator[int]:
    """Leading sizes of the bands in which a tensor is made."""
    step = max(_BAND // max(int(np.prod(shape[1:])), 1), 1)
    for start in range(0, shape[0], step):
        yield min(step, shape[0] - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("dsv4c.frontend.engram_generate", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="prod")
    parser.add_argument("--table", default="", help="fp8, bf16 or f32; the variant's own by default")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    config, layer = PRESETS[a.preset]
    table = a.table or _FORMATS[config.variant][0]
    try:
        generate_engram_layer(a.out, config, layer, seed=a.seed, table=table)
    except Dsv4cError as error:
        parser.exit(2, f"error: {error}\n")
    print(a.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
