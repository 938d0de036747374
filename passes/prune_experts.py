"""Which experts a model can do without: the choice, and what is reported of it.

How a layer loses its experts is `moe_layers`, what calibration counted is `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dsv4c.errors import PassError, unknown
from dsv4c.ir import weights as w
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level

from .base import Effect, Pass
from .cleanup import EliminateDeadCode
from .moe_layers import MoeLayer, find_layers, keep_experts
from .statistics import ExpertUsage, Statistics

_OPTIONS: dict[str, frozenset[str]] = {
    "unreachable": frozenset({"vocabulary"}),
    "unused": frozenset({"stats"}),
    "saliency": frozenset({"keep", "scope", "stats"}),
    "frequency": frozenset({"keep", "scope", "stats"}),
    "random": frozenset({"keep", "scope", "seed"}),
}
"""Strength -> the options it reads."""

MEASURE = "loss on held-out text before and after, as benchmarks/pruning.py does it"

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PruneExperts(Pass):
    """Removes routed experts from every layer whose router is recognised; the others are noted as skipped.

    Options:
        strength: which experts go.
            `unreachable`: those no token can choose, by proof: the bias is -inf (where images have one of
            their own, both are), or no token of the vocabulary names them in its hash table. Results do not
            change (for that vocabulary).
            `unused`: those no token of the calibration text chose.
            `saliency`: those with the least mean of routing weight times output norm (REAP); unrouted is 0.
            `frequency`: those that the fewest tokens chose.
            `random`: any, by `seed`; the baseline.
            The last three first drop experts that no token can choose.
        keep: the fraction that stays, rounded up to whole experts; for the last three.
        scope: "layer" applies `keep` to each layer. "global" applies it to all layers together: the scores of
            a layer are divided by their mean (norms grow with depth, and layers may differ in size), each
            layer keeps at least as many experts as a token chooses, the rest are kept by score.
        stats: the file of calibration statistics.
        seed: of `random`.
        vocabulary: a file of token ids, apart by white space; for `unreachable`. Empty is every token.
        layers: which layers, as a file name pattern of their locations, e.g. ``layers.[2-4].ffn``.

    Equal scores keep the lower id. In a hash layer the tokens of a dropped expert go to the nearest kept one,
    by the cosine of their router rows. Notes: see `_note`.

    Raises:
        PassError: an option that does not fit, statistics of another model, or fewer experts left than a
            token chooses.
    """

    name: ClassVar[str] = "prune_experts"
    doc: ClassVar[str] = "remove routed experts that nothing reaches, or that matter least"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL})
    strength: str = "unreachable"
    keep: float = 1.0
    scope: str = "layer"
    stats: str = ""
    seed: int = 0
    vocabulary: str = ""
    layers: str = "*"

    def effect(self) -> Effect:
        if self.strength != "unreachable":
            return Effect(changes=("*",), measure=MEASURE)
        return Effect(vocabulary=read_vocabulary(self.vocabulary)) if self.vocabulary else Effect()

    def run(self, module: Module) -> int:
        self._check_options()
        layers, refused = self._layers(module)
        statistics = Statistics.load(self.stats) if self.stats else None
        earlier = module.notes.get(self.name)
        reach = [self._reachable(module, layer) for layer in layers]
        scores = []
        for index, (layer, reachable) in enumerate(zip(layers, reach, strict=True)):
            usage = _usage(statistics, layer, earlier) if statistics else None
            scores.append(np.where(reachable, self._scores(index, layer, usage), -1.0))
        kept = self._kept(layers, scores)
        before = {layer.loc: layer.nbytes for layer in layers}
        changed = 0
        for layer, ids in zip(layers, kept, strict=True):
            _check_choice(module, layer, ids)
            if len(ids) < layer.count:
                keep_experts(module, layer, ids, module.store)
                changed += 1
        EliminateDeadCode().run(module)
        left, unknown_layers = find_layers(module)
        after = {layer.loc: layer.nbytes for layer in left}
        module.notes[self.name] = {
            "strength": self.strength, "options": str(self), "of": statistics.identity if statistics else "",
            "layers": [
                _note(layer, ids, score, before[layer.loc], after[layer.loc])
                for layer, ids, score in zip(layers, kept, scores, strict=True)
            ],
            "skipped": [{"layer": loc, "reason": reason} for loc, reason in refused.items()],
        }  # fmt: skip
        if earlier:
            module.notes[self.name]["earlier"] = earlier
        if left and not unknown_layers and "experts" in module.meta:
            module.meta["experts"] = max(layer.count for layer in left)
        return changed

    # ------------------------------------------------------------------------------ options

    def _check_options(self) -> None:
        if self.strength not in _OPTIONS:
            raise unknown("strength", self.strength, _OPTIONS, PassError, self.name)
        if self.scope not in ("layer", "global"):
            raise unknown("scope", self.scope, ("layer", "global"), PassError, self.name)
        if not 0 < self.keep <= 1:
            raise self._bad("keep", "more than 0, at most 1: the fraction of experts that stays")
        read = _OPTIONS[self.strength]
        for option in ("keep", "scope", "stats", "seed", "vocabulary"):
            if getattr(self, option) != getattr(type(self), option) and option not in read:
                allowed = ", ".join(sorted(read))
                raise self._bad(option, f"{allowed} with strength {self.strength!r}, which does not read it")
        if "stats" in read and not self.stats:
            raise self._bad("stats", "a file of calibration statistics", "dsv4c calibrate writes one")

    def _bad(self, option: str, allowed: str, hint: str = "") -> PassError:
        what = f"option {option} = {getattr(self, option)!r}"
        return PassError(what, where=self.name, allowed=allowed, hint=hint)

    # ------------------------------------------------------------------------------- choice

    def _layers(self, module: Module) -> tuple[list[MoeLayer], dict[str, str]]:
        """The layers to prune, and the others with why not."""
        found, refused = find_layers(module)
        named = [layer for layer in found if fnmatchcase(layer.loc, self.layers)]
        if found and not named:
            raise self._bad("layers", "a pattern of " + ", ".join(layer.loc for layer in found))
        others = {layer.loc: "not named by the option layers" for layer in found if layer not in named}
        return named, refused | others

    def _reachable(self, module: Module, layer: MoeLayer) -> npt.NDArray[np.bool_]:
        """[E]: whether some token may choose the expert; True where the bytes that would tell are missing."""
        if module.store is None:
            if self.strength != "unreachable":
                return np.ones(layer.count, np.bool_)
            raise PassError(
                "which experts are reachable depends on biases and tables, and the module has no weights",
                where=layer.loc,
                hint="load it from a checkpoint",
            )
        if not layer.hashed:
            found = np.zeros(layer.count, np.bool_)
            for bias in layer.biases:
                finite = np.isfinite(w.values(bias, module.store))
                found |= finite if finite.sum() >= layer.chosen else True
            return found
        selector = w.values(layer.table, module.store)
        if self.vocabulary:
            tokens = np.array(read_vocabulary(self.vocabulary))
            if len(beyond := tokens[(tokens < 0) | (tokens >= len(selector))]):
                allowed = f"0 to {len(selector) - 1}, the tokens of the model"
                raise PassError(f"token id {beyond[0]}", where=self.vocabulary, allowed=allowed)
            selector = selector[tokens]
        return np.isin(np.arange(layer.count), selector)

    def _scores(self, index: int, layer: MoeLayer, usage: ExpertUsage | None) -> Scores:
        """[E], at least 0; an expert with a higher score stays longer."""
        match self.strength:
            case "saliency" if usage:
                return usage.mean_saliency
            case "unused" | "frequency" if usage:
                return usage.tokens.astype(np.float64)
            case "random":
                return np.random.default_rng([self.seed, index]).random(layer.count)
            case _:
                return np.ones(layer.count)

    def _kept(self, layers: Sequence[MoeLayer], scores: Sequence[Scores]) -> list[list[int]]:
        """Per layer the experts that stay, ascending."""
        if self.strength in ("unreachable", "unused"):
            least = 0.0 if self.strength == "unreachable" else 1.0
            kept = [np.flatnonzero(s >= least).tolist() for s in scores]
        elif self.scope == "layer":
            kept = [best(s, _rounded_up(self.keep * len(s))) for s in scores]
        else:
            kept = best_together(scores, [layer.chosen for layer in layers], self.keep)
        for layer, ids in zip(layers, kept, strict=True):
            if len(ids) < layer.chosen:
                raise PassError(
                    f"{len(ids) or 'no'} of {layer.count} experts would remain in {layer.loc}",
                    where=self.name,
                    allowed=f"at least {layer.chosen}, which every token chooses",
                    hint="keep more, or calibrate on a text that is not empty",
                )
        return kept


def _check_choice(module: Module, layer: MoeLayer, kept: list[int]) -> None:
    """Text and images each need enough of the kept experts that their own bias does not rule out."""
    for bias in layer.biases if module.store is not None else ():
        assert module.store is not None
        finite = np.isfinite(w.values(bias, module.store))
        if finite.sum() >= layer.chosen > finite[kept].sum():
            what = f"{finite[kept].sum()} experts of {layer.loc} would remain that a bias does not rule out"
            raise PassError(
                what, where=PruneExperts.name, allowed=f"at least {layer.chosen}, which every token chooses",
                hint="keep more",
            )  # fmt: skip


def _rounded_up(count: float) -> int:
    return math.ceil(round(count, 9))  # 0.7 * 10 is a little more than 7


def best(scores: Scores, count: int) -> list[int]:
    """The `count` ids with the highest scores, ascending; equal scores keep the lower id."""
    order: list[int] = np.argsort(-scores, kind="stable")[:count].tolist()
    return sorted(order)


def best_together(scores: Sequence[Scores], at_least: Sequence[int], keep: float) -> list[list[int]]:
    """The best of all layers by score over the mean score of its layer, `at_least` of each layer first.

    Raises:
        PassError: `keep` of all experts are fewer than the layers need.
    """
    total, needed = _rounded_up(keep * sum(map(len, scores))), sum(at_least)
    if total < needed:
        raise PassError(
            f"{total} of {sum(map(len, scores))} experts would remain in all layers together",
            where=PruneExperts.name,
            allowed=f"at least {needed}, so that every token can choose",
        )
    kept = [set(best(s, n)) for s, n in zip(scores, at_least, strict=True)]
    ranked = []
    for layer, s in enumerate(scores):
        mean = float(np.maximum(s, 0).mean()) or 1.0
        ranked += [(-score / mean, layer, expert) for expert, score in enumerate(s.tolist())]
    for _, layer, expert in sorted(ranked):
        if total > sum(map(len, kept)):
            kept[layer].add(expert)
    return [sorted(ids) for ids in kept]


def read_vocabulary(path: str) -> tuple[int, ...]:
    """The token ids of a text file, ascending, each once.

    Raises:
        PassError: the file cannot be read, holds something else than whole numbers, or nothing.
    """
    try:
        ids = sorted({int(word) for word in Path(path).read_text(encoding="utf-8").split()})
    except (OSError, UnicodeDecodeError) as error:
        raise PassError(f"cannot be read: {error}", where=path) from None
    except ValueError as error:
        raise PassError(str(error), where=path, allowed="token ids apart by white space") from None
    if not ids:
        raise PassError("holds no token id", where=path, allowed="token ids apart by white space")
    return tuple(ids)


def _usage(statistics: Statistics, layer: MoeLayer, earlier: dict[str, Any] | None) -> ExpertUsage:
    """Of the layer's experts; statistics of the model before an earlier pruning are cut to what it left."""
    found = statistics.experts.get(layer.loc)
    chain: list[dict[str, Any]] = []
    while earlier:
        chain += [one for one in earlier["layers"] if one["layer"] == layer.loc]
        earlier = earlier.get("earlier")
    if found is not None and chain and found.experts == chain[-1]["experts_before"] != layer.count:
        for one in reversed(chain):
            at = np.array(one["kept"])
            found = ExpertUsage(found.tokens[at], found.gate[at], found.saliency[at])
        if found.experts == layer.count:
            return found
    return statistics.usage(layer.loc, layer.count)


def _note(layer: MoeLayer, kept: list[int], scores: Scores, before: int, after: int) -> dict[str, Any]:
    """What the report says of a layer.

    `kept` and `dropped` are ids before the pass, the new id of one kept is its place in the list. `scores`
    are those of the strength, -1 for an expert that no token can choose. Bytes are those of the layer's
    router and routed experts in the checkpoint.
    """
    return {
        "layer": layer.loc, "experts_before": layer.count, "kept": kept,
        "dropped": sorted(set(range(layer.count)) - set(kept)), "bytes_before": before, "bytes_after": after,
        "scores": [round(s, 6) for s in scores.tolist()],
    }  # fmt: skip
