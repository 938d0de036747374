"""The one literal table of the project's own targets."""

from __future__ import annotations

from .ascend import ASCEND
from .base import Target
from .cpu import CPU
from .mlu import MLU

TARGETS: dict[str, Target] = {t.name: t for t in (CPU, ASCEND, MLU)}
