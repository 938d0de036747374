"""From an opened checkpoint to its graph: which generation's builder, and what it is fed."""

from __future__ import annotations

from dsv4c.ir.graph import Module

from .architecture import Generation
from .checkpoint import Checkpoint
from .model import build_model
from .model_v41 import EngramParts, build_model_v41
from .vision import build_vision


def build_checkpoint(checkpoint: Checkpoint) -> Module:
    """The model of a checkpoint at level MODEL, with the store of its weights.

    Raises:
        ConfigError, CheckpointError: the token map of its Engram layers is missing or of another tokenizer.
    """
    config = checkpoint.config
    match config.generation:
        case Generation.V4:
            module = build_model(config, checkpoint.weight)
        case Generation.V41:
            parts = None
            if config.engram is not None:
                parts = EngramParts(checkpoint.engram, checkpoint.engram_weights, checkpoint.token_map_weight)
            module = build_model_v41(config, checkpoint.weight, parts)
            if config.vision is not None:
                module.parts["vision"] = build_vision(config, checkpoint.weight)
    for one in (module, *module.parts.values()):
        one.store = checkpoint.store
    return module
