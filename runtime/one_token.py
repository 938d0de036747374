"""Runs the second function of a program: fixed sizes, one token of one sequence, all of its memory given.

It calls the kernels of the general function in the same order, so results are the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .buffers import zeros
from .ffi import tvm_ffi


class OneToken:
    """A function with its inputs and its memory, made once.

    Args:
        facts: of the program, with "one" in it.
        machine: the loaded code.
    """

    def __init__(self, facts: Mapping[str, Any], machine: Any) -> None:
        one, dtypes = facts["one"], [i["dtype"] for i in facts["inputs"].values()]
        self._function = machine[one["function"]]
        self._memory = zeros((one["bytes"],), np.uint8)
        self._shapes = [tuple(shape) for shape in one["inputs"]]
        self._inputs = [zeros(shape, dtype) for shape, dtype in zip(self._shapes, dtypes, strict=True)]
        self._given = [tvm_ffi.from_dlpack(a) for a in self._inputs]
        self._views = [tvm_ffi.from_dlpack(self._view(*v)) for v in one["views"]]

    def _view(self, offset: int, dtype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        return self._memory[offset : offset + nbytes].view(dtype).reshape(shape)

    def fits(self, inputs: Sequence[npt.NDArray[Any]]) -> bool:
        return [a.shape for a in inputs] == self._shapes

    def run(self, inputs: Sequence[npt.NDArray[Any]], bound: Sequence[Any]) -> Any:
        """The results, still TVM's; their memory is overwritten by the next run.

        `bound` are the program's states, weights and tables, in order.
        """
        for own, given in zip(self._inputs, inputs, strict=True):
            own[...] = given
        return self._function(*self._given, *bound, *self._views)
