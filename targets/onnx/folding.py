"""Arithmetic on constants while a graph is built, so that sizes never become nodes where all are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Arr = npt.NDArray[Any]
LARGEST = 1 << 20
"""Elements of the largest constant that folding may make."""


def fold(kind: str, inputs: list[Arr | None], attrs: dict[str, object]) -> Arr | None:
    """The value of a node all of whose inputs are constants; None for a node that stays one."""
    rule = _RULES.get(kind)
    out = rule(inputs, attrs) if rule else None
    return out if out is None or out.size <= LARGEST else None


def _quotient(a: Arr, b: Arr) -> Arr:
    """ONNX rounds an integer quotient toward zero."""
    if a.dtype.kind == "f":
        return np.asarray(np.divide(a, b))
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)))


def _binary(function: Callable[[Arr, Arr], Any]) -> Callable[[list[Any], dict[str, object]], Arr]:
    return lambda inputs, _: np.asarray(function(inputs[0], inputs[1]))


def _squeezed(inputs: list[Any], _: dict[str, object]) -> Arr:
    return np.asarray(np.squeeze(inputs[0], tuple(inputs[1]) if len(inputs) > 1 else None))


def _reshaped(inputs: list[Any], _: dict[str, object]) -> Arr | None:
    return None if 0 in inputs[1] else np.reshape(inputs[0], inputs[1])


def _sliced(inputs: list[Any], _: dict[str, object]) -> Arr:
    data, starts, ends, axes = inputs[:4]
    index = [slice(None)] * data.ndim
    for start, end, axis in zip(starts, ends, axes, strict=True):
        index[axis] = slice(int(start), int(end))
    return np.asarray(data[tuple(index)])


_RULES: dict[str, Callable[[list[Any], dict[str, Any]], Arr | None]] = {
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _binary(_quotient),
    "Mod": _binary(np.mod),
    "Min": _binary(np.minimum),
    "Max": _binary(np.maximum),
    "Less": _binary(np.less),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Equal": _binary(np.equal),
    "And": _binary(np.logical_and),
    "Range": lambda x, _: np.arange(int(x[0]), int(x[1]), int(x[2]), dtype=np.int64),
    "Concat": lambda x, a: np.concatenate(x, axis=a["axis"]),
    "Unsqueeze": lambda x, _: np.asarray(np.expand_dims(x[0], tuple(int(i) for i in x[1]))),
    "Squeeze": _squeezed,
    "Reshape": _reshaped,
    "Expand": lambda x, _: np.broadcast_to(x[0], np.broadcast_shapes(x[0].shape, tuple(x[1]))).copy(),
    "Slice": _sliced,
    "Identity": lambda x, _: np.asarray(x[0]),
}
"""Only what lowerings do to sizes, positions within a call and masks that follow from them."""
