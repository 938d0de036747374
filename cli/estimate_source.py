"""The half of `dsv4c estimate` that needs the front end: a module from a checkpoint or from a config alone.

No weight is read: an estimate asks only for their shapes and formats.
"""

from __future__ import annotations

from pathlib import Path

from dsv4c.errors import ConfigError, UsageError
from dsv4c.frontend.architecture import Generation, ModelConfig
from dsv4c.frontend.build import build_checkpoint
from dsv4c.frontend.checkpoint import open_checkpoint
from dsv4c.frontend.config import load_config, parse_config
from dsv4c.frontend.engram import EngramWeights, engram_config
from dsv4c.frontend.engram_layer import layer_weights
from dsv4c.frontend.model import build_model
from dsv4c.frontend.model_v41 import EngramParts, build_model_v41
from dsv4c.frontend.safetensors import parse_json
from dsv4c.frontend.table import SCALED, Role, TensorSpec, expected_tensors, published_dtype, scale_name
from dsv4c.frontend.token_map import SOURCE
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Module
from dsv4c.ir.weights import WeightExpr, cast, decode_fp4, decode_fp8, source


def module_of(path: Path) -> tuple[Module, str]:
    """The MODEL-level module of a checkpoint directory, or of a config.json in the released formats.

    Returns:
        the module, and "checkpoint" or "config": which of the two its formats are from.

    Raises:
        UsageError: there is no such path, or it is no text of JSON.
        ConfigError, CheckpointError: it is not that of a supported model.
    """
    if not path.exists():
        raise UsageError(
            "no such file or directory", where=str(path), allowed="a checkpoint directory or a config.json"
        )
    if path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))):
        return build_checkpoint(open_checkpoint(path, scan=False)), "checkpoint"
    config = load_config(path) if path.is_dir() else _config_file(path)
    specs = expected_tensors(config)

    def weight(name: str) -> WeightExpr:
        return released(name, specs[name], config)

    if config.generation is Generation.V4:
        return build_model(config, weight), "config"
    return build_model_v41(config, weight, _engram(config, specs)), "config"


def _engram(config: ModelConfig, specs: dict[str, TensorSpec]) -> EngramParts | None:
    """The Engram layers of a configuration; which tokens are of one class is not known and costs nothing."""
    if config.engram is None:
        return None
    engram = engram_config(config)

    def stored(name: str) -> WeightExpr | None:
        scale = name.endswith(".scale")
        weight = name.removesuffix(".scale") + ".weight" if scale else name
        dtype = published_dtype(weight, specs[weight], config)
        if not scale:
            return source(name, dtype, specs[weight].stored_shape(dtype))
        tiles = specs[weight].scale_shape(dtype, config.weight_block_size)
        return source(name, DType.F8E8M0, tiles) if dtype in SCALED else None

    def weights(layer: int) -> EngramWeights:
        return layer_weights(engram, stored, f"layers.{layer}.engram.", config.weight_block_size)

    return EngramParts(engram, weights, source(SOURCE, DType.I32, (config.vocab_size,)))


def _config_file(path: Path) -> ModelConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            "is neither a checkpoint directory nor a config.json", where=str(path),
            hint="dsv4c inspect says what an artifact is; estimate its checkpoint",
        ) from None  # fmt: skip
    return parse_config(parse_json(text, str(path), ConfigError), str(path))


def released(name: str, spec: TensorSpec, config: ModelConfig) -> WeightExpr:
    """The expression of a tensor as a released checkpoint of this configuration would store it."""
    dtype = published_dtype(name, spec, config)
    codes = source(name, dtype, spec.stored_shape(dtype))
    if spec.role is Role.ROWS:
        return codes
    if dtype in SCALED:
        block = config.weight_block_size
        scale = source(scale_name(name), DType.F8E8M0, spec.scale_shape(dtype, block))
        return decode_fp4(codes, scale) if dtype is DType.F4E2M1X2 else decode_fp8(codes, scale, block)
    return cast(codes, DType.I32) if spec.role is Role.TABLE else codes
