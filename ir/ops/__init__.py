"""The op table: every declaration, by family. One literal merge; nothing registers on import."""

from dsv4c.ir.opdef import OpDef

from .attention import ATTENTION
from .core import CORE
from .engram import ENGRAM
from .engram_store import ENGRAM_STORE
from .fused import FUSED
from .hyper import HYPER
from .moe import MOE
from .rounding import ROUNDING
from .state import STATE
from .vision import VISION

_FAMILIES = (CORE, STATE, ATTENTION, HYPER, MOE, ROUNDING, ENGRAM, ENGRAM_STORE, VISION, FUSED)
OPS: dict[str, OpDef] = {d.name: d for family in _FAMILIES for d in family}

__all__ = ["OPS"]
