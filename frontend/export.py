"""Writes a module at level MODEL back as a checkpoint directory in the published format.

The inverse of `checkpoint` and of the builders: a weight's location is its published name, but for those of
Engram and for the parts into which the image encoder cuts its stacked matrices. Tensors that passes only
cut, joined or renumbered keep the bytes they have in the source checkpoint; nothing is rounded again. Knows
no pass; a model with fewer experts is one whose graph has fewer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np

from dsv4c.errors import UsageError
from dsv4c.ir.dtypes import Array, DType, decode, f32_to_bf16
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level
from dsv4c.ir.weights import TensorStore, WeightExpr, cast, concat, stream

from .architecture import Generation, ModelConfig
from .checkpoint import SHOWN, Checkpoint
from .config import parse_config
from .config_v41 import edit_text
from .safetensors import INDEX, STORED, parse_json
from .stored import StoredTensor, write_safetensors
from .table import Role, TensorSpec, expected_tensors, scale_name
from .token_map import SOURCE, write_token_map

MAX_SHARD = 5 << 30  # bytes of tensors in one file
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_ENGRAM = {"embed": "embed.weight", "kv": "wkv.weight", "q_norm": "q_weight", "k_norm": "k_weight"}
"""Last part of a location in an Engram layer -> the tensor; the scale of the table is called as published."""
_PART = re.compile(r"(.+)\.(\d+)-\d+")  # rows of a stacked matrix, first and one past the last
_COMPUTED = (SOURCE, "rope_frequencies")
"""What no tensor of the files holds: the token map, by its location, and rotary angles, by their op."""
_EXPERT = re.compile(r"(.+\.ffn)\.experts\.(\d+)\..+")
_DECODE = ("decode_fp8", "decode_fp4")


@dataclass(frozen=True)
class Exported:
    """What `export_checkpoint` wrote.

    Attributes:
        experts: routed experts of every layer in the files.
        padded: layer -> how many of them no token can select: all zero, with a bias of -inf or named by no
            hash table. A checkpoint has one number of experts, a module one for each layer.
        widened: weights that a pass had decoded, written as float32.
        dropped: weights of the configuration that are not in the files: MTP blocks, when no source was given
            or their number of experts no longer fits; draft layers of V4.1 have experts of their own and fit.
    """

    directory: str
    tensors: int
    bytes: int
    shards: int
    experts: int
    padded: dict[str, int]
    widened: list[str]
    dropped: list[str]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def export_checkpoint(
    module: Module,
    directory: str | os.PathLike[str],
    source: Checkpoint | None = None,
    max_shard: int = MAX_SHARD,
) -> Exported:
    """Write `module` as a checkpoint; the directory appears whole or not at all.

    config.json is the one the module came with (`module.assets["config"]`), of which only the number of
    experts and of MTP blocks is changed. Memory stays at one tensor.

    Args:
        directory: must not exist, or be empty.
        source: the checkpoint the module was built from; gives what no module holds: the MTP blocks and the
            small files beside the weights. Without it the files have none, but for tokenizer and token map.
        max_shard: bytes of tensors per file; a larger tensor gets a file of its own.

    Raises:
        UsageError: the directory holds something, the module is not at level MODEL, has no weights or no
            configuration, or its weights are not those of its configuration.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("exists and is not empty", where=str(target), allowed="a new or an empty directory")
    if module.level is not Level.MODEL or module.store is None:
        what = "no weights" if module.store is None else f"level {module.level.value}"
        raise UsageError(
            f"a module with {what} cannot be exported", where=module.name,
            allowed="level MODEL, with weights",
            hint="export what load_checkpoint returned, or what passes at level MODEL left of it",
        )  # fmt: skip
    plan = _Plan(module, source)
    tensors = list(plan.tensors())
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        shards = _write_shards(partial, tensors, max_shard)
        (partial / "config.json").write_text(json.dumps(plan.raw, indent=2) + "\n", encoding="utf-8")
        if "tokenizer" in module.assets:
            (partial / "tokenizer.json").write_bytes(module.assets["tokenizer"])
        if plan.config.engram:
            write_token_map(partial, module.store.read(SOURCE).astype(np.int32))
        for name in _COMPANIONS:
            if source and (source.path / name).is_file():
                shutil.copyfile(source.path / name, partial / name)
        partial.replace(target)
    except OSError as error:
        raise UsageError(f"cannot be written: {error}", where=str(target)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(
        str(target), len(tensors), sum(t.nbytes for t in tensors), shards, plan.config.n_routed_experts,
        plan.padded, plan.widened, plan.dropped,
    )  # fmt: skip


Chunks = Callable[[], Iterator[Array]]


class _Plan:
    """Which tensors the files get, under which configuration."""

    def __init__(self, module: Module, source: Checkpoint | None) -> None:
        assert module.store is not None
        config = source.config if source else _config(module)
        mtp = source.mtp if source else {}
        self.weights = {name: (x, module.store) for name, x in _published(module).items()}
        if config.generation is Generation.V41 and config.vision is None:
            self._stand_in()
        self.experts = _experts_by_layer(self.weights)
        most = max(self.experts.values(), default=config.n_routed_experts)
        self.padded = {layer: most - n for layer, n in self.experts.items() if n < most}
        own_experts = config.generation is Generation.V41
        keep_mtp = bool(mtp) and (own_experts or most == config.n_routed_experts)
        self.dropped = [] if keep_mtp else _mtp_names(config)
        if keep_mtp and source:
            self.weights |= {name: (x, source.files) for name, x in mtp.items()}
        self.raw = _edited(config, most, keep_mtp)
        self.config = parse_config(self.raw, "config of the export")
        self.widened: list[str] = []
        self.specs = expected_tensors(self.config)
        self._check()

    def _stand_in(self) -> None:
        """A model without images has a bias for them all the same, which no graph reads: that of text."""
        text = {name: x for name, x in self.weights.items() if name.endswith(".ffn.gate.bias")}
        self.weights |= {f"{name}_vl": x for name, x in text.items()}

    def _check(self) -> None:
        padding = {name for name in self.specs if self._template(name) != name}
        wrong = [f"{name} is missing" for name in self.specs if name not in self.weights.keys() | padding]
        scales = {scale_name(name) for name, spec in self.specs.items() if spec.role is Role.ROWS}
        known = self.specs.keys() | scales
        wrong += [f"{name} is no tensor of the model" for name in self.weights if name not in known]
        for name, spec in self.specs.items():
            if name in self.weights:
                shape, pad = self.weights[name][0].shape, self._padding(name, spec)
                if (shape[0] + pad, *shape[1:]) != spec.shape:
                    wrong.append(f"{name} is {list(shape)}, not {list(spec.shape)}")
        if wrong:
            more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise UsageError(
                f"the weights are not those of the configuration: {'; '.join(wrong[:SHOWN])}{more}",
                where="export",
                hint="export a module that load_checkpoint built, and the checkpoint it was built from",
            )

    def _padding(self, name: str, spec: TensorSpec) -> int:
        """Rows that a router's weight or bias gets for padding experts."""
        layer, gate, _ = name.rpartition(".gate.")
        return self.padded.get(layer, 0) if gate and spec.role is not Role.TABLE else 0

    def _template(self, name: str) -> str:
        """The tensor a padding expert copies its form from; any other name stays itself."""
        match = _EXPERT.fullmatch(name)
        if match and int(match[2]) >= self.experts.get(match[1], 0) > 0:
            return name.replace(f".experts.{match[2]}.", ".experts.0.", 1)
        return name

    def tensors(self) -> Iterator[StoredTensor]:
        """In the order of the layers, every scale behind its weight."""
        for name, spec in self.specs.items():
            template = self._template(name)
            x, store = self.weights[template]
            parts = x.args if x.op in _DECODE else (self._plain(name, spec, x),)
            if spec.role is Role.ROWS and (scale := self.weights.get(scale_name(name))):
                parts = (x, scale[0])
            for part, stored in zip(parts, (name, scale_name(name)), strict=False):
                if part.dtype not in STORED.values():
                    what = f"{stored} is {part.dtype.value}"
                    raise UsageError(what, where="export", allowed=", ".join(STORED))
                shape, chunks = part.shape, _bytes(part, store)
                if template != name:
                    chunks = _filled(part.dtype, shape, 1.0 if stored != name else 0.0)
                elif pad := self._padding(name, spec):
                    fill = -np.inf if name.endswith((".bias", ".bias_vl")) else 0.0
                    chunks = _joined(chunks, _filled(part.dtype, (pad, *shape[1:]), fill))
                    shape = (shape[0] + pad, *shape[1:])
                yield StoredTensor(stored, part.dtype, shape, chunks)

    def _plain(self, name: str, spec: TensorSpec, x: WeightExpr) -> WeightExpr:
        """The expression to store as it is: tables in the type of their source, decoded matrices as f32."""
        if spec.role is Role.TABLE:
            return cast(x.args[0] if x.op == "cast" else x, next(x.sources()).dtype)
        if any(op in _DECODE for op in _operations(x)):
            self.widened.append(name)
        return x


def _published(module: Module) -> dict[str, WeightExpr]:
    """Published name -> weight, of a module and its image encoder; scales of Engram's rows by theirs."""
    found: dict[str, WeightExpr] = {}
    pieces: dict[str, dict[int, WeightExpr]] = {}
    for one in (module, *module.parts.values()):
        for op in one.weights():
            assert op.weight is not None
            if op.loc in _COMPUTED or op.weight.op in _COMPUTED:
                continue
            if match := _PART.fullmatch(op.loc):
                pieces.setdefault(match[1], {})[int(match[2])] = op.weight
                continue
            layer, engram, last = op.loc.partition(".engram.")
            found[layer + engram + (_ENGRAM.get(last, last) if engram else "")] = op.weight
    joined = {name: concat(tuple(x for _, x in sorted(of.items()))) for name, of in pieces.items()}
    return found | joined


def _operations(x: WeightExpr) -> Iterator[str]:
    yield x.op
    for arg in x.args:
        yield from _operations(arg)


def _experts_by_layer(names: dict[str, tuple[WeightExpr, TensorStore]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            out[match[1]] = max(out.get(match[1], 0), int(match[2]) + 1)
    return out


def _config(module: Module) -> ModelConfig:
    if "config" not in module.assets:
        raise UsageError(
            "the module has no configuration", where=module.name, allowed="an asset `config`, or the source",
            hint="pass the checkpoint it was built from",
        )  # fmt: skip
    text = module.assets["config"].decode("utf-8")
    return parse_config(parse_json(text, f"{module.name}, asset config", UsageError), "asset config")


def _mtp_names(config: ModelConfig) -> list[str]:
    return [name for name in expected_tensors(config) if name.startswith("mtp.")]


def _edited(config: ModelConfig, experts: int, mtp: bool) -> dict[str, object]:
    changes: dict[str, object] = {"n_routed_experts": experts}
    if not mtp and config.n_mtp_layers:
        changes["num_nextn_predict_layers"] = 0
        if config.generation is Generation.V41 or "compress_ratios" in config.raw:
            changes["compress_ratios"] = list(config.compress_ratios)
    if config.generation is Generation.V41:
        return edit_text(config.raw, changes)
    return {**config.raw, **changes}


# -------------------------------------------------------------------------------------- bytes


def _bytes(x: WeightExpr, store: TensorStore) -> Chunks:
    return lambda: stream(x, store)


def _joined(*parts: Chunks) -> Chunks:
    return lambda: (chunk for part in parts for chunk in part())


def _filled(dtype: DType, shape: tuple[int, ...], value: float) -> Chunks:
    """`value`, which is 0, 1 or -inf, in the storage of `dtype`."""
    match dtype:
        case DType.BF16:
            one = f32_to_bf16(np.array([value], np.float32))
        case DType.F8E8M0:
            one = np.array([127], np.uint8)
        case DType.F32 | DType.F16:
            one = np.array([value], dtype.storage)
        case _:
            one = np.zeros(1, dtype.storage)
    assert decode(one, dtype).flat[0] == value, f"{value} as {dtype.value}"
    return lambda: iter([np.broadcast_to(one, shape)])


def _write_shards(root: Path, tensors: list[StoredTensor], max_shard: int) -> int:
    """Files in order of the tensors, and their index; returns how many files."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, part in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(root / file, part)
        weight_map |= {t.name: file for t in part}
    total = sum(prod(t.shape) * t.dtype.itemsize for t in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return len(shards)
