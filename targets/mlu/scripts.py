"""What a user runs where Cambricon's SDK is installed: BANG C sources for a model, and their compilation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsv4c.errors import TargetError
from dsv4c.ir.graph import Module
from dsv4c.targets.base import Arch

from .bang.build import cncc_command, sources

Sizes = Mapping[str, int]


def device_files(module: Module, arch: Arch, tokens: int) -> tuple[dict[str, str], list[str]]:
    """The kernels that the model has a use for, with tiles for its sizes and `tokens` per call.

    Returns:
        Files by name (`build.sh` and the sources under `bang/`), and a line for each kernel that does not
        fit; its op runs from the ONNX model all the same.
    """
    files = {f"bang/{path.name}": path.read_text() for path in sources()}
    commands, left = [], []
    for name, output, sizes in _wanted(module, tokens):
        try:
            words = cncc_command(name, arch.attributes["bang"], sizes, output)
        except TargetError as error:
            left.append(str(error))
        else:
            commands.append(" ".join(words))
    return {"build.sh": build_script(arch, commands), **files}, left


def _wanted(module: Module, tokens: int) -> Iterator[tuple[str, str, Sizes]]:
    """(kernel, object file, sizes) for every distinct size that ops of the model have."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for op in module.ops:
        if op.name == "expert_mlp":
            d, inner = op.operands[4].type.shape[2], op.operands[5].type.shape[2]
            name, sizes = "grouped_experts", {"tokens": tokens, "d": d, "inner": inner}
        elif op.name == "attention":
            name, sizes = "sparse_attention", {"d": op.operands[0].type.shape[3]}
        else:
            continue
        fixed = {k: v for k, v in sizes.items() if isinstance(v, int)}
        key = name, tuple(fixed.values())
        if key not in seen:
            seen.add(key)
            yield name, "_".join([name, *map(str, fixed.values())]) + ".o", fixed


def build_script(arch: Arch, commands: list[str]) -> str:
    """`build.sh`: the `cncc` command of every kernel."""
    lines = "\n".join(commands) or 'echo "no kernel of this model fits the on-chip memory"'
    return f"""#!/bin/sh
# Compiles the BANG C kernels for {arch.attributes["product"]} where Cambricon's SDK is installed. The ONNX
# models beside it need none of them; a host program that calls them links with -lcnrt -lcndrv.
set -eu
cd "$(dirname "$0")/bang"
: "${{NEUWARE_HOME:?is not set: install the SDK and point it there}}"
command -v cncc >/dev/null 2>&1 || PATH="$NEUWARE_HOME/bin:$PATH"
if ! command -v cncc >/dev/null 2>&1; then
    echo "cncc is neither on the PATH nor in $NEUWARE_HOME/bin" >&2
    exit 1
fi
{lines}
"""
