"""Changing the formats in which weights are stored, class by class, and what that does to their values.

Which scheme rounds how is `ir.encode`; which conversions keep every value is `ir.recode`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dsv4c.errors import PassError, unknown
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType, F32Array
from dsv4c.ir.encode import bands
from dsv4c.ir.expr import OverlaidStore, TensorStore, WeightExpr
from dsv4c.ir.formats import SCHEMES, Scheme
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.levels import Level
from dsv4c.ir.packed import format_of, keeps_values, matrices, packed_form, requantised, stored_as
from dsv4c.ir.types import TensorType

from .base import EXACT, Effect, Pass
from .narrow_weights import PACKED_READERS
from .statistics import Statistics
from .weight_classes import weight_class

MEASURE = "error per weight class in the notes; loss on held-out text before and after"

Facts = dict[str, Any]

OPTION_OF = {
    "experts": "experts", "shared": "shared", "attention": "linears", "indexer": "linears",
    "engram": "linears", "compressor": "compressor", "embedding": "embedding", "head": "head",
}  # fmt: skip
"""Weight class -> the option that chooses its scheme; other classes (norms, router) are never touched."""

MOST_ROWS = 4096
"""Rows of a sampled matrix that are compared, so that an output head does not fill the memory."""

STATISTIC = "mean_square."
"""Prefix of entries of `Statistics.extra` that a search reads: mean square inputs [K] by weight location."""


@dataclass(frozen=True)
class Requantise(Pass):
    """Stores the matrices of each weight class in another scheme; the graph keeps f32 values.

    Only weights that nothing but matrix products and embeddings reads change, so norms, biases,
    hyper-connections and other vectors never do, nor does the router. Conversions that keep every value
    (`ir.recode.EXACT`) are made on codes, all others decode and encode anew. Weights stay lazy.

    Options:
        experts, shared, linears (attention, indexer, projections of Engram), compressor, embedding, head: a
            scheme of `ir.formats.SCHEMES`, or "" to leave the class as it is stored. "bf16", "fp16" and "f32"
            unpack.
        search: for schemes whose scales belong to one row, choose each scale by least squared error.
        stats: a file of calibration statistics; entries ``mean_square.<location of the weight>`` ([K])
            weigh the squared error of the columns; `*` may stand for an expert's number. Needs `search`.
        plain_only: leave alone what is stored as codes and scales already, whatever the class says.
        samples: matrices per class whose error is measured, evenly spaced; 0 measures nothing.

    Notes: `classes`, a list of {"class", "format_before", "format_after", "tensors" (matrices),
    "bytes_before", "bytes_after", "exact" (by construction), "sampled" (matrices), "max_abs" and "rel_rms"
    (of the change of values, of the first `MOST_ROWS` rows), "sqnr_db" (-20 log10 rel_rms)}; null where
    nothing was measured or, for `sqnr_db`, nothing changed.

    Raises:
        PassError: a scheme is unknown or needs an even number of columns, or statistics do not fit a weight.
    """

    name: ClassVar[str] = "requantise"
    doc: ClassVar[str] = "store the weights of each class in another number format"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})
    experts: str = "mxfp4"
    shared: str = "fp8"
    linears: str = "fp8"
    compressor: str = ""
    embedding: str = ""
    head: str = ""
    search: bool = False
    stats: str = ""
    plain_only: bool = False
    samples: int = 4

    def effect(self) -> Effect:
        chosen = any(getattr(self, option) for option in OPTION_OF.values())
        return Effect(changes=("*",), measure=MEASURE) if chosen else EXACT

    def run(self, module: Module) -> int:
        schemes = {kind: self._scheme(option) for kind, option in OPTION_OF.items()}
        if self.stats and not self.search:
            raise PassError("option stats without search", where=self.name, allowed="search = true")
        statistics = Statistics.load(self.stats) if self.stats else None
        rows: dict[str, list[_Change]] = defaultdict(list)
        changed = 0
        for op in module.weights():
            kind = weight_class(op)
            scheme = schemes.get(kind)
            if scheme is None or op.weight is None or not _is_matrix(op):
                continue
            if self.plain_only and packed_form(op.weight) is not None:
                continue
            _check_columns(op, op.weight, scheme)
            search = self.search and scheme.block[0] == 1
            importance = _importance(module, op, statistics) if search and statistics else None
            new = requantised(op.weight, scheme, search, importance)
            rows[kind] += [
                _Change(old, to, scheme, search, importance)
                for old, to in zip(matrices(op.weight), matrices(new), strict=True)
            ]
            changed += not new.same(op.weight)
            op.weight = new
            op.result.type = TensorType(new.dtype, op.result.type.shape)
        classes = [_summary(kind, found, self.samples, module.store) for kind, found in rows.items()]
        earlier = module.notes.get(self.name, {}).get("classes", [])
        module.notes[self.name] = {"classes": [*earlier, *classes]}
        return changed

    def _scheme(self, option: str) -> Scheme | None:
        name = getattr(self, option)
        if name and name not in SCHEMES:
            raise unknown(f"scheme for {option}", name, SCHEMES, PassError, self.name)
        return SCHEMES.get(name)


def _check_columns(op: Op, x: WeightExpr, scheme: Scheme) -> None:
    if x.shape[-1] % scheme.values_per_byte:
        raise PassError(
            f"{scheme.name} packs pairs of columns, {op.loc} has {x.shape[-1]}", where=Requantise.name,
            allowed="an even number of columns, or another scheme",
        )  # fmt: skip


def _is_matrix(op: Op) -> bool:
    """Whether nothing but matrix products and embeddings reads a weight."""
    readers = op.result.users()
    return bool(readers) and all(user.name in PACKED_READERS for user in readers)


def _importance(module: Module, op: Op, statistics: Statistics) -> WeightExpr | None:
    """What calibration says of the inputs of a weight, as an expression; puts the numbers into the store."""
    names = (STATISTIC + op.loc, STATISTIC + re.sub(r"\.experts\.\d+\.", ".experts.*.", op.loc))
    name = next((name for name in names if name in statistics.extra), "")
    found = statistics.extra.get(name)
    if found is None:
        return None
    assert op.weight is not None
    width = op.weight.shape[-1]
    numbers = np.asarray(found, np.float32)
    if numbers.shape != (width,) or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise PassError(
            f"{name} is {found.dtype}{list(found.shape)}", where="statistics",
            allowed=f"{width} finite numbers, none negative",
            hint="calibrate the model that is being compiled",
        )  # fmt: skip
    if module.store is None:
        what = "statistics need a module with weights"
        raise PassError(what, where=op.loc, hint="load it from a checkpoint")
    module.store = OverlaidStore(module.store, {name: numbers})
    return w.source(name, DType.F32, numbers.shape)


# ------------------------------------------------------------------------------------ the report


@dataclass(frozen=True, eq=False)
class _Change:
    """One matrix before and after."""

    old: WeightExpr
    new: WeightExpr
    scheme: Scheme
    search: bool
    importance: WeightExpr | None


@dataclass
class _Error:
    """Sums over compared values."""

    largest: float = 0.0
    noise: float = 0.0
    signal: float = 0.0

    def add(self, old: F32Array, new: F32Array) -> None:
        for band in bands(old.shape[0], old.shape[1], 1):
            was = old[band].astype(np.float64)
            change = new[band] - was
            self.largest = max(self.largest, float(np.abs(change).max(initial=0)))
            self.noise += float(np.square(change).sum())
            self.signal += float(np.square(was).sum())


def _summary(kind: str, changes: Sequence[_Change], samples: int, store: TensorStore | None) -> Facts:
    facts: Facts = {
        "class": kind,
        "format_before": "+".join(sorted({format_of(c.old) for c in changes})),
        "format_after": "+".join(sorted({format_of(c.new) for c in changes})),
        "tensors": len(changes),
        "bytes_before": sum(_nbytes(c.old) for c in changes),
        "bytes_after": sum(_nbytes(c.new) for c in changes),
        "exact": all(keeps_values(c.old, c.scheme) for c in changes),
        "sampled": 0, "max_abs": None, "rel_rms": None, "sqnr_db": None,
    }  # fmt: skip
    count = min(samples, len(changes)) if store is not None else 0
    if store is None or not count:
        return facts
    error = _Error()
    for at in range(count):
        change = changes[at * len(changes) // count]
        old = change.old
        if old.shape[0] > MOST_ROWS:
            old = w.rows(old, 0, MOST_ROWS)
        new = requantised(old, change.scheme, change.search, change.importance)
        error.add(w.values(old, store), w.values(new, store))  # type: ignore[arg-type]
    rms = math.sqrt(error.noise / error.signal) if error.signal else 0.0
    found = {"max_abs": error.largest, "rel_rms": rms, "sqnr_db": -20 * math.log10(rms) if rms else None}
    return {**facts, "sampled": count, **found}


def _nbytes(x: WeightExpr) -> int:
    held = packed_form(x)
    return held.nbytes if held else stored_as(x).nbytes
