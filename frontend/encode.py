"""Quantises float matrices to the formats of published checkpoints: FP8 with tile scales, FP4 with row ones.

The inverse of the decode weight expressions. The arithmetic is that of `dsv4c.ir.encode`; what is owned here
is the rule of the published FP4 scales. Source: model specification, sections 2.1, 3.1 to 3.3.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsv4c.errors import CheckpointError
from dsv4c.ir.dtypes import Array, DType, F32Array, decode, pack
from dsv4c.ir.encode import Bytes, encode, pow2_ceil, spread, tile_max, to_e2m1
from dsv4c.ir.formats import SCHEMES
from dsv4c.ir.rows import FP4_GROUP

_FP4_FLOOR = np.float32(6 * 2.0**-126)
_INV_6 = np.array(0x3E2AAAAB, np.uint32).view(np.float32)  # 1/6 rounded to float32


def encode_fp8(
    values: Array, block: tuple[int, int] = (128, 128), scale_dtype: DType = DType.F8E8M0
) -> tuple[Array, Array]:
    """f32 [o, i] -> (E4M3 codes [o, i], one scale per tile); the last tiles may be ragged.

    Args:
        scale_dtype: F8E8M0 gives power-of-two scales as codes, F32 gives maximum / 448.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    name = "fp8" if scale_dtype is DType.F8E8M0 else "fp8_f32"
    made = encode(_finite(values), dataclasses.replace(SCHEMES[name], block=block))
    return made.codes, made.scales


def encode_fp4(values: Array) -> tuple[Bytes, Bytes]:
    """f32 [o, i] -> (packed E2M1 [o, i/2], E8M0 scale [o, ceil(i/32)]) by section 3.3: the scale is P(max/6).

    It never clamps, where the scale rule of the scheme `mxfp4` may.

    Raises:
        CheckpointError: a value is NaN or infinite, or the number of columns is odd.
    """
    x, tile = _finite(values), (1, FP4_GROUP)
    if x.shape[1] % 2:
        raise CheckpointError(
            f"a matrix of {x.shape[1]} columns cannot be packed FP4", allowed="an even number"
        )
    scale = pow2_ceil((np.maximum(tile_max(x, tile), _FP4_FLOOR) * _INV_6).astype(np.float32))
    per_value = spread(np.asarray(decode(scale, DType.F8E8M0), np.float32), tile, x.shape)
    return pack(to_e2m1(np.asarray(x / per_value, np.float32))), scale


def _finite(values: Array) -> F32Array:
    x = np.asarray(values, np.float32)
    if not np.isfinite(x).all():
        raise CheckpointError("a value to encode is NaN or infinite", allowed="finite numbers")
    return x
