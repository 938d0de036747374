"""The target table, and the parsing of `target[:arch]`."""

from __future__ import annotations

from dsv4c.errors import TargetError, unknown

from .ascend import ASCEND
from .base import Arch, Target
from .cpu import CPU
from .mlu import MLU

TARGETS: dict[str, Target] = {t.name: t for t in (CPU, ASCEND, MLU)}


def parse_target(text: str) -> tuple[Target, Arch]:
    """`cpu` or `cpu:x86-64-v4` -> the target and its arch.

    Raises:
        TargetError: either name is unknown; lists the known ones.
    """
    name, _, arch = text.partition(":")
    if name not in TARGETS:
        raise unknown("target", name, TARGETS, TargetError)
    return TARGETS[name], TARGETS[name].arch(arch)
