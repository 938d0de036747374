"""The script beside the models of a target that ONNX Runtime itself executes, by a provider of its own."""

from __future__ import annotations


def provider_script(device: str, provider: str, package: str, needs: str) -> str:
    """`run.sh`: looks for the provider, then replays the golden vectors on the device.

    Args:
        device: what it runs on, in words.
        provider: the name that ONNX Runtime lists.
        package: the wheel that brings it; it takes the place of `onnxruntime` in an environment.
        needs: what must be there besides.
    """
    return f"""#!/bin/sh
# Runs the programs on {device}. Nothing is converted: the provider reads the
# models and the weights beside them. It needs dsv4c, the package {package}, which takes the place of
# onnxruntime in an environment, and {needs}.
set -eu
cd "$(dirname "$0")"
PYTHON="${{PYTHON:-python3}}"
if ! "$PYTHON" -c 'import onnxruntime as o, sys; sys.exit("{provider}" not in o.get_available_providers())'
then
    echo "$PYTHON has no ONNX Runtime with {provider}:" >&2
    echo "  $PYTHON -m pip uninstall onnxruntime; $PYTHON -m pip install {package}" >&2
    echo "and, for the device itself: {needs}" >&2
    exit 1
fi
"$PYTHON" -m dsv4c verify weights.dsv4 --on device
"""
