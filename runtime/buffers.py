"""Arrays that compiled code may read with aligned vector loads."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
"""Bytes; what compiled kernels assume of every buffer."""


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeroed and aligned. Pages are touched only when written, so unused capacity costs no memory."""
    size = prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    array = raw[start : start + size].view(dtype).reshape(shape)
    if size:
        return array
    # NumPy makes up strides of empty arrays; compiled code compares them with those of a compact one
    strides = [array.itemsize * prod(shape[i + 1 :]) for i in range(len(shape))]
    return np.lib.stride_tricks.as_strided(array, strides=strides)


def aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself when aligned, writable, contiguous and not empty, else a copy that is."""
    # NumPy may give empty arrays strides of zero, which compiled code refuses
    whole = array.size and array.flags.c_contiguous and array.flags.writeable
    if whole and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = zeros(array.shape, array.dtype)
    copy[...] = array
    return copy
