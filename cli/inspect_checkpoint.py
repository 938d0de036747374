"""The half of `dsv4c inspect` that reads checkpoint directories; imported only when it is given one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from dsv4c.frontend.checkpoint import Checkpoint, open_checkpoint
from dsv4c.frontend.config import LayerKind, ModelConfig, load_config
from dsv4c.frontend.naming import saved_name, transformers_name
from dsv4c.frontend.table import TensorSpec, expected_tensors, ledger

from .show import amount, section, size, table

CLASSES: tuple[tuple[str, str], ...] = (
    ("MTP blocks", r"mtp\."),
    ("hash tables", r".*\.tid2eid"),
    ("routed experts", r".*\.ffn\.experts\."),
    ("shared experts", r".*\.ffn\.shared_experts\."),
    ("routers", r".*\.ffn\.gate\."),
    ("indexers", r".*\.attn\.indexer\."),
    ("compressors", r".*\.attn\.compressor\."),
    ("attention", r".*\.attn\."),
    ("hyper-connections", r"(.*\.)?hc_"),
    ("norms", r"(.*[._])?norm\."),
    ("embedding", r"embed\."),
    ("head", r"head\."),
)
"""Class of parameters -> pattern of the published name; the first that matches counts."""

EXTRA = ("MTP blocks", "hash tables")
"""Not counted as parameters of the model: drafts of further tokens, and tables of expert ids."""


def directory_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint directory holds, or what its configuration alone asks for.

    Raises:
        ConfigError, CheckpointError: the directory is not a supported checkpoint.
    """
    config = load_config(path)
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.safetensors.index.json")):
        specs = expected_tensors(config)
        count, nbytes = ledger(config)
        found: dict[str, Any] = {"kind": "config", "path": str(path), "tensors": count, "bytes": nbytes}
    else:
        checkpoint = open_checkpoint(path, scan=False)
        specs = checkpoint.specs
        found = {"kind": "checkpoint", "path": str(path), **_files(checkpoint)}
    parameters = by_class(specs)
    return {
        **found,
        "config": _config(config),
        "parameters": {
            "total": sum(n for name, n in parameters.items() if name not in EXTRA),
            "active_per_token": _active(parameters, config),
            "classes": parameters,
        },
    }


def by_class(specs: dict[str, TensorSpec]) -> dict[str, int]:
    """Class -> number of values; classes that do not occur are left out."""
    out: dict[str, int] = {}
    for name, spec in specs.items():
        kind = next((kind for kind, pattern in CLASSES if re.match(pattern, name)), "other")
        out[kind] = out.get(kind, 0) + prod(spec.shape)
    return out


def _active(parameters: dict[str, int], config: ModelConfig) -> int:
    """Parameters that take part in one token: a share of the routed experts, one row of the embedding."""
    shared = (n for name, n in parameters.items() if name not in (*EXTRA, "routed experts", "embedding"))
    routed = parameters.get("routed experts", 0) * config.experts_per_token // config.n_routed_experts
    return sum(shared) + routed + config.hidden_size


def _files(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = checkpoint.files.tensors
    dtypes: dict[str, dict[str, int]] = {}
    for raw in tensors.values():
        entry = dtypes.setdefault(raw.dtype.value, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += raw.nbytes
    return {
        "naming": naming(checkpoint),
        "files": len({raw.file for raw in tensors.values()}),
        "tensors": len(tensors),
        "bytes": sum(raw.nbytes for raw in tensors.values()),
        "dtypes": dtypes,
        "tokenizer": checkpoint.tokenizer_path is not None,
    }


def naming(checkpoint: Checkpoint) -> str:
    """Which of the known spellings the files use."""
    plain = [(name, checkpoint.origins[name]) for name in checkpoint.specs]
    whole = [(name, origin.name) for name, origin in plain if not origin.stacked]
    stacked = " (stacked experts)" if len(whole) < len(plain) else ""
    if all(name == stored for name, stored in whole):
        return "published" + stacked
    if _spelt(whole, transformers_name):
        return "transformers" + stacked
    return ("saved by transformers" if _spelt(whole, saved_name) else "mixed") + stacked


def _spelt(names: Iterable[tuple[str, str]], spell: Any) -> bool:
    try:
        return all(spell(name) == stored for name, stored in names)
    except KeyError:
        return False


def _config(c: ModelConfig) -> dict[str, Any]:
    layers = {kind.value: c.layer_kinds.count(kind) for kind in LayerKind}
    return {
        "layers": c.num_hidden_layers,
        **{name: count for name, count in layers.items() if count},
        "compress_ratios": sorted({r for r in c.compress_ratios if r}),
        "hash_layers": sum(c.hash_layers),
        "mtp_blocks": c.n_mtp_layers,
        "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "heads": c.heads,
        "head_dim": c.head_dim,
        "rope_dim": c.rope_dim,
        "sliding_window": c.sliding_window,
        "routed_experts": c.n_routed_experts,
        "experts_per_token": c.experts_per_token,
        "expert_dtype": c.expert_dtype,
        "max_positions": c.max_position_embeddings,
        "eos": list(c.eos_token_ids),
    }


def text(facts: dict[str, Any]) -> str:
    """The same for people."""
    parameters = facts["parameters"]
    classes = sorted(parameters["classes"].items(), key=lambda item: -item[1])
    active = amount(parameters["active_per_token"])
    title = f"parameters: {amount(parameters['total'])}, {active} active per token"
    dtypes = [(name, e["tensors"], size(e["bytes"])) for name, e in facts.get("dtypes", {}).items()]
    config = [
        (key, ", ".join(map(str, v)) if isinstance(v, list) else v) for key, v in facts["config"].items()
    ]
    return "".join((
        _head(facts),
        section("config", table(config)),
        section(title, table([(name, amount(n)) for name, n in classes], right=[1])),
        section("stored as", table(dtypes, ("dtype", "tensors", "bytes"), right=[1, 2]) if dtypes else ""),
    ))  # fmt: skip


def _head(facts: dict[str, Any]) -> str:
    if facts["kind"] == "config":
        return (
            f"{facts['path']}: a config.json without weights\n"
            f"the released format of this model: {facts['tensors']} tensors, {size(facts['bytes'])}"
        )
    files = "1 file" if facts["files"] == 1 else f"{facts['files']} files"
    tokenizer = "with" if facts["tokenizer"] else "without"
    return (
        f"{facts['path']}: checkpoint, {facts['naming']} names, {facts['tensors']} tensors, "
        f"{size(facts['bytes'])} in {files}, {tokenizer} tokenizer.json"
    )
