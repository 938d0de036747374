"""Optimisation passes over the IR, and the pipelines that run them."""

from .base import EXACT, Effect, Pass
from .pipeline import PassRecord, parse_pipeline, print_pipeline, run_pipeline
from .table import PASSES

__all__ = [
    "EXACT", "PASSES", "Effect", "Pass", "PassRecord", "parse_pipeline", "print_pipeline", "run_pipeline",
]  # fmt: skip
