"""What an ONNX artifact leaves to the host: n-gram ids and table rows of Engram layers, in NumPy.

Computes as the artifact's manifest says, ahead of every step; what it keeps between steps is state of the
session like any other, so saving, loading and forking sessions know nothing of it. Tables stay in the file:
only the rows that tokens ask for are read, through the map, and decoded. Engram specification, sections 2, 4
and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container import Artifact

Arr = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
DEAD = -1


class HostOps:
    """The host's part of the steps of one artifact.

    Raises:
        ArtifactError: it asks for what this runtime does not know.
    """

    def __init__(self, artifact: Artifact) -> None:
        facts = artifact.meta["onnx"].get("host", {"steps": [], "inputs": [], "states": {}})
        self._steps: list[dict[str, Any]] = facts["steps"]
        self._inputs: list[str] = facts["inputs"]
        self._states: dict[str, str] = facts["states"]
        for step in self._steps:
            if step["op"] not in _OPS:
                what = f"the host has no {step['op']}"
                raise ArtifactError(what, where=str(artifact.path), allowed=", ".join(_OPS))
        self._artifact = artifact

    def run(self, tokens: Arr, n_valid: Arr, state: dict[str, Arr]) -> tuple[dict[str, Arr], dict[str, Arr]]:
        """What programs are fed, and the host's states after the step; `state` stays as it is.

        Args:
            tokens: i32 [B,T]; n_valid: i32 [B].
        """
        values: dict[str, Any] = {"tokens": tokens, "n_valid": n_valid, **state}
        for step in self._steps:
            given = [self._value(name, values) for name in step["operands"]]
            values[step["result"]] = _OPS[step["op"]](step["attrs"], *given)
        fed = {name: values[name] for name in self._inputs}
        return fed, {name: values[result] for name, result in self._states.items()}

    def _value(self, name: str, values: dict[str, Any]) -> Any:
        if not name.startswith("@"):
            return values[name]
        return Stored(self._artifact.array(name[1:]), self._artifact.tensors[name[1:]].dtype)


class Stored:
    """A tensor of the artifact: its bytes, and what they mean."""

    def __init__(self, array: Arr, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def rows(self, index: Arr) -> Floats:
        """f32 [n,width]: the numbers of some rows.

        Raises:
            ArtifactError: no numbers are stored so.
        """
        found = self.array[index]
        match self.dtype:
            case "f32" | "f16":
                return found.astype(np.float32)
            case "bf16":
                return (found.astype(np.uint32) << 16).view(np.float32)
            case "f8e4m3":
                return _e4m3()[found]
            case "f8e8m0":
                return _e8m0()[found]
        raise ArtifactError(f"a table of {self.dtype}", allowed="f32, f16, bf16, f8e4m3, f8e8m0")


@cache
def _e4m3() -> Floats:
    """The number of every E4M3 byte: no infinities, and 0x7f and 0xff are NaN."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    size = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    size = np.where((byte & 127) == 127, np.nan, size)
    return np.where(byte < 128, size, -size).astype(np.float32)


@cache
def _e8m0() -> Floats:
    """The number of every E8M0 byte: 2^(byte - 127), and 0xff is NaN."""
    byte = np.arange(256)
    return np.where(byte == 255, np.nan, np.ldexp(1.0, byte - 127)).astype(np.float32)


def compress_tokens(attrs: dict[str, Any], tokens: Arr, map_: Stored) -> Arr:
    """i32 [B,T]: the class of every token; -1 where it has none."""
    table = map_.array
    known = (tokens >= 0) & (tokens < len(table)) & (tokens != attrs["dead_token"])
    found = np.where(known, table[np.where(known, tokens, 0)], DEAD)
    passes = (tokens < 0) & (not attrs["dead"])
    return np.where(passes, tokens, found).astype(np.int32)


def ngram_rows(attrs: dict[str, Any], ids: Arr, history: Arr, pos: Arr, n_valid: Arr) -> Arr:
    """i32 [B,T,columns]: the table rows of the n-grams that end at each token; -1 at padding.

    In int64: multipliers are chosen so that no product leaves it.
    """
    heads, dead = attrs["heads"], attrs["dead"]
    batch, count = ids.shape
    token = np.arange(count)
    here = pos.astype(np.int64)[:, None] + token
    known = np.concatenate([ids, history], axis=1).astype(np.int64)
    blocked = np.zeros((batch, count), np.bool_)
    mixed, columns = np.zeros((batch, count), np.int64), list[Arr]()
    for age, multiplier in enumerate(attrs["multipliers"]):
        at = here - age
        place = np.where(token >= age, token - age, count + at % history.shape[1])
        value = np.where(at < 0, attrs["pad"], np.take_along_axis(known, place, axis=1))
        blocked |= dead & (value < 0)
        mixed ^= np.where(blocked, attrs["pad"], value) * np.int64(multiplier)
        if age:
            for k in range((age - 1) * heads, age * heads):
                columns.append(mixed % attrs["primes"][k] + attrs["offsets"][k])
    real = token < n_valid[:, None]
    return np.where(real[..., None], np.stack(columns, axis=-1), -1).astype(np.int32)


def ngram_history(attrs: dict[str, Any], history: Arr, ids: Arr, pos: Arr, n_valid: Arr) -> Arr:
    """i32 [B,H]: the ids of the last H tokens, that of position p in slot p mod H."""
    out, slots = history.copy(), history.shape[1]
    for b, (start, count) in enumerate(zip(pos.tolist(), n_valid.tolist(), strict=True)):
        last = np.arange(max(0, count - slots), count)
        out[b, (start + last) % slots] = ids[b, last]
    return out


def engram_rows(attrs: dict[str, Any], rows: Arr, codes: Stored, scales: Stored | None = None) -> Floats:
    """f32 [B,T,columns*width]: the numbers of the rows side by side; zeros for row -1."""
    width = codes.array.shape[1]
    out = np.zeros((rows.size, width), np.float32)
    real = np.flatnonzero(rows.reshape(-1) >= 0)
    wanted = rows.reshape(-1)[real]
    found = codes.rows(wanted)
    if scales is not None:
        found = found * np.repeat(scales.rows(wanted), width // scales.array.shape[1], axis=1)
    out[real] = found
    return out.reshape(*rows.shape[:2], -1)


_OPS: dict[str, Callable[..., Arr]] = {
    "compress_tokens": compress_tokens, "ngram_rows": ngram_rows, "ngram_history": ngram_history,
    "engram_rows": engram_rows,
}  # fmt: skip
"""What a manifest may ask for: attributes, then operands, to the result."""
