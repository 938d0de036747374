"""Writes random checkpoints of any size in every naming and number format the frontend reads.

Streams tensor by tensor, so memory stays at one band of rows. A value depends on the seed and the published
name only: checkpoints that differ in naming, sharding or float format hold the same model. Owns the folder;
configurations are those of `generate_config`, tensors those of `generate_tensors`. Knows no graph.

    python -m dsv4c.frontend.generate OUT --preset small --dtype bf16
    python -m dsv4c.frontend.generate OUT --preset tiny-v41 --tokenizer DIR/tokenizer.json
    python -m dsv4c.frontend.generate OUT --config DIR/config.json --layers 4 --sparse

`--sparse` is for sizes: names, shapes and formats are those of a model of any size, but every float is zero
and a hole of the file, so that hundreds of gigabytes take a few megabytes of disk. Its logits are all equal.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dsv4c.errors import Dsv4cError, UsageError
from dsv4c.ir.dtypes import DType

from .architecture import Generation
from .config import parse_config
from .engram_layer import mod_token_map
from .generate_config import (
    PRESETS,
    is_v41,
    published_config,
    text_of,
    transformers_config,
    with_classes,
    with_room,
)
from .generate_tensors import FLOATS, TensorPlan, emptied
from .safetensors import INDEX, SINGLE, parse_json
from .stored import StoredTensor, write_safetensors
from .token_map import TokenMap, token_map, write_token_map

STYLES = ("published", "transformers", "saved")
SCALES = {"e8m0": DType.F8E8M0, "f32": DType.F32}


def generate_checkpoint(
    directory: str | Path, config: str | Mapping[str, object] = "tiny", *, seed: int = 0,
    style: str = "published", dtype: str = "published", shards: int = 1, scale_dtype: str = "e8m0",
    mtp: int | None = None, layers: int = 0, sparse: bool = False, tokenizer: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write a random checkpoint and return its directory.

    A model with Engram layers gets a token map beside its weights.

    Args:
        directory: made if need be; must not hold weights yet.
        config: a name of `PRESETS`, or published configuration keys on top of the defaults of all models.
        style: naming and config.json: "published", "transformers" (module names, stacked experts) or "saved"
            (what `save_pretrained` writes); of V4.1 there is only the first.
        dtype: "published" (FP8, packed FP4, BF16 and F32 as released; experts with odd numbers of columns
            are FP8) or "bf16", "f16", "f32" for every float tensor. The float formats hold the same values.
        shards: number of files; more than one come with an index.
        scale_dtype: of FP8 scales, "e8m0" or "f32"; packed FP4 and Engram rows always have E8M0.
        mtp: number of MTP blocks; None is none, and for V4.1 the draft layers that `config` says.
        layers: how many of the first layers to keep; 0 is all.
        sparse: every float is zero and every code and scale is 0 (F32 scales, which must be positive, are 1);
            what is zero is a hole. Tables of expert ids are those of `seed`, as rows must be distinct.
        tokenizer: a tokenizer.json that is copied; a vocabulary that is too small for it grows, see
            `generate_config.with_room`. The token map follows from it, with a class of its own for every
            token it does not have. Without, the class of a token is its id modulo the number of classes.

    Raises:
        UsageError: an argument is none of these, the style cannot express the configuration, the directory
            holds weights, or the tokenizer cannot be read.
        ConfigError: the keys are not a valid configuration.
        CheckpointError: the tokenizer does not load.
    """
    _check(
        ("style", style, STYLES),
        ("dtype", dtype, ("published", *FLOATS)),
        ("scale_dtype", scale_dtype, SCALES),
    )
    root = Path(directory)
    if root.is_dir() and any(root.glob("*.safetensors")):
        raise UsageError("the directory holds weights already", where=str(root), hint="name an empty one")
    if isinstance(config, str):
        _check(("preset", config, tuple(PRESETS)))
        config = PRESETS[config]
    if is_v41(config):
        _check((f"style of {Generation.V41.value}:", style, STYLES[:1]))
    table = None
    if tokenizer is not None:
        config, table = _with_tokenizer(config, Path(tokenizer))
    raw = published_config(config, dtype, scale_dtype == "e8m0", mtp, layers)
    model = parse_config(raw, "config of the generator")
    written = raw if style == "published" else transformers_config(raw, model)
    plan = list(TensorPlan(model, seed, style, dtype, SCALES[scale_dtype]).tensors())
    plan = [emptied(t) for t in plan] if sparse else plan
    root.mkdir(parents=True, exist_ok=True)
    _write_text(root / "config.json", json.dumps(written, indent=2) + "\n")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, root / "tokenizer.json")
    if model.engram:
        classes = model.engram.compressed_vocab
        write_token_map(root, mod_token_map(model.vocab_size, classes) if table is None else table)
    _write_shards(root, plan, shards)
    return root


def _check(*arguments: tuple[str, str, Sequence[str] | Mapping[str, DType]]) -> None:
    for name, value, allowed in arguments:
        if value not in allowed:
            raise UsageError(f"{name} {value!r}", allowed=", ".join(allowed))


def _with_tokenizer(config: Mapping[str, object], file: Path) -> tuple[dict[str, object], TokenMap]:
    """The configuration with room for a tokenizer's tokens, and the class [V] of every token of the model."""
    try:
        known = token_map(file.read_bytes(), str(file))
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise UsageError(what, where=str(file), allowed="a tokenizer.json") from None
    raw = with_room(config, len(known))
    size, classes = text_of(raw)["vocab_size"], int(known.max()) + 1
    assert isinstance(size, int)
    table = np.concatenate([known, np.arange(classes, classes + size - len(known))]).astype(np.int32)
    return with_classes(raw, int(table.max()) + 1), table


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
    parser.add_argument("--mtp", type=int, metavar="N", help="MTP blocks (default: 0; V4.1: as configured)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json to take along")
    parser.add_argument(
        "--sparse", action="store_true", help="zeros that take no room on the disk, instead of numbers"
    )
    a = parser.parse_args(arguments)
    try:
        generate_checkpoint(
            a.out, _read_config(a.config) if a.config else a.preset, seed=a.seed, style=a.style,
            dtype=a.dtype, shards=a.shards, scale_dtype=a.scale_dtype, mtp=a.mtp, layers=a.layers,
            sparse=a.sparse, tokenizer=a.tokenizer,
        )  # fmt: skip
    except Dsv4cError as error:
        parser.exit(2, f"error: {error}\n")
    print(a.out)
    return 0


__all__ = ["FLOATS", "PRESETS", "SCALES", "STYLES", "generate_checkpoint", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
