"""Optimisation passes over the IR, and the pipelines that run them."""

from .base import EXACT, Effect, Pass
from .pipeline import PassRecord, over_devices, parse_pipeline, print_pipeline, run_pipeline
from .plugins import known_passes
from .table import PASSES

__all__ = [
    "EXACT", "PASSES", "Effect", "Pass", "PassRecord", "known_passes", "over_devices",
    "parse_pipeline", "print_pipeline", "run_pipeline",
]  # fmt: skip
