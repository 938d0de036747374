"""Targets: for which machines, by which passes, and how code is emitted."""

from .base import Arch, Format, Target
from .plugins import known_devices, known_targets, parse_target
from .table import TARGETS

__all__ = ["TARGETS", "Arch", "Format", "Target", "known_devices", "known_targets", "parse_target"]
