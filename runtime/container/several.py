"""How one artifact holds code for several archs: the names of its sections, and the facts that archs share.

An artifact for one arch has its code in the section `code` and what is to be known of it in meta["tvm"]. One
for several has a section `code.ARCH` for each, over one copy of the weights, and in meta["tvm"]["archs"] what
an arch does not share with most others. Which arch a machine takes is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Facts = dict[str, Any]

_OWN = "archs"


def section_names(arch: str, machine: str, several: bool) -> tuple[str, str]:
    """The sections of an arch's code and of TVM's runtime for its machine."""
    return (f"code.{arch}", f"tvm_runtime.{machine}") if several else ("code", "tvm_runtime")


def share(each: Mapping[str, Facts]) -> Facts:
    """The facts of several archs as one tree: once what most of them have, and what others have instead.

    Args:
        each: arch name -> its facts; none is called "archs".
    """
    trees = list(each.values())
    common = {}
    for key in trees[0]:
        values = [tree[key] for tree in trees if key in tree]
        if len(values) == len(trees):
            common[key] = max(values, key=values.count)
    own = {
        name: {k: v for k, v in tree.items() if k not in common or common[k] != v}
        for name, tree in each.items()
    }
    return common | {_OWN: own}


def facts_of(shared: Facts, arch: str) -> Facts:
    """The facts of one arch out of what `share` made."""
    return {key: value for key, value in {**shared, **shared[_OWN][arch]}.items() if key != _OWN}
