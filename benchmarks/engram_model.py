"""A model whose step costs what a small one's costs, with looked-up layers in it: dense blocks and Engram.

Made up, but shaped as DeepSeek-V4.1: the first lookup is needed after one block, the second in the middle,
and 48 rows of 264 bytes belong to every token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsv4c.frontend.engram import (
    EngramConfig,
    EngramWeights,
    Variant,
    begin_engram,
    end_engram,
    engram_block,
    token_inputs,
)
from dsv4c.frontend.engram_generate import generate_engram_layer
from dsv4c.frontend.engram_layer import layer_weights
from dsv4c.frontend.safetensors import TensorFiles
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import Array, DType, f32_to_bf16
from dsv4c.ir.graph import Builder, Module, Value
from dsv4c.ir.verify import verify
from dsv4c.ir.weights import WeightExpr

LINEARS = 6
"""Matrices per block."""


class Files:
    """Made-up matrices, and the tensors of one directory per Engram layer, as `layer/tensor`."""

    def __init__(self, directories: Mapping[int, Path], arrays: Mapping[str, Array]) -> None:
        self.files = {layer: TensorFiles.open(path) for layer, path in directories.items()}
        self.arrays = dict(arrays)

    def read(self, name: str) -> Array:
        if name in self.arrays:
            return self.arrays[name]
        layer, _, tensor = name.partition("/")
        return self.files[int(layer)].read(tensor)

    def source(self, name: str) -> WeightExpr | None:
        layer, _, tensor = name.partition("/")
        found = self.files[int(layer)].tensors.get(tensor)
        return None if found is None else w.source(name, found.dtype, found.shape)


def engram_config(
    vocab: int, table_bytes: int, layers: tuple[int, ...], hidden: int, streams: int
) -> EngramConfig:
    """DeepSeek-V4.1's hash over tables that take about `table_bytes` together, 264 bytes a row."""
    rows = max(table_bytes // (264 * 24 * len(layers)), 64)
    return EngramConfig(Variant.PROD, layers, (rows,) * 3, 8, 256, hidden, streams, vocab, 2, vocab)


def build_model(
    root: Path, vocab: int, table_bytes: int, *, blocks: int = 16, width: int = 1024, streams: int = 4,
    engram: tuple[int, ...] = (1, 6),
) -> Module:  # fmt: skip
    """Embedding, `blocks` blocks of dense layers, Engram in front of the blocks named; output `hidden`.

    Args:
        root: a directory for the tables, which stay on disk.
    """
    config = engram_config(vocab, table_bytes, engram, width, streams)
    directories = {i: _table(root / f"engram{i}", config, i) for i in engram}
    rng, arrays = np.random.default_rng(5), dict[str, Array]()
    module = Module("engram_benchmark", meta={"vocab_size": vocab})
    files = Files(directories, arrays)
    b = Builder(module)

    def matrix(name: str, rows: int, deviation: float) -> Value:
        numbers = rng.standard_normal((rows, width), np.float32) * np.float32(deviation)
        files.arrays[name] = f32_to_bf16(numbers)
        return b.weight(w.source(name, DType.BF16, numbers.shape), name)

    tokens, n_valid, pos = token_inputs(b)
    files.arrays["map"] = np.arange(vocab, dtype=np.int32)
    step = begin_engram(b, config, tokens, pos, n_valid, w.source("map", DType.I32, (vocab,)))
    x = b.op("embed", tokens, matrix("embed", vocab, 1.0))
    ones = files.arrays["ones"] = np.ones(width, np.float32)
    norm = b.weight(w.source("ones", DType.F32, ones.shape), "ones")
    for block in range(blocks):
        if block in engram:
            rows = b.op("repeat_streams", x, n=streams)
            weights = _weights(config, files, block)
            memory = engram_block(b, rows, step, weights, config, block)
            b.loc = f"layers.{block}"
            mean = b.weight(_average(files, width, streams), "average")
            x = b.op("grouped_linear", memory, mean, groups=1)
        b.loc = f"layers.{block}"
        for i in range(LINEARS):
            normal = b.op("rms_norm", x, norm, eps=1e-6)
            weight = matrix(f"layers.{block}.{i}", width, 0.3 * width**-0.5)
            x = b.op("add", x, b.op("linear", normal, weight))
    end_engram(b, step)
    module.outputs["hidden"] = x
    module.outputs["pos"] = b.op("advance", pos, n_valid)
    module.store = files
    verify(module)
    return module


def _weights(config: EngramConfig, files: Files, layer: int) -> EngramWeights:
    return layer_weights(config, files.source, f"{layer}/")


def _table(root: Path, config: EngramConfig, layer: int) -> Path:
    return root if (root / "config.json").exists() else generate_engram_layer(root, config, layer, seed=layer)


def _average(files: Files, width: int, streams: int) -> WeightExpr:
    """[width, streams * width]: the mean of the streams."""
    numbers = np.tile(np.eye(width, dtype=np.float32) / streams, (1, streams))
    files.arrays["average"] = f32_to_bf16(numbers)
    return w.source("average", DType.BF16, numbers.shape)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory on a disk, where O_DIRECT means something; /tmp is often memory."""
    here = Path(__file__).resolve().parents[1] / "build"
    here.mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="engram-", dir=here)
