"""Optimisation passes over the IR, and the pipelines that run them."""

from .base import Pass
from .pipeline import PassRecord, parse_pipeline, print_pipeline, run_pipeline
from .table import PASSES

__all__ = ["PASSES", "Pass", "PassRecord", "parse_pipeline", "print_pipeline", "run_pipeline"]
