"""The tensors of a random checkpoint: which there are, and how their bytes are made, band by band.

A value depends on the seed and the published name only. Knows no configuration file and no directory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import numpy as np

from dsv4c.ir.dtypes import Array, DType, F32Array, bf16_to_f32, f32_to_bf16

from .architecture import ModelConfig
from .encode import encode_fp4, encode_fp8
from .naming import saved_name, transformers_name
from .stored import Chunks, StoredTensor
from .table import ROW_GROUP, SCALED, Role, TensorSpec, expected_tensors, published_dtype, scale_name

FLOATS = {"bf16": DType.BF16, "f16": DType.F16, "f32": DType.F32}

_VALUES: tuple[tuple[str, float, float], ...] = (
    ("*norm.weight", 1.0, 0.1),
    ("*.norm?.weight", 1.0, 0.1),
    ("*.engram.?_weight", 1.0, 0.1),
    ("*attn_sink", 0.0, 0.5),
    ("*.ape", 0.0, 0.5),
    ("*_base", 0.0, 0.5),
    ("*_scale", 1.0, 0.1),
    ("*gate.bias", 0.0, 0.1),
    ("*gate.bias_vl", 0.0, 0.1),
    ("vision.*.bias", 0.0, 0.1),
    ("aligner.*.bias", 0.0, 0.1),
    ("image_*", 0.0, 1.0),
    ("embed.weight", 0.0, 1.0),
    ("*.embed.weight", 0.0, 1.0),
)
"""Pattern of the published name -> mean and standard deviation; every other tensor is a matrix with mean 0
and deviation 1/sqrt(columns), so that sizes do not change how lively the logits are."""

_BAND = 1 << 22  # numbers generated at a time


@dataclass(frozen=True)
class TensorPlan:
    """Which tensors a checkpoint gets, and how their bytes are made."""

    config: ModelConfig
    seed: int
    style: str
    dtype: str
    scale_dtype: DType

    def tensors(self) -> Iterator[StoredTensor]:
        stacked = self.style == "transformers" and self.dtype != "published"
        for name, spec in expected_tensors(self.config).items():
            if stacked and spec.role is Role.EXPERT:
                if ".experts.0.w1" in name:
                    yield from self._stacks(name.removesuffix("0.w1.weight"))
                continue
            dtype = self._dtype(name, spec)
            shape = spec.stored_shape(dtype)
            if dtype not in SCALED:
                yield StoredTensor(self._spelt(name), dtype, shape, self._floats(name, spec, dtype))
                continue
            codes, scales = self._quantised(name, spec, dtype)
            yield StoredTensor(self._spelt(name), dtype, shape, codes)
            kind = self._scale_dtype(spec, dtype)
            shape = spec.scale_shape(dtype, self.config.weight_block_size)
            yield StoredTensor(self._spelt(scale_name(name)), kind, shape, scales)

    def _stacks(self, prefix: str) -> Iterator[StoredTensor]:
        """`gate_up_proj` [E, 2I, d] and `down_proj` [E, d, I] of one layer."""
        c, dtype = self.config, FLOATS[self.dtype]
        module = self._spelt(f"{prefix}0.w1.weight").removesuffix("0.gate_proj.weight")
        inner, d = c.moe_intermediate_size, c.hidden_size
        for stack, names, shape in (
            ("gate_up_proj", ("w1", "w3"), (inner, d)),
            ("down_proj", ("w2",), (d, inner)),
        ):
            spec = TensorSpec(shape, Role.EXPERT)
            parts = [
                self._floats(f"{prefix}{e}.{name}.weight", spec, dtype)
                for e in range(c.n_routed_experts) for name in names
            ]  # fmt: skip
            whole = (c.n_routed_experts, len(names) * shape[0], shape[1])
            yield StoredTensor(f"{module}{stack}", dtype, whole, _joined(parts))

    def _spelt(self, name: str) -> str:
        match self.style:
            case "transformers":
                return transformers_name(name)
            case "saved":
                return saved_name(name)
            case _:
                return name

    def _dtype(self, name: str, spec: TensorSpec) -> DType:
        if self.dtype == "published" or spec.role is Role.TABLE:
            return published_dtype(name, spec, self.config)
        return FLOATS[self.dtype]

    def _scale_dtype(self, spec: TensorSpec, dtype: DType) -> DType:
        """Packed FP4 and Engram rows have E8M0 whatever was asked for."""
        fixed = dtype is DType.F4E2M1X2 or spec.role is Role.ROWS
        return DType.F8E8M0 if fixed else self.scale_dtype

    def _floats(self, name: str, spec: TensorSpec, dtype: DType) -> Chunks:
        def chunks() -> Iterator[Array]:
            for band in bands(name, spec, self.config, self.seed):
                yield f32_to_bf16(band) if dtype is DType.BF16 else band.astype(dtype.storage)

        return chunks

    def _quantised(self, name: str, spec: TensorSpec, dtype: DType) -> tuple[Chunks, Chunks]:
        """Bands of the codes, and of the scales; the scales are there once the codes have been made."""
        made: list[Array] = []
        block = (1, ROW_GROUP) if spec.role is Role.ROWS else self.config.weight_block_size
        kind = self._scale_dtype(spec, dtype)

        def codes() -> Iterator[Array]:
            for band in bands(name, spec, self.config, self.seed, block[0]):
                fp4 = dtype is DType.F4E2M1X2
                code, scale = encode_fp4(band) if fp4 else encode_fp8(band, block, kind)
                made.append(scale)
                yield code

        def scales() -> Iterator[Array]:
            while made:
                yield made.pop(0)

        return codes, scales


def emptied(t: StoredTensor) -> StoredTensor:
    """`t` with zeros for its numbers, as a hole; expert ids and F32 scales of codes cannot be zero."""
    if not t.dtype.is_float:
        return t
    of_codes = len(t.shape) == 2 and t.name.endswith((".scale", "_scale_inv"))  # others are vectors
    scale = of_codes and t.dtype is DType.F32
    return replace(t, chunks=(lambda: iter([np.ones(t.shape, np.float32)])) if scale else None)


def _joined(parts: list[Chunks]) -> Chunks:
    return lambda: (chunk for part in parts for chunk in part())


def bands(name: str, spec: TensorSpec, config: ModelConfig, seed: int, multiple: int = 1) -> Iterator[Array]:
    """The logical values of a tensor, some whole rows at a time (a multiple of `multiple` but for the last).

    float32, exact in BF16 and in F16; int64 for a table of expert ids, distinct in every row.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    columns = config.n_routed_experts if spec.role is Role.TABLE else prod(spec.shape[1:])
    step = max(_BAND // columns // multiple, 1) * multiple
    for start in range(0, spec.shape[0], step):
        count = min(step, spec.shape[0] - start)
        if spec.role is Role.TABLE:
            yield rng.random((count, columns)).argsort(axis=1)[:, : spec.shape[1]]
            continue
        mean, deviation = _moments(name, spec)
        yield _representable(rng.standard_normal((count, *spec.shape[1:]), np.float32) * deviation + mean)


def _moments(name: str, spec: TensorSpec) -> tuple[np.float32, np.float32]:
    for pattern, mean, deviation in _VALUES:
        if fnmatchcase(name, pattern):
            return np.float32(mean), np.float32(deviation)
    return np.float32(0), np.float32(spec.shape[-1] ** -0.5)


def _representable(values: F32Array) -> F32Array:
    """Rounded to BF16 and then to F16: the result is exact in both, also where F16 is subnormal."""
    return bf16_to_f32(f32_to_bf16(values)).astype(np.float16).astype(np.float32)
