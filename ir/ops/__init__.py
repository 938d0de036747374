"""The op table: every declaration, by family. One literal merge; nothing registers on import."""

from dsv4c.ir.opdef import OpDef

from .attention import ATTENTION
from .core import CORE
from .hyper import HYPER
from .moe import MOE
from .state import STATE

OPS: dict[str, OpDef] = {d.name: d for family in (CORE, STATE, ATTENTION, HYPER, MOE) for d in family}

__all__ = ["OPS"]
