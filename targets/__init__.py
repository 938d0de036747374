"""Targets: for which machines, by which passes, and how code is emitted."""

from .base import Arch, Format, Target
from .table import TARGETS, parse_target

__all__ = ["TARGETS", "Arch", "Format", "Target", "parse_target"]
