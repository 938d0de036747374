"""Opens a checkpoint directory: configuration, files and names in, lazy weights of logical values out.

Owns the check that the files hold exactly the model the configuration describes. Knows no graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dsv4c.errors import CheckpointError
from dsv4c.ir.dtypes import DType
from dsv4c.ir.weights import TensorStore, WeightExpr, cast, decode_fp4, decode_fp8, rows, source, take

from .architecture import Generation, ModelConfig
from .config import load_config
from .engram import EngramConfig, EngramWeights, engram_config
from .engram_layer import layer_weights, with_token_map
from .naming import Half, Origin, resolve
from .safetensors import RawTensor, TensorFiles
from .scan import bad_values
from .table import ALLOWED, SCALED, Role, TensorSpec, expected_tensors, scale_name
from .token_map import SOURCE, Overlay, TokenMap, read_token_map

SHOWN = 5  # offenders that one error lists


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A validated checkpoint.

    Attributes:
        path: the directory.
        files: the bytes; the `TensorStore` of every expression of `weight` and `mtp`, and of `store`.
        tokenizer_path: `tokenizer.json`, if there is one.
        specs: published name -> logical shape and role, for every weight that is present.
        origins: published name, scales included -> where it lies.
    """

    path: Path
    config: ModelConfig
    files: TensorFiles
    tokenizer_path: Path | None
    specs: dict[str, TensorSpec]
    origins: dict[str, Origin]

    def weight(self, name: str) -> WeightExpr:
        """The logical values of a tensor by its published name, in the number format that holds them.

        F32, BF16 and F16 tensors come as they are; FP8 and packed FP4 with their scale applied, as f32;
        tables of token ids as i32; rows of Engram as stored, since they are decoded at look-up. Shape is the
        logical one of section 2 of the model specification.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        spec = self._spec(name)
        codes = self._part(name, name)
        if spec.role is Role.ROWS:
            return codes
        if codes.dtype is DType.F8E4M3:
            return decode_fp8(codes, self._part(scale_name(name), name), self.config.weight_block_size)
        if codes.dtype is DType.F4E2M1X2:
            return decode_fp4(codes, self._part(scale_name(name), name))
        return cast(codes, DType.I32) if spec.role is Role.TABLE else codes

    def scale(self, name: str) -> WeightExpr | None:
        """The scale of a tensor as stored, by the name of the tensor; None where it is stored without.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        self._spec(name)
        return self._part(scale_name(name), name) if self.stored_dtype(name) in SCALED else None

    def _spec(self, name: str) -> TensorSpec:
        spec = self.specs.get(name)
        if spec is None:
            raise CheckpointError(
                f"no tensor {name!r}",
                where=str(self.path),
                allowed="published names, e.g. layers.0.attn.wq_a.weight",
            )
        return spec

    def stored_dtype(self, name: str) -> DType:
        """The element type the tensor has in the files; F8E4M3 and F4E2M1X2 have a scale beside them."""
        return self.files.tensors[self.origins[name].name].dtype

    @property
    def mtp(self) -> dict[str, WeightExpr]:
        """Every tensor of the MTP blocks (`mtp.0.…`), kept for later; empty when the checkpoint has none."""
        return {name: self.weight(name) for name in self.specs if name.startswith("mtp.")}

    # -------------------------------------------------------------------------------- Engram

    @cached_property
    def token_map(self) -> TokenMap:
        """[V] int32, token -> class; read at first use.

        Raises:
            CheckpointError: there is neither a stored map nor a tokenizer.
            ConfigError: the model has no Engram, or the map another number of classes.
        """
        config = engram_config(self.config)
        table = read_token_map(self.path)
        with_token_map(config, table, str(self.path))
        return table

    @cached_property
    def engram(self) -> EngramConfig:
        """The Engram layers, `pad` as a class. Raises what `token_map` raises."""
        return with_token_map(engram_config(self.config), self.token_map, str(self.path))

    def engram_weights(self, layer: int) -> EngramWeights:
        """The weights of one Engram layer: the table as stored, everything else as `weight` gives it.

        Raises:
            CheckpointError: the layer has none.
        """

        def stored(name: str) -> WeightExpr | None:
            return self._part(name, name) if name in self.origins else None

        config = engram_config(self.config)
        return layer_weights(config, stored, f"layers.{layer}.engram.", self.config.weight_block_size)

    @property
    def token_map_weight(self) -> WeightExpr:
        """`token_map` as an expression over `store`. Raises what `token_map` raises."""
        return source(SOURCE, DType.I32, self.token_map.shape)

    @cached_property
    def store(self) -> TensorStore:
        """What a graph of this checkpoint reads: the files, and with Engram the token map.

        Raises what `token_map` raises.
        """
        return Overlay(self.files, {SOURCE: self.token_map}) if self.config.engram else self.files

    # ---------------------------------------------------------------------------------- parts

    def _part(self, name: str, weight: str) -> WeightExpr:
        """One stored tensor, or the part of a stack that belongs to the expert named in `weight`."""
        origin = self.origins[name]
        raw = self.files.tensors[origin.name]
        x = source(raw.name, raw.dtype, raw.shape)
        if not origin.stacked:
            return x
        x = take(x, int(weight.split(".experts.")[1].split(".")[0]))
        half = x.shape[0] // 2
        match origin.half:
            case Half.FIRST:
                return rows(x, 0, half)
            case Half.SECOND:
                return rows(x, half, 2 * half)
            case Half.ALL:
                return x


