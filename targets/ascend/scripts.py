"""What a user runs where CANN is installed: the conversion of every program, and how to check it after."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4c.targets.base import Arch


def build_script(arch: Arch, programs: Sequence[str]) -> str:
    """`build.sh`: the `atc` command of every program of an artifact."""
    commands = "\n".join(
        f'atc --framework=5 --model=step.{name}.onnx --output=om/step.{name} --soc_version="$SOC" \\\n'
        "    --precision_mode_v2=origin --external_weight=1"
        for name in programs
    )
    return f"""#!/bin/sh
# Converts the programs for {arch.attributes["product"]} where CANN is installed; no NPU is needed for it, but
# the operator package of the SoC is (CANN 8.5 and later). Shapes stand in the models. `origin` keeps the
# types of the graph, where the converter would make FLOAT16 of all; weights stay in files beside the
# programs.
set -eu
cd "$(dirname "$0")"
SOC="${{SOC:-{arch.attributes["soc"]}}}"
if ! command -v atc >/dev/null 2>&1; then
    echo "atc is not on the PATH: source set_env.sh of your CANN installation first" >&2
    exit 1
fi
mkdir -p om
{commands}
echo "done; check on the device: dsv4c verify weights.dsv4 --on device --programs om"
"""
