"""Looks through the values of a checkpoint for those that cannot be: scales, small parameters, expert ids.

Takes tensors that fit the configuration already. Knows no directory and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.ir.dtypes import DType, decode

from .architecture import ModelConfig
from .naming import Origin
from .safetensors import TensorFiles
from .table import SCALED, Role, TensorSpec, scale_name

_BAND = 1 << 22  # bytes of a scale that are looked at together; those of Engram tables are gigabytes


def bad_values(
    config: ModelConfig, files: TensorFiles, specs: Mapping[str, TensorSpec], origins: Mapping[str, Origin]
) -> Iterator[str]:
    """One sentence per stored tensor with a scale, parameter or expert id that cannot be."""
    seen = set()
    for name, spec in specs.items():
        for stored, what in _checked(config, files, name, spec, origins):
            if stored not in seen and (problem := what()):
                yield f"{stored} {problem}"
            seen.add(stored)


def _checked(
    config: ModelConfig, files: TensorFiles, name: str, spec: TensorSpec, origins: Mapping[str, Origin]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """(stored name, its check) of a tensor and of its scale; one stored tensor may come several times."""
    stored = origins[name].name
    if files.tensors[stored].dtype in SCALED:
        scale = origins[scale_name(name)].name
        yield scale, lambda: _bad_scale(files, scale)
    if _is_small(spec, config):
        yield stored, lambda: _bad_small(config, files, name, stored)
    if spec.role is Role.TABLE:
        yield stored, lambda: _bad_table(files.read(stored), config.n_routed_experts)


def _is_small(spec: TensorSpec, config: ModelConfig) -> bool:
    """Whether it is read whole: vectors, one vector per stream, and everything of hyper-connections."""
    few = len(spec.shape) == 1 or spec.shape[0] <= config.hc_mult
    return spec.role is Role.PRECISE or (spec.role is Role.PLAIN and few)


def _bad_small(config: ModelConfig, files: TensorFiles, name: str, stored: str) -> str:
    values = decode(files.read(stored), files.tensors[stored].dtype)
    if name.endswith((".gate.bias", ".gate.bias_vl")):
        drafts = config.drafter if name.startswith("mtp.") else None
        return _bad_bias(values, drafts.experts_per_token if drafts else config.experts_per_token)
    return "" if np.isfinite(values).all() else "has a value that is NaN or infinite"


def _bad_bias(values: npt.NDArray[Any], needed: int) -> str:
    """A selection bias may be -inf, which takes an expert out of the choice, while enough others remain."""
    finite = int(np.isfinite(values).sum())
    if np.isnan(values).any() or (values == np.inf).any():
        return "has a value that is NaN or infinite (allowed: finite numbers, and -inf for no choice)"
    what = f"lets tokens choose among {finite} experts, -inf takes out the others"
    return "" if finite >= needed else f"{what} (allowed: at least {needed})"


def _bad_scale(files: TensorFiles, stored: str) -> str:
    codes = files.tensors[stored].dtype is DType.F8E8M0
    for band in _bands(files.read(stored)):
        if codes and band.max() == 255:
            return "has a scale code 255, which is NaN (allowed: 0 to 254)"
        if not codes and not (np.isfinite(band).all() and (band > 0).all()):
            return "has a scale that is not finite and positive"
    return ""


def _bands(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    flat = array.reshape(-1)
    step = _BAND // flat.itemsize
    return (flat[i : i + step] for i in range(0, flat.size, step))


def _bad_table(ids: npt.NDArray[Any], experts: int) -> str:
    bad = np.argwhere((ids < 0) | (ids >= experts))
    if len(bad):
        token, slot = bad[0]
        return f"sends token {token} to expert {ids[token, slot]} (allowed: 0 to {experts - 1})"
    ordered = np.sort(ids, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    return f"sends token {twice[0]} to one expert twice (allowed: distinct experts)" if len(twice) else ""
