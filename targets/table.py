"""The one literal table of the project's own targets."""

from __future__ import annotations

from .ascend import ASCEND
from .base import Target
from .cpu import CPU
from .cuda import CUDA
from .mlu import MLU
from .rocm import ROCM

TARGETS: dict[str, Target] = {t.name: t for t in (CPU, CUDA, ROCM, ASCEND, MLU)}