def open_checkpoint(path: str | Path, *, scan: bool = True) -> Checkpoint:
    """Open and validate a checkpoint directory.

    Names, shapes and number formats are always checked. With `scan` the values of all scales, of all small
    parameters and of the hash tables are checked too, which reads about 6 % of a released checkpoint.

    Raises:
        ConfigError: config.json is not that of a supported model.
        CheckpointError: a file is damaged, or tensors are missing, unknown, misshaped, mistyped, not finite.
    """
    root = Path(path)
    config = load_config(root)
    files = TensorFiles.open(root)
    try:
        origins, unknown = resolve(files.tensors, config.n_routed_experts, config.generation)
    except CheckpointError as error:
        error.where = str(root)
        raise
    specs = expected_tensors(config)
    if not any(name.startswith("mtp.") for name in origins):
        specs = {name: spec for name, spec in specs.items() if not name.startswith("mtp.")}
    files = files.retyped(_containers(specs, origins, files))
    _report(root, list(_problems(config, files, specs, origins, unknown)), "tensors do not fit config.json")
    tokenizer = root / "tokenizer.json"
    checkpoint = Checkpoint(root, config, files, tokenizer if tokenizer.is_file() else None, specs, origins)
    if scan:
        _report(root, list(bad_values(config, files, specs, origins)), "tensors hold impossible values")
    return checkpoint


def _report(root: Path, problems: list[str], what: str) -> None:
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{len(problems)} {what}: {'; '.join(problems[:SHOWN])}{more}", where=str(root))


def _containers(
    specs: dict[str, TensorSpec], origins: dict[str, Origin], files: TensorFiles
) -> dict[str, DType]:
    """Stored names whose header dtype is only a container: I8 of packed FP4, U8 of E8M0."""
    out = {}
    for name, spec in specs.items():
        if name in origins and spec.role is Role.EXPERT:
            raw = files.tensors[origins[name].name]
            if raw.dtype is DType.I8:
                out[raw.name] = DType.F4E2M1X2
        scale = origins.get(scale_name(name))
        if scale and files.tensors[scale.name].stored == "U8":
            out[scale.name] = DType.F8E8M0
    return out


# ---------------------------------------------------------------------- names, shapes, formats


def _problems(
    config: ModelConfig, files: TensorFiles, specs: dict[str, TensorSpec], origins: dict[str, Origin],
    unknown: list[str],
) -> Iterator[str]:  # fmt: skip
    """One sentence per tensor that is missing, of no use, misshaped or mistyped."""
    scales = set()
    for name, spec in specs.items():
        if name not in origins:
            yield f"{name} is missing (allowed: {_names(ALLOWED[spec.role])} {list(spec.shape)})"
            continue
        raw = files.tensors[origins[name].name]
        yield from _check_tensor(name, spec, raw, origins[name], config.n_routed_experts)
        if raw.dtype in SCALED:
            scales.add(scale_name(name))
            yield from _check_scale(name, spec, raw, config, files, origins)
    for name in origins.keys() - specs.keys() - scales:
        yield f"{_spelt(origins[name], name)} has no use in this model{_why(name, specs)}"
    for name in unknown:
        what = "V4.1" if config.generation is Generation.V41 else "V4"
        yield f"{name} is not a name of a DeepSeek-{what} tensor"


def _why(name: str, specs: dict[str, TensorSpec]) -> str:
    weight = name.removesuffix(".scale") + ".weight"
    return ": its weight is neither FP8 nor packed FP4" if name.endswith(".scale") and weight in specs else ""


def _check_tensor(name: str, spec: TensorSpec, raw: RawTensor, origin: Origin, experts: int) -> Iterator[str]:
    who = _spelt(origin, name)
    if not spec.allows(raw.dtype):
        yield f"{who} is {raw} (allowed: {_names(ALLOWED[spec.role])} {list(spec.shape)})"
        return
    shape = _stored(origin, spec.stored_shape(raw.dtype), experts)
    if raw.shape != shape:
        yield f"{who} is {raw} (allowed: {raw.stored}{list(shape)})"


def _check_scale(
    name: str, spec: TensorSpec, raw: RawTensor, config: ModelConfig, files: TensorFiles,
    origins: dict[str, Origin],
) -> Iterator[str]:  # fmt: skip
    block, scale = config.weight_block_size, scale_name(name)
    tiles, allowed = spec.scale_shape(raw.dtype, block), spec.scale_dtypes
    if scale not in origins:
        yield f"{scale} is missing, {name} is {raw.stored} (allowed: {_names(allowed)} {list(tiles)})"
        return
    found = files.tensors[origins[scale].name]
    who = _spelt(origins[scale], scale)
    if found.dtype not in allowed:
        yield f"{who} is {found} (allowed: {_names(allowed)} {list(tiles)})"
    elif found.shape != (shape := _stored(origins[scale], tiles, config.n_routed_experts)):
        yield f"{who} is {found} (allowed: {found.stored}{list(shape)})"
    elif origins[scale].half is not Half.ALL and raw.dtype is DType.F8E4M3 and spec.shape[0] % block[0]:
        yield f"{who}: a tile spans gate and up (allowed: moe_intermediate_size a multiple of {block[0]})"


def _stored(origin: Origin, part: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """Shape of the stored tensor of which `part` is one expert's share."""
    if not origin.stacked:
        return part
    return (experts, part[0] * (1 if origin.half is Half.ALL else 2), *part[1:])


def _spelt(origin: Origin, name: str) -> str:
    return name if origin.name == name else f"{origin.name} (published: {name})"


def _names(dtypes: tuple[DType, ...]) -> str:
    return " or ".join(d.value for d in dtypes)
