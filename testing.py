"""For authors of passes: proof that a pass keeps the meaning of a graph, and graphs to try it on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module
from dsv4c.ir.text import parse_module, print_module
from dsv4c.ir.verify import verify
from dsv4c.passes import Pass, PassRecord, run_pipeline
from dsv4c.passes.check import ResultCheck


def assert_preserves(
    p: Pass,
    module: Module | str,
    *,
    after: Iterable[Pass] = (),
    sizes: Mapping[str, int] | None = None,
    seeds: Iterable[int] = (0, 1),
) -> PassRecord:
    """Run `p` over a copy of `module` and check all that a pass owes.

    The graph it leaves verifies, prints and reads back; evaluated in float64 on random inputs before and
    after, every output and state stays within the tolerance of `p.effect()`, but for those that the effect
    says are meant to change. Weights are the module's own, or made up where it was read from text.

    Args:
        module: a module, or its text.
        after: passes to run first, e.g. to reach the level that `p` takes.
        sizes: what symbols of the graph stand for, over small defaults.
        seeds: of inputs and made-up weights; one evaluation each.

    Returns:
        What the pass did, with the largest change of every output over the last seed.

    Raises:
        PassError: what the pass did wrong, with the op and the graph around it.
    """
    record: PassRecord | None = None
    for seed in seeds:
        copy = parse_module(module) if isinstance(module, str) else clone(module)
        verify(copy)
        run_pipeline(copy, tuple(after))
        (record,) = run_pipeline(copy, (p,), check=ResultCheck(copy, sizes, seed))
        text = print_module(copy)
        assert print_module(parse_module(text)) == text, f"{p.name}: what it leaves does not read back"
    assert record is not None, "no seed"
    return record


__all__ = ["assert_preserves"]
