"""Writes random checkpoints of any size in every naming and number format the frontend reads.

Streams tensor by tensor, so memory stays at one band of rows. A value depends on the seed and the published
name only: checkpoints that differ in naming, sharding or float format hold the same model. Knows no graph.

    python -m dsv4c.frontend.generate OUT --preset small --dtype bf16
    python -m dsv4c.frontend.generate OUT --config DIR/config.json --layers 4 --sparse

`--sparse` is for sizes: names, shapes and formats are those of a model of any size, but every float is zero
and a hole of the file, so that hundreds of gigabytes take a few megabytes of disk. Its logits are all equal.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import numpy as np

from dsv4c.errors import Dsv4cError, UsageError
from dsv4c.ir.dtypes import Array, DType, F32Array, bf16_to_f32, f32_to_bf16

from .architecture import LayerKind, ModelConfig
from .config import parse_config
from .encode import encode_fp4, encode_fp8
from .naming import saved_name, transformers_name
from .safetensors import INDEX, SINGLE, parse_json
from .stored import Chunks, StoredTensor, write_safetensors
from .table import SCALED, Role, TensorSpec, expected_tensors, published_dtype, scale_name

_BASE: dict[str, object] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4",
    "bos_token_id": 0, "eos_token_id": 1,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "n_shared_experts": 1, "num_key_value_heads": 1, "scoring_func": "sqrtsoftplus", "norm_topk_prob": True,
    "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip

PRESETS: dict[str, dict[str, object]] = {
    "tiny": dict(
        vocab_size=61, hidden_size=96, num_hidden_layers=4, compress_ratios=[0, 4, 16, 4], num_hash_layers=1,
        num_attention_heads=3, head_dim=40, qk_rope_head_dim=16, q_lora_rank=48, o_groups=3, o_lora_rank=24,
        sliding_window=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=56,
        index_n_heads=2, index_head_dim=32, index_topk=3, max_position_embeddings=512,
        rope_scaling={
            "type": "yarn", "factor": 4, "original_max_position_embeddings": 64,
            "beta_fast": 32, "beta_slow": 1,
        },
    ),
    "small": dict(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=12, compress_ratios=[0, 0, *[4, 128] * 5],
        num_hash_layers=3, num_attention_heads=16, head_dim=128, qk_rope_head_dim=16, q_lora_rank=384,
        o_groups=4, o_lora_rank=256, sliding_window=128, n_routed_experts=64, num_experts_per_tok=6,
        moe_intermediate_size=512, index_n_heads=8, index_head_dim=64, index_topk=128,
        max_position_embeddings=8192,
    ),
}  # fmt: skip
"""Published keys on top of `_BASE`. "tiny" has every layer kind and odd sizes, "small" is for benchmarks."""

STYLES = ("published", "transformers", "saved")
FLOATS = {"bf16": DType.BF16, "f16": DType.F16, "f32": DType.F32}
SCALES = {"e8m0": DType.F8E8M0, "f32": DType.F32}
_TORCH_NAMES = {"published": "bfloat16", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}

_VALUES: tuple[tuple[str, float, float], ...] = (
    ("*norm.weight", 1.0, 0.1),
    ("*attn_sink", 0.0, 0.5),
    ("*.ape", 0.0, 0.5),
    ("*_base", 0.0, 0.5),
    ("*_scale", 1.0, 0.1),
    ("*gate.bias", 0.0, 0.1),
    ("embed.weight", 0.0, 1.0),
)
"""Pattern of the published name -> mean and standard deviation; every other tensor is a matrix with mean 0
and deviation 1/sqrt(columns), so that sizes do not change how lively the logits are."""

_BAND = 1 << 22  # numbers generated at a time


def generate_checkpoint(
    directory: str | Path, config: str | Mapping[str, object] = "tiny", *, seed: int = 0,
    style: str = "published", dtype: str = "published", shards: int = 1, scale_dtype: str = "e8m0",
    mtp: int = 0, layers: int = 0, sparse: bool = False,
) -> Path:  # fmt: skip
    """Write a random checkpoint and return its directory.

    Args:
        directory: made if need be; must not hold weights yet.
        config: a name of `PRESETS`, or published configuration keys on top of the defaults of all models.
        style: naming and config.json: "published", "transformers" (module names, stacked experts) or "saved"
            (what `save_pretrained` writes).
        dtype: "published" (FP8, packed FP4, BF16 and F32 as released; experts with odd numbers of columns
            are FP8) or "bf16", "f16", "f32" for every float tensor. The float formats hold the same values.
        shards: number of files; more than one come with an index.
        scale_dtype: of FP8 scales, "e8m0" or "f32"; packed FP4 always has E8M0.
        mtp: number of MTP blocks.
        layers: how many of the first layers to keep; 0 is all.
        sparse: every float is zero and every code and scale is 0 (F32 scales, which must be positive, are 1);
            what is zero is a hole. Tables of expert ids are those of `seed`, as rows must be distinct.

    Raises:
        UsageError: an argument is none of these, the style cannot express the configuration, or the directory
            holds weights.
        ConfigError: the keys are not a valid configuration.
    """
    _check(
        ("style", style, STYLES),
        ("dtype", dtype, ("published", *FLOATS)),
        ("scale_dtype", scale_dtype, SCALES),
    )
    root = Path(directory)
    if root.is_dir() and any(root.glob("*.safetensors")):
        raise UsageError("the directory holds weights already", where=str(root), hint="name an empty one")
    raw = _published_config(config, dtype, scale_dtype, mtp, layers)
    model = parse_config(raw, "config of the generator")
    written = raw if style == "published" else _transformers_config(raw, model)
    plan = list(_Plan(model, seed, style, dtype, SCALES[scale_dtype]).tensors())
    plan = [_emptied(t) for t in plan] if sparse else plan
    root.mkdir(parents=True, exist_ok=True)
    _write_text(root / "config.json", json.dumps(written, indent=2) + "\n")
    _write_shards(root, plan, shards)
    return root


def _check(*arguments: tuple[str, str, Sequence[str] | Mapping[str, DType]]) -> None:
    for name, value, allowed in arguments:
        if value not in allowed:
            raise UsageError(f"{name} {value!r}", allowed=", ".join(allowed))


# -------------------------------------------------------------------------------------- config


def _published_config(
    config: str | Mapping[str, object], dtype: str, scale_dtype: str, mtp: int, keep: int
) -> dict[str, object]:
    if isinstance(config, str):
        _check(("preset", config, tuple(PRESETS)))
        config = PRESETS[config]
    out = {**_BASE, **config, "num_nextn_predict_layers": mtp, "torch_dtype": _TORCH_NAMES[dtype]}
    ratios, layers = out.get("compress_ratios"), out.get("num_hidden_layers")
    if keep and isinstance(layers, int):
        if not 0 < keep <= layers:
            raise UsageError(f"{keep} layers", allowed=f"1 to {layers}, or 0 for all")
        hashed, layers = out.get("num_hash_layers", 0), keep
        out["num_hidden_layers"] = keep
        out["num_hash_layers"] = min(hashed, keep) if isinstance(hashed, int) else hashed
    if isinstance(ratios, list) and isinstance(layers, int):
        out["compress_ratios"] = [*ratios[:layers], *[0] * mtp]
    if dtype == "published":
        fmt = {"scale_fmt": "ue8m0"} if scale_dtype == "e8m0" else {}
        quant = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **fmt}
        out.setdefault("quantization_config", {**quant, "weight_block_size": [128, 128]})
        out.setdefault("expert_dtype", "fp4")
    return out


def _transformers_config(raw: dict[str, object], c: ModelConfig) -> dict[str, object]:
    """The same model with the keys `save_pretrained` of transformers 5.23 writes."""
    gone = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")
    out = {key: value for key, value in raw.items() if key not in gone}
    rates = {LayerKind.CSA.value: 4, LayerKind.HCA.value: 128}
    for kind in (LayerKind.CSA, LayerKind.HCA):
        found = {r for k, r in zip(c.layer_kinds, c.compress_ratios, strict=True) if k is kind}
        if len(found) > 1:
            raise UsageError(
                f"ratios {sorted(found)} of {kind.value}",
                allowed="one ratio per kind in transformers' configuration",
            )
        rates[kind.value] = found.pop() if found else rates[kind.value]
    factor = c.rope_dim / c.head_dim
    compress: dict[str, object] = {"rope_type": "default"}
    if c.yarn:
        compress = {
            "rope_type": "yarn", "factor": c.yarn.factor, "original_max_position_embeddings": c.yarn.original,
            "beta_fast": c.yarn.beta_fast, "beta_slow": c.yarn.beta_slow, "attention_factor": 1.0,
        }  # fmt: skip
    common = {"partial_rotary_factor": factor}
    return out | {
        "layer_types": [k.value for k in c.layer_kinds],
        "compress_rates": rates,
        "mlp_layer_types": ["hash_moe" if h else "moe" for h in c.hash_layers],
        "partial_rotary_factor": factor,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": c.rope_theta, **common},
            "compress": {**compress, "rope_theta": c.compress_rope_theta, **common},
        },
        "dtype": raw["torch_dtype"],
    }


# -------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class _Plan:
    """Which tensors a checkpoint gets, and how their bytes are made."""

    config: ModelConfig
    seed: int
    style: str
    dtype: str
    scale_dtype: DType

    def tensors(self) -> Iterator[StoredTensor]:
        stacked = self.style == "transformers" and self.dtype != "published"
        for name, spec in expected_tensors(self.config).items():
            if stacked and spec.role is Role.EXPERT:
                if ".experts.0.w1" in name:
                    yield from self._stacks(name.removesuffix("0.w1.weight"))
                continue
            dtype = self._dtype(name, spec)
            shape = spec.stored_shape(dtype)
            if dtype not in SCALED:
                yield StoredTensor(self._spelt(name), dtype, shape, self._floats(name, spec, dtype))
                continue
            codes, scales = self._quantised(name, spec, dtype)
            yield StoredTensor(self._spelt(name), dtype, shape, codes)
            kind = DType.F8E8M0 if dtype is DType.F4E2M1X2 else self.scale_dtype
            shape = spec.scale_shape(dtype, self.config.weight_block_size)
            yield StoredTensor(self._spelt(scale_name(name)), kind, shape, scales)

    def _stacks(self, prefix: str) -> Iterator[StoredTensor]:
        """`gate_up_proj` [E, 2I, d] and `down_proj` [E, d, I] of one layer."""
        c, dtype = self.config, FLOATS[self.dtype]
        module = self._spelt(f"{prefix}0.w1.weight").removesuffix("0.gate_proj.weight")
        inner, d = c.moe_intermediate_size, c.hidden_size
        for stack, names, shape in (
            ("gate_up_proj", ("w1", "w3"), (inner, d)),
            ("down_proj", ("w2",), (d, inner)),
        ):
            spec = TensorSpec(shape, Role.EXPERT)
            parts = [
                self._floats(f"{prefix}{e}.{name}.weight", spec, dtype)
                for e in range(c.n_routed_experts) for name in names
            ]  # fmt: skip
            whole = (c.n_routed_experts, len(names) * shape[0], shape[1])
            yield StoredTensor(f"{module}{stack}", dtype, whole, _joined(parts))

    def _spelt(self, name: str) -> str:
        match self.style:
            case "transformers":
                return transformers_name(name)
            case "saved":
                return saved_name(name)
            case _:
                return name

    def _dtype(self, name: str, spec: TensorSpec) -> DType:
        if self.dtype == "published" or spec.role is Role.TABLE:
            return published_dtype(name, spec, self.config)
        return FLOATS[self.dtype]

    def _floats(self, name: str, spec: TensorSpec, dtype: DType) -> Chunks:
        def chunks() -> Iterator[Array]:
            for band in bands(name, spec, self.config, self.seed):
                yield f32_to_bf16(band) if dtype is DType.BF16 else band.astype(dtype.storage)

        return chunks

    def _quantised(self, name: str, spec: TensorSpec, dtype: DType) -> tuple[Chunks, Chunks]:
        """Bands of the codes, and of the scales; the scales are there once the codes have been made."""
        made: list[Array] = []
        block = self.config.weight_block_size

        def codes() -> Iterator[Array]:
            for band in bands(name, spec, self.config, self.seed, block[0]):
                fp4 = dtype is DType.F4E2M1X2
                code, scale = encode_fp4(band) if fp4 else encode_fp8(band, block, self.scale_dtype)
                made.append(scale)
                yield code

        def scales() -> Iterator[Array]:
            while made:
                yield made.pop(0)

        return codes, scales


def _emptied(t: StoredTensor) -> StoredTensor:
    """`t` with zeros for its numbers, as a hole; expert ids and F32 scales of codes cannot be zero."""
    if not t.dtype.is_float:
        return t
    of_codes = len(t.shape) == 2 and t.name.endswith((".scale", "_scale_inv"))  # others are vectors
    scale = of_codes and t.dtype is DType.F32
    return replace(t, chunks=(lambda: iter([np.ones(t.shape, np.float32)])) if scale else None)


def _joined(parts: list[Chunks]) -> Chunks:
    return lambda: (chunk for part in parts for chunk in part())


def bands(name: str, spec: TensorSpec, config: ModelConfig, seed: int, multiple: int = 1) -> Iterator[Array]:
    """The logical values of a tensor, some whole rows at a time (a multiple of `multiple` but for the last).

    float32, exact in BF16 and in F16; int64 for a table of expert ids, distinct in every row.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    columns = config.n_routed_experts if spec.role is Role.TABLE else prod(spec.shape[1:])
    step = max(_BAND // columns // multiple, 1) * multiple
    for start in range(0, spec.shape[0], step):
        count = min(step, spec.shape[0] - start)
        if spec.role is Role.TABLE:
            yield rng.random((count, columns)).argsort(axis=1)[:, : spec.shape[1]]
            continue
        mean, deviation = _moments(name, spec)
        yield _representable(rng.standard_normal((count, *spec.shape[1:]), np.float32) * deviation + mean)


def _moments(name: str, spec: TensorSpec) -> tuple[np.float32, np.float32]:
    for pattern, mean, deviation in _VALUES:
        if fnmatchcase(name, pattern):
            return np.float32(mean), np.float32(deviation)
    return np.float32(0), np.float32(spec.shape[-1] ** -0.5)


def _representable(values: F32Array) -> F32Array:
    """Rounded to BF16 and then to F16: the result is exact in both, also where F16 is subnormal."""
    return bf16_to_f32(f32_to_bf16(values)).astype(np.float16).astype(np.float32)


# --------------------------------------------------------------------------------------- files


def _write_shards(root: Path, plan: list[StoredTensor], shards: int) -> None:
    if not 1 <= shards <= len(plan):
        raise UsageError(f"{shards} shards", allowed=f"1 to {len(plan)}, the number of tensors")
    if shards == 1:
        write_safetensors(root / SINGLE, plan)
        return
    weight_map, total = {}, sum(t.nbytes for t in plan)
    for i, part in enumerate(np.array_split(np.arange(len(plan)), shards)):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = [plan[j] for j in part]
        write_safetensors(root / file, tensors)
        weight_map.update({t.name: file for t in tensors})
    _write_text(
        root / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    )


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _read_config(file: Path) -> dict[str, object]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(file), allowed="a config.json") from None
    return parse_json(text, str(file), UsageError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("dsv4c.frontend.generate", description="Write a random checkpoint.")
    parser.add_argument("out", type=Path)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    model.add_argument("--config", type=Path, metavar="FILE", help="a published config.json instead")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="keep the first N (default: all)")
    parser.add_argument("--style", choices=STYLES, default="published")
    parser.add_argument("--dtype", choices=("published", *FLOATS), default="published")
    parser.add_argument("--scale-dtype", choices=tuple(SCALES), default="e8m0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--mtp", type=int, default=0)
    parser.add_argument(
        "--sparse", action="store_true", help="zeros that take no room on the disk, instead of numbers"
    )
    a = parser.parse_args(arguments)
    try:
        generate_checkpoint(
            a.out, _read_config(a.config) if a.config else a.preset, seed=a.seed, style=a.style,
            dtype=a.dtype, shards=a.shards, scale_dtype=a.scale_dtype, mtp=a.mtp, layers=a.layers,
            sparse=a.sparse,
        )  # fmt: skip
    except Dsv4cError as error:
        parser.exit(2, f"error: {error}\n")
    print(a.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
