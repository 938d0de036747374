"""Holding passes to their word: the graph is evaluated before and after each one, on the same random inputs.

Knows what a pass promises (`Effect`) and how to compare results; no particular pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsv4c.errors import PassError
from dsv4c.ir.compare import Traced, difference, first_difference, real_rows
from dsv4c.ir.dtypes import Array
from dsv4c.ir.graph import Module, Op
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.sample import RandomStore, sample_inputs, sample_sizes
from dsv4c.ir.text import around
from dsv4c.ir.weights import TensorStore

from .base import Effect, Pass

CALLS = (9, 1, 4)
"""Tokens of the calls of one check: a chunk, a single token, and a chunk on top of the state they leave."""


@dataclass(frozen=True)
class _Results:
    """Everything one graph gave over all calls."""

    outputs: dict[tuple[str, int], Array]
    """By name and call."""
    trace: list[tuple[Op, Traced]]


class ResultCheck:
    """Evaluates a module in float64 around every pass; the `check` of `run_pipeline`.

    Weights are the module's own, or made up where the graph was read from text. Symbols stand for small
    numbers; two sequences of different length are fed in three calls, so that state matters.

    Args:
        sizes: symbol -> number, over `ir.sample.SIZES`; T is set by the calls.
        seed: of the inputs and of made-up weights.
    """

    def __init__(self, module: Module, sizes: Mapping[str, int] | None = None, seed: int = 0) -> None:
        self.sizes, self.seed = dict(sizes or {}), seed
        self.store: TensorStore = module.store or RandomStore(module, seed)
        self.vocabulary: tuple[int, ...] | None = None
        self.results: _Results | None = None

    def before(self, p: Pass, module: Module) -> None:
        """Called before `p` runs."""
        wanted = p.effect().vocabulary
        if self.results is None or wanted != self.vocabulary:
            self.vocabulary = wanted
            self.results = self._evaluate(module)

    def after(self, p: Pass, module: Module) -> dict[str, float]:
        """Called after `p` has run: the largest change of every output and state, relative to its range.

        States are compared after every call.

        Raises:
            PassError: one that must not change has changed, naming the first op that differs.
        """
        assert self.results is not None
        old, new = self.results, self._evaluate(module)
        self.results = new
        effect, changed = p.effect(), dict[str, float]()
        for (name, call), want in old.outputs.items():
            if (name, call) not in new.outputs:
                raise PassError(f"output {name!r} is gone", where=p.name, allowed="every output and state")
            size = difference(want, new.outputs[name, call])
            if effect.keeps(name) and not size <= effect.tolerance:
                raise _changed(p, effect, module, name, size, old, new)
            changed[name] = max(size, changed.get(name, 0.0))
        return changed

    def _evaluate(self, module: Module) -> _Results:
        rng = np.random.default_rng(self.seed)
        evaluator = Evaluator(module, module.store or self.store, np.float64, keep_weights=False)
        calls = CALLS if "T" in sample_sizes(module) else CALLS[:1]
        sizes = sample_sizes(module, {**self.sizes, "ctx": max(64, sum(calls))})
        state, out = evaluator.fresh_state(**sizes), _Results({}, [])
        for call, length in enumerate(calls):
            if "T" in sizes:
                sizes["T"] = length
            inputs = sample_inputs(module, sizes, rng, self.vocabulary)
            step = evaluator(inputs, state, trace=True)
            state, n_valid = step.state, inputs.get("n_valid")
            for name, array in {**step.outputs, **step.state}.items():
                kept = real_rows(array, n_valid, length) if name in step.outputs else array
                out.outputs[name, call] = kept
            for op, results in step.trace.items():
                rows = tuple(real_rows(a, n_valid, length) for a in results)
                out.trace.append((op, Traced(op.name, f"{op.loc} call {call}", rows)))
        return out


def _changed(
    p: Pass, effect: Effect, module: Module, name: str, size: float, old: _Results, new: _Results
) -> PassError:
    found = first_difference([t for _, t in old.trace], new.trace, effect.tolerance)
    producer = module.outputs[name].producer
    op, where = (found[0], "first at") if found else (producer, "made by")
    size = found[1] if found else size
    at = f"{where} {op.name} @{op.loc}" if op is not None else "an argument"
    return PassError(
        f"changes output {name!r} by {size:.3g} of its range, {at}",
        where=p.name,
        allowed=f"{effect.tolerance:.3g}, or an Effect that says what changes and how that is measured",
        hint="the graph around it:\n" + around(module, op) if op is not None else "",
    )
