"""Calibration statistics: how often and how strongly text used each expert, as one .npz file.

Owns the file's form and the check that it belongs to a model. Knows neither how the numbers were counted nor
what a pass makes of them.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import PassError

FORMAT = "dsv4c-statistics"
VERSION = 1
_EXPERTS, _EXTRA, _META = "experts/", "extra/", "meta"
_ARRAYS = {"tokens": np.int64, "gate": np.float64, "saliency": np.float64}


@dataclass(frozen=True, eq=False)
class ExpertUsage:
    """What calibration saw of one layer's E routed experts; padding tokens are not counted.

    Attributes:
        tokens: int64 [E], tokens routed to each expert.
        gate: float64 [E], the sum over those tokens of the routing weight (what scales the expert's output).
        saliency: float64 [E], the sum over those tokens of routing weight times the Euclidean norm of the
            expert's unweighted output: the numerator of REAP (Lasby et al. 2025).

    Raises:
        PassError: the arrays are not three vectors of one length, or hold what no count can be.
    """

    tokens: npt.NDArray[np.int64]
    gate: npt.NDArray[np.float64]
    saliency: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            array = np.array(getattr(self, name))
            if array.ndim != 1 or len(array) != len(self.tokens) or array.dtype != dtype:
                raise PassError(
                    f"{name} is {array.dtype}{list(array.shape)}",
                    where="expert usage",
                    allowed=f"{np.dtype(dtype)}[{len(self.tokens)}], one number per expert",
                )
            if not np.isfinite(array).all() or (array < 0).any():
                raise PassError(f"{name} holds a number that is negative or not finite", where="expert usage")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def experts(self) -> int:
        return len(self.tokens)

    @property
    def mean_saliency(self) -> npt.NDArray[np.float64]:
        """float64 [E], REAP: the mean over an expert's tokens of weight times output norm; 0 if unrouted."""
        return np.asarray(self.saliency / np.maximum(self.tokens, 1), np.float64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertUsage) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in _ARRAYS
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Calibration statistics of one model over one text.

    Attributes:
        identity: the model they were counted on, as its artifact's identity or any other name of it.
        vocab_size: of that model.
        tokens_seen: tokens of calibration text.
        experts: layer -> usage; the layer by its graph location, e.g. ``layers.3.ffn``.
        extra: further arrays by name, such as counts of table rows; kept as they are.
    """

    identity: str
    vocab_size: int
    tokens_seen: int
    experts: Mapping[str, ExpertUsage]
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears whole or not at all.

        Raises:
            PassError: the file cannot be written, or an extra array is not of a plain number type.
        """
        meta = {
            "format": FORMAT, "version": VERSION, "identity": self.identity, "vocab_size": self.vocab_size,
            "tokens_seen": self.tokens_seen, "layers": list(self.experts),
        }  # fmt: skip
        arrays = {_META: np.frombuffer(json.dumps(meta).encode(), np.uint8)}
        for layer, usage in self.experts.items():
            arrays |= {f"{_EXPERTS}{layer}/{name}": getattr(usage, name) for name in _ARRAYS}
        for name, array in self.extra.items():
            if np.asarray(array).dtype.hasobject:
                raise PassError(f"{name} holds Python objects", where=str(path), allowed="arrays of numbers")
            arrays[_EXTRA + name] = np.asarray(array)
        target = Path(path)
        temporary = target.with_name(target.name + ".part")
        try:
            with temporary.open("wb") as out:
                np.savez_compressed(out, **arrays)  # type: ignore[arg-type]  # a stub takes no plain mapping
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PassError(f"cannot write statistics: {error}", where=str(target)) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            PassError: there is no such file, it is damaged, or it is not one of calibration statistics.
        """
        where, hint = str(path), "dsv4c calibrate writes this file"
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            meta = json.loads(arrays.pop(_META).tobytes())
            if meta["format"] != FORMAT or meta["version"] != VERSION:
                raise PassError(
                    f"is {meta['format']} version {meta['version']}",
                    where=where,
                    allowed=f"{FORMAT} version {VERSION}",
                )
            experts = {
                str(layer): ExpertUsage(*(arrays[f"{_EXPERTS}{layer}/{name}"] for name in _ARRAYS))
                for layer in meta["layers"]
            }
            identity, vocab, seen = str(meta["identity"]), int(meta["vocab_size"]), int(meta["tokens_seen"])
        except FileNotFoundError:
            raise PassError("no such file", where=where, hint=hint) from None
        except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, zipfile.BadZipFile):
            raise PassError(
                "is not a file of calibration statistics", where=where, allowed="an .npz with meta", hint=hint
            ) from None
        extra = {name.removeprefix(_EXTRA): a for name, a in arrays.items() if name.startswith(_EXTRA)}
        return cls(identity, vocab, seen, experts, extra)

    def usage(self, layer: str, experts: int) -> ExpertUsage:
        """The usage of a layer that has `experts` experts.

        Raises:
            PassError: the statistics lack the layer or count another number of experts.
        """
        if layer not in self.experts:
            raise PassError(
                f"the statistics (of {self.identity}) have nothing on {layer}",
                where="statistics",
                allowed=", ".join(self.experts) or "no layer",
                hint="calibrate the model that is being compiled",
            )
        usage = self.experts[layer]
        if usage.experts != experts:
            raise PassError(
                f"of another model: {usage.experts} experts in {layer} of {self.identity}, the module has "
                f"{experts}",
                where="statistics",
                hint="calibrate the model that is being compiled",
            )
        return usage
