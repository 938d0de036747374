"""Prefill in two halves: encoder layers over a whole prompt, all layers over its end (V4.1, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.levels import Level
from dsv4c.ir.types import i32

from .base import Pass
from .cleanup import EliminateDeadCode
from .instrument import INPUTS, PREFIX

START = "replay.start"
"""The state with the first position that decoder layers have seen, [B]; 0 when they have seen all."""


@dataclass(frozen=True)
class AllowReplay(Pass):
    """Cut the windows of decoder layers at a state that says from where on they were run; 0 cuts nothing.

    Decoder layers are those from `meta["encoder_layers"]` on: they own no compressed entries but those that
    the first of them makes of the encoder's output, so a session may leave them out for most of a prompt.

    Notes: under `allow_replay`, `layers`, the layers it cut.
    """

    name: ClassVar[str] = "allow_replay"
    doc: ClassVar[str] = "let prefill run the decoder layers over the end of a prompt only"
    takes: ClassVar[frozenset[Level]] = frozenset({Level.MODEL, Level.FUSED})

    def run(self, module: Module) -> int:
        cut = module.meta.get("encoder_layers")
        if not isinstance(cut, int) or START in module.states:
            return 0
        late = [op for op in module.ops if op.name == "attention" and _layer(op) >= cut]
        kept = {op.loc: why for op in late if (why := _unfit(op))}
        if kept or not late:
            module.notes[self.name] = {"layers": [], "kept": kept}
            return 0
        start = Builder(module).state(START, i32(late[0].operands[4].type.shape[0]))
        module.outputs[START] = start
        for op in late:
            op.operands.append(start)
            start.uses[op, len(op.operands) - 1] = None
        module.notes[self.name] = {"layers": [_layer(op) for op in late]}
        return len(late)


def _unfit(op: Op) -> str:
    if op.attrs["rounding"] != "none":
        return f"it rounds by {op.attrs['rounding']!r}"
    return "" if len(op.operands) == 8 else "it selects no entries"


def _layer(op: Op) -> int:
    match op.loc.split("."):
        case ["layers", layer, *_] if layer.isdigit():
            return int(layer)
    return -1


def encoder_part(module: Module) -> Module:
    """The encoder half of a module that `allow_replay` has changed, as a module over the same states.

    It feeds tokens to the encoder layers and appends to the entries and index keys of the first decoder
    layer; it gives no logits. Its states are those it changes.
    """
    cut = module.meta["encoder_layers"]
    assert isinstance(cut, int) and START in module.states
    part = clone(module)
    part.name, part.parts, part.notes = f"{module.name}_encoder", {}, {}
    keep = {name for name in part.states if _of_encoder(name, cut)}
    part.states = {name: v for name, v in part.states.items() if name in keep}
    part.outputs = {name: v for name, v in part.outputs.items() if name in keep}
    EliminateDeadCode().run(part)
    part.inputs = {name: v for name, v in part.inputs.items() if v.uses}
    return part


def _of_encoder(state: str, cut: int) -> bool:
    for counter in (PREFIX, INPUTS):  # of `instrument`, beside what it counts
        if state.startswith(counter):
            words = state.removeprefix(counter).split(".")
            return words[0] == "layers" and int(words[1]) < cut
    match state.split("."):
        case ["layers", layer, *rest]:
            return int(layer) < cut or (int(layer) == cut and rest != ["window"])
    return state != START
